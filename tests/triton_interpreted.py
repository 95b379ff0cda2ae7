"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: the Triton kernels on CPU tensors.

What the op tests do not reach: elementwise, group_norm, and tiles that small shapes do not choose.
bfloat16 is rounded towards zero by the interpreter, hence 2 roundings where the GPU makes one.
"""

import pytest
import torch
import torch.nn.functional as F
import triton

from mirage_hello import reference
from mirage_hello.kernels.triton import attention, conv2d, elementwise, group_norm, linear, tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALL_TILES = tiles.Tiles(block_m=16, block_n=16, block_k=16, warps=4, stages=2, split_k=3)


def close(out, truth, factor=4):
    scale = truth.abs().max().clamp(min=1.0)
    return ((out.double() - truth).abs() <= factor * ROUNDING[out.dtype] * scale).all()


def draw(dtype, *shape):
    return torch.randn(shape).to(dtype)


def test_the_interpreter_is_on():
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (3, 700), (2, 3, 9, 5)])
def test_silu(shape, dtype):
    x = 4 * draw(dtype, *shape)
    out = elementwise.silu(x)
    assert out.shape == x.shape
    if x.numel():
        assert close(out, F.silu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficients", ["floats", "a", "b", "both"])
def test_axpby(coefficients, dtype):
    x, y = (draw(dtype, 3, 4, 19, 7).contiguous(memory_format=torch.channels_last) for _ in "xy")
    a = torch.randn(3) if coefficients in ("a", "both") else 0.7
    b = torch.randn(3) if coefficients in ("b", "both") else -2
    out = elementwise.axpby(a, x, b, y)
    assert out.stride() == x.stride()
    assert close(out, reference.axpby(a, x.double(), b, y.double()))


def test_axpby_copies_an_operand_of_another_layout():
    x, y = draw(torch.float32, 2, 3, 4, 5), draw(torch.float32, 2, 4, 5, 3).permute(0, 3, 1, 2)
    assert close(elementwise.axpby(2, x, 3, y), 2 * x.double() + 3 * y.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_survives_the_model_range(dtype):
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = elementwise.frame_to_model(frames, dtype)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert close(x, reference.frame_to_model(frames, torch.float64))
    assert torch.equal(elementwise.model_to_frame(x), frames)


def test_model_to_frame_clamps_and_rounds_ties_to_even():
    ties = [(level + 0.5) / 127.5 - 1 for level in (0, 1, 2)]
    values = [float("nan"), float("inf"), -float("inf"), -2.0, 2.0, 0.9999, *ties, 0.0, 1.0, -1.0]
    x = torch.tensor(values).reshape(1, 3, 2, 2)
    assert torch.equal(elementwise.model_to_frame(x), reference.model_to_frame(x))


@pytest.mark.parametrize("max_group", [group_norm.MAX_GROUP, 16], ids=["one pass", "three"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 7, 5), 3), ((1, 40, 9, 3), 8), ((3, 4, 1, 1), 4), ((1, 3, 6, 6), 1)],
)
def test_group_norm(shape, groups, dtype, layout, max_group, monkeypatch):
    monkeypatch.setattr(group_norm, "MAX_GROUP", max_group)
    monkeypatch.setattr(group_norm, "TILE", 64)
    x = draw(dtype, *shape).contiguous(memory_format=layout) + 3
    weight, bias = draw(dtype, shape[1]), draw(dtype, shape[1])
    truth = F.group_norm(x.double(), groups, weight.double(), bias.double())
    out = group_norm.group_norm(x, groups, weight, bias)
    assert out.stride() == x.stride()
    assert close(out, truth)
    assert close(group_norm.group_norm_silu(x, groups, weight, bias), F.silu(truth))


@pytest.mark.parametrize("max_group", [group_norm.MAX_GROUP, 16], ids=["one pass", "three"])
def test_group_norm_does_not_cancel(max_group, monkeypatch):
    """A mean 10^4 times the spread: E[x^2] - E[x]^2 in float32 would leave nothing."""
    monkeypatch.setattr(group_norm, "MAX_GROUP", max_group)
    x = 1e4 + torch.randn(1, 4, 30, 30)
    truth = F.group_norm(x.double(), 2)
    assert (group_norm.group_norm(x, 2) - truth).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_k(dtype):
    """Three parts of K, the last one short, added by the second kernel with its epilogue."""
    x, weight, bias = draw(dtype, 21, 70), 0.1 * draw(dtype, 37, 70), draw(dtype, 37)
    residual = draw(dtype, 21, 37)
    out = linear.linear(x, weight, bias, residual, tiles=SMALL_TILES)
    truth = reference.linear(x.double(), weight.double(), bias.double(), residual.double())
    assert close(out, truth)
    image, window = draw(dtype, 2, 20, 5, 4), 0.1 * draw(dtype, 18, 20, 3, 3)
    args = image, window, draw(dtype, 18), 1, 1, draw(dtype, 2, 18), draw(dtype, 2, 18, 5, 4)
    truth = reference.conv2d(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert close(conv2d.conv2d(*args, tiles=SMALL_TILES), truth)


def test_wide_offsets_compute_the_same(monkeypatch):
    """The 64-bit variant, which only tensors beyond 2^31 elements choose."""
    args = draw(torch.float32, 2, 5, 6, 7), draw(torch.float32, 4, 5, 3, 3), None, 2, 1
    narrow = conv2d.conv2d(*args)
    monkeypatch.setattr(conv2d, "last_offset", lambda tensor: 2**31)
    assert torch.equal(conv2d.conv2d(*args), narrow)


@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_attention_tiles(block_n):
    q, k, v = (draw(torch.float32, 1, 50, 2, 40) for _ in range(3))
    out = attention.attention(q, k, v, tiles=attention.Tiles(16, block_n, 4, 2))
    assert close(out, reference.attention(q.double(), k.double(), v.double()))
