"""conv2d_fused beside a 1x1 convolution whose K blocks follow its own, in the emulator and on a
GPU, against the float64 reference."""

import pytest
import torch

from mirage_hello.kernels import conv2d_fused as page
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_sm90a import conv2d_fused_sm90a, program
from mirage_hello.kernels.conv2d_tiles import Tile
from mirage_hello.ptx import assembler

OUTPUTS = 80
# Tiles whose blocks begin before, at and past the shortcut's K blocks; channels of x and the two
# tensors of the shortcut, in part no multiples of a K block; height, width, unit of the sums.
CASES = [
    (Tile(1, 32, patch=True, stages=2), (64, 64, 0), 8, 8, 10),
    (Tile(2, 48, 2, patch=True), (72, 128, 40), 9, 11, 0),
    (Tile(2, 80, patch=True), (128, 200, 64), 16, 7, 10),
    (Tile(1, 64, 5, patch=True), (64, 192, 128), 8, 8, 10),
    (Tile(1, 64, 2, patch=True, stages=3), (64, 192, 128), 8, 8, 0),
    (Tile(2, 80, 2, patch=True, patches=6), (64, 320, 192), 16, 8, 10),
    (Tile(3, 64, 3, patch=True), (64, 320, 192), 17, 8, 0),
    (Tile(1, 40, 2, blocks_per_sm=2, patch=True), (32, 8, 24), 5, 5, 0),
]


def draw(*shape, dtype=torch.bfloat16, scale=1.0, device="cpu"):
    values = (scale * torch.randn(shape, device=device)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def problem(channels, h, w, dtype=torch.bfloat16, device="cpu"):
    """Arguments of conv2d with everything in the epilogue, and a shortcut."""
    (c, first, second), size = channels, {"dtype": dtype, "device": device}
    weight = draw(OUTPUTS, c, 3, 3, scale=(9 * c) ** -0.5, **size)
    args = draw(2, c, h, w, **size), weight, draw(OUTPUTS, **size), 1, 1
    more = draw(2, OUTPUTS, **size), draw(2, OUTPUTS, h, w, **size)
    short = draw(OUTPUTS, first + second, 1, 1, scale=(first + second) ** -0.5, **size)
    skip = draw(2, second, h, w, **size) if second else None
    return (*args, *more), page.Shortcut(draw(2, first, h, w, **size), short, skip)


def exactly(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tile", "channels", "h", "w", "unit"), CASES)
def test_a_shortcut_is_more_of_k(tile, channels, h, w, unit, dtype, device):
    args, short = problem(channels, h, w, dtype, device)
    out, sums = conv2d_fused_sm90a(*args, unit=unit, shortcut=short, tile=tile)
    truth, _ = page.conv2d_fused_torch(*exactly(args), shortcut=page.Shortcut(*exactly(short)))
    plain, _ = page.conv2d_fused_torch(*args, shortcut=short)
    result = parity.judge(out, plain, truth)
    assert result.passed, str(result)
    if unit:
        found = page.merged(sums.double())
        expected = page.merged(page.sums_torch(out.double(), unit).double())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_weight_a_shortcut_adds_nothing():
    args, short = problem((64, 128, 0), 8, 8)
    zero = short._replace(weight=torch.zeros_like(short.weight))
    tile = Tile(1, 40, patch=True)
    out, _ = conv2d_fused_sm90a(*args, shortcut=zero, tile=tile)
    assert torch.equal(out, conv2d_fused_sm90a(*args, tile=tile)[0])


@pytest.mark.parametrize(("tile", "unit"), [(case[0], case[4]) for case in CASES])
@pytest.mark.parametrize("tensors", [1, 2])
def test_assembles_without_spills(tile, unit, tensors):
    text = program(tile.fitted(4, 3, 3), 3, 3, 1, "bf16", unit=unit, shortcut=tensors).text
    _, report = assembler.ptxas(text, "sm_90a", ("-v",))
    assert "0 bytes spill stores, 0 bytes spill loads" in report


def test_refusals():
    args, short = problem((16, 16, 0), 5, 4)
    beside = "a shortcut stands beside a 3x3 convolution"
    with pytest.raises(ValueError, match=beside):
        page.conv2d_fused(*args[:3], 1, (1, 2), shortcut=short)
    with pytest.raises(ValueError, match=beside):
        page.conv2d_fused(*args[:3], 2, 1, shortcut=short)
    with pytest.raises(ValueError, match=beside):
        page.conv2d_fused(*args[:3], 1, 1, upsample=True, shortcut=short)
    small = short._replace(x=short.x[:, :, :4])
    with pytest.raises(ValueError, match="a shortcut must be 1x1 with"):
        page.conv2d_fused(*args, shortcut=small, backend="torch")
