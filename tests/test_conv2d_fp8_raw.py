"""conv2d_fp8 of what no norm precedes: copies of outputs in e4m3, and shortcuts that read them."""

import random
from dataclasses import replace

import pytest
import torch
from test_conv2d_fp8 import PATCH, TILES, draw

from mirage_hello.bench.tune import unlaunched
from mirage_hello.kernels import conv2d_fp8 as page
from mirage_hello.kernels.conv2d_fused import Shortcut
from mirage_hello.ptx import assembler


def eight(*shape, device="cpu"):
    """A tensor in e4m3, in units of 1 / 100."""
    return page.quantise(draw(*shape, device=device), 0.01)


def rounded(x, scale):
    """As the kernel rounds, by the reciprocal: a quotient may fall on the other side of a tie."""
    return page.quantise(x.float() * (1 / scale), 1.0)


def copy_like(b, o, p, q, scale, device="cpu"):
    size = {"dtype": page.E4M3, "device": device}
    return torch.empty(b, o, p, q, **size, memory_format=torch.channels_last), scale


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_emulated_copies(tile):
    """The copy is the output's own rounding; the output has the bits that it has without one."""
    x, weight = eight(1, 48, 9, 9), page.quantise_weight(draw(40, 48, 3, 3) / 20)
    args = (x, weight, 0.01, draw(40), 1, 1, None, draw(1, 40, 9, 9))
    plain, sums = page.conv2d_fp8(*args, unit=10, tile=tile)
    for scale in (plain.float().abs().max().item() / 448, plain.float().abs().max().item() / 4480):
        copy = copy_like(1, 40, 9, 9, scale)
        out, left = page.conv2d_fp8(*args, unit=10, tile=tile, copy=copy)
        assert torch.equal(out, plain) and torch.equal(left, sums)
        assert torch.equal(copy[0].float(), rounded(plain, scale).float())


@pytest.mark.parametrize("options", [{"stride": 2}, {"upsample": True}, {"window": 1}], ids=str)
def test_emulated_copies_of_other_sizes(options):
    stride, window, up = options.get("stride", 1), options.get("window", 3), "upsample" in options
    tile = replace(PATCH, patch=stride == 1 and window == 3)
    x, weight = eight(2, 32, 6, 6), page.quantise_weight(draw(32, 32, window, window) / 20)
    edge = 12 if up else 6 // stride
    copy = copy_like(2, 32, edge, edge, 0.02)
    args = (x, weight, 0.01, None, stride, window // 2, None, None, None, up)
    out, _ = page.conv2d_fp8(*args, tile=tile, copy=copy)
    assert torch.equal(copy[0].float(), rounded(out, 0.02).float())


@pytest.mark.parametrize("tile", [t for t in TILES if t.patch and not t.persistent], ids=str)
@pytest.mark.parametrize("channels", [(48, 0), (144, 32)])
def test_emulated_shortcuts(tile, channels):
    """A 1x1 convolution of other e4m3 tensors, its products in the units of the 3x3 one's."""
    first, second = channels
    x, wide, short = eight(1, 48, 9, 9), draw(40, 48, 3, 3), draw(40, first + second, 1, 1)
    both = page.quantise_weight(torch.cat([wide.flatten(1), short.flatten(1)], 1)[..., None, None])
    values, others = both.values.split([48 * 9, first + second], 1)
    layout = torch.channels_last
    values = values.reshape(wide.shape).contiguous(memory_format=layout)
    others = others.contiguous(memory_format=layout)
    inputs = [eight(1, c, 9, 9) for c in channels if c]
    beside = Shortcut(inputs[0], others, inputs[1] if second else None)
    bias = draw(40)
    args = (x, page.Weight(values, both.scales), 0.01, bias, 1, 1)
    out, _ = page.conv2d_fp8(*args, unit=10, tile=tile, shortcut=beside)
    truth = page.conv2d_fp8_torch(*args)
    weight = page.Weight(others, both.scales)
    truth += page.conv2d_fp8_torch(torch.cat(inputs, 1), weight, 0.01, None, 1, 0)
    assert (out.double() - truth).norm() < 4e-3 * truth.norm()


# Edge, outputs, inputs of the shortcut: the 880m's residual blocks whose width changes
BLOCKS = [
    (32, 640, (320,)), (16, 1280, (640,)), (8, 1280, (1280, 1280)), (16, 1280, (1280, 1280)),
    (16, 1280, (1280, 640)), (32, 640, (1280, 640)), (32, 640, (640, 640)), (32, 640, (640, 320)),
    (64, 320, (640, 320)), (64, 320, (320, 320)),
]  # fmt: skip
# Edge of the input, channels, stride, enlarged: what changes the resolution
SAMPLERS = [(64, 320, 2, False), (32, 640, 2, False), (16, 1280, 2, False)]
SAMPLERS += [(8, 1280, 1, True), (16, 1280, 1, True), (32, 640, 1, True)]


def empty(*shape):
    return torch.empty(shape, memory_format=torch.channels_last, dtype=page.E4M3)


def assert_no_spills(programs):
    for program in programs:
        report = assembler.ptxas(program.text, "sm_90a", ("-v",))[1]
        assert " 0 bytes spill stores, 0 bytes spill loads" in report
        assert "C75" not in report


@pytest.mark.parametrize(("edge", "outputs", "inputs"), BLOCKS)
def test_shortcuts_of_the_880m_assemble_without_spills(edge, outputs, inputs):
    weight = page.Weight(empty(outputs, outputs, 3, 3), torch.empty(outputs))
    tensors = [empty(1, c, edge, edge) for c in inputs]
    beside = Shortcut(
        tensors[0], empty(outputs, sum(inputs), 1, 1), tensors[1] if tensors[1:] else None
    )
    x, copy = empty(1, outputs, edge, edge), copy_like(1, outputs, edge, edge, 1.0)
    with unlaunched() as programs:
        page.conv2d_fp8(x, weight, 1.0, None, 1, 1, unit=10, shortcut=beside, copy=copy)
    assert_no_spills(programs)


@pytest.mark.parametrize(("edge", "channels", "stride", "enlarged"), SAMPLERS)
def test_samplers_of_the_880m_assemble_without_spills(edge, channels, stride, enlarged):
    weight = page.Weight(empty(channels, channels, 3, 3), torch.empty(channels))
    size = 2 * edge if enlarged else edge // stride
    more = {"upsample": enlarged, "unit": 10, "copy": copy_like(1, channels, size, size, 1.0)}
    with unlaunched() as programs:
        page.conv2d_fp8(empty(1, channels, edge, edge), weight, 1.0, None, stride, 1, **more)
    assert_no_spills(programs)


def test_refusals():
    x, weight = eight(1, 32, 4, 4), page.quantise_weight(draw(32, 32, 3, 3))
    for copy in (
        copy_like(1, 16, 4, 4, 1.0),
        copy_like(1, 32, 4, 4, 0.0),
        (copy_like(1, 32, 4, 4, 1.0)[0].contiguous(), 1.0),
    ):
        with pytest.raises(ValueError, match=r"a copy must be e4m3 \[1, 32, P, Q\]"):
            page.conv2d_fp8(x, weight, 1.0, None, 1, 1, copy=copy)
    with pytest.raises(ValueError, match=r"a copy must be like out, \[1, 32, 4, 4\]"):
        page.conv2d_fp8(x, weight, 1.0, None, 1, 1, copy=copy_like(1, 32, 4, 2, 1.0))
    narrow = Shortcut(eight(1, 8, 4, 4), eight(32, 8, 1, 1))
    with pytest.raises(ValueError, match="multiples of 16"):
        page.conv2d_fp8(x, weight, 1.0, None, 1, 1, shortcut=narrow)


@pytest.mark.gpu
def test_random_shortcuts_and_copies_on_the_gpu(seed):
    dice = random.Random(seed)
    for _ in range(12):
        b, c, o = dice.randint(1, 2), 16 * dice.randint(1, 60), 10 * 8 * dice.randint(1, 12)
        h, w = dice.randint(1, 40), dice.randint(1, 40)
        channels = [16 * dice.randint(1, 60) for _ in range(dice.randint(1, 2))]
        size = {"device": "cuda"}
        x, inputs = eight(b, c, h, w, **size), [eight(b, n, h, w, **size) for n in channels]
        weight = page.quantise_weight(draw(o, c, 3, 3, **size) / c)
        units = weight.scales[:, None, None, None]
        short = page.quantise(draw(o, sum(channels), 1, 1, **size) / c, units)
        beside = Shortcut(inputs[0], short, inputs[1] if channels[1:] else None)
        copy = copy_like(b, o, h, w, 0.05, **size)
        args = (x, weight, 0.01, draw(o, **size), 1, 1)
        out, _ = page.conv2d_fp8(*args, unit=10, shortcut=beside, copy=copy)
        truth = page.conv2d_fp8_torch(*args)
        given = (torch.cat(inputs, 1), page.Weight(short, weight.scales), 0.01, None, 1, 0)
        truth += page.conv2d_fp8_torch(*given)
        assert (out.double() - truth).norm() < 4e-3 * truth.norm(), (b, c, o, h, w, channels)
        assert torch.equal(copy[0].float(), rounded(out, 0.05).float())
