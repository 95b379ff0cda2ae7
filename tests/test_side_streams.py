"""Convolutions, linears and norms on two streams at once, as calls and as graphs: the same bits."""

import pytest
import torch

from mirage_hello.kernels import conv2d_sm90a, layer_norm_linear, linear_sm90a, ops
from mirage_hello.kernels.conv2d_fused import Norm
from mirage_hello.kernels.group_norm_apply import group_norm_apply

pytestmark = pytest.mark.gpu
RUNS = 20


def draw(*shape, scale=1.0):
    values = (scale * torch.randn(shape, device="cuda")).bfloat16()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def residual_block(channels, edge):
    """GroupNorm, convolution with sums, GroupNorm of them, convolution with the residual."""
    x, parameters = draw(1, channels, edge, edge), [draw(channels) for _ in range(4)]
    weights = [draw(channels, channels, 3, 3, scale=(9 * channels) ** -0.5) for _ in range(2)]

    def run():
        h = ops.group_norm_silu(x, 32, *parameters[:2])
        h, sums = conv2d_sm90a.conv2d_fused_sm90a(h, weights[0], None, 1, 1, unit=10)
        h = group_norm_apply(h, Norm(sums, 32, *parameters[2:]))
        return conv2d_sm90a.conv2d_sm90a(h, weights[1], None, 1, 1, None, x)

    return run


def feed_forward(rows, width):
    """A linear with sums, layer_norm and geglu by them, layer_norm and linear by row_statistics."""
    x, first = draw(rows, width), draw(width, width, scale=width**-0.5)
    gamma, beta = draw(width), draw(width)
    gate = layer_norm_linear.fold(gamma, beta, draw(8 * width, width, scale=width**-0.5))
    last = layer_norm_linear.fold(None, None, draw(width, 4 * width, scale=0.5 * width**-0.5))

    def run():
        h, sums = linear_sm90a.linear_summed(x, first, None, x)
        h = layer_norm_linear.layer_norm_geglu(h, gate, sums=sums)
        return layer_norm_linear.layer_norm_linear(h, last, x)

    return run


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("graphs", [False, True])
def test_two_streams_at_once(graphs):
    runs = [residual_block(320, 32), feed_forward(1024, 640)]
    alone = [run() for run in runs]
    made = [captured(run) for run in runs] if graphs else []
    streams = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(RUNS):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if graphs:
                    made[i][0].replay()
                    found[i].append(made[i][1].clone())
                else:
                    found[i].append(runs[i]())
    torch.cuda.synchronize()
    for expected, outs in zip(alone, found, strict=True):
        assert all(torch.equal(expected, out) for out in outs)
