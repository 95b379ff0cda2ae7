"""conv2d_fp8 against float64 on the dequantised inputs, in the emulator and on a GPU."""

import random
from dataclasses import replace

import pytest
import torch

from mirage_hello.kernels import conv2d_fp8 as page
from mirage_hello.kernels import conv2d_fused as fused
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_sm90a import program
from mirage_hello.kernels.conv2d_tiles import PROMOTED_WIDEST, Tile, choose_tile
from mirage_hello.ptx import assembler

PATCH = Tile(1, 32, patch=True, promote=2)
TILES = [
    PATCH,
    replace(PATCH, promote=0),
    Tile(2, 80, split=2, patch=True, promote=4),
    Tile(2, 48, split=3, patch=True, promote=1),
    replace(PATCH, persistent=True),
    Tile(2, 32, promote=3),
]


def draw(*shape, device="cpu"):
    values = torch.randn(shape, device=device).bfloat16()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def check(tile, b, c, h, w, o, window=3, stride=1, skip=0, upsample=False, device="cpu"):
    """Quantise random tensors and hold the kernel against the exact products of what is left."""
    x, held = draw(b, c, h, w, device=device), draw(b, skip, h, w, device=device)
    x_scale = page.calibrate([x])
    weight = page.quantise_weight(draw(o, c + skip, window, window, device=device) / c)
    p, q = ((n * (1 + upsample) + 2 * (window // 2) - window) // stride + 1 for n in (h, w))
    rest = (draw(o, device=device), stride, window // 2, draw(b, o, device=device))
    rest += (draw(b, o, p, q, device=device), page.quantise(held, x_scale) if skip else None)
    quantised = page.quantise(x, x_scale)
    out, _ = page.conv2d_fp8(quantised, weight, x_scale, *rest, upsample, tile=tile)
    truth = page.conv2d_fp8_torch(quantised, weight, x_scale, *rest, upsample)
    result = parity.judge(out, truth.bfloat16(), truth)
    assert result.passed, result


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_emulated(tile):
    """C ends inside a block of 128; edges cut in both directions."""
    check(tile, 1, 144, 9, 9, 40)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"window": 1}, {"skip": 16}, {"upsample": True, "skip": 144}],
    ids=str,
)
def test_emulated_inputs(options):
    tile = replace(PATCH, patch=options.get("stride", 1) == 1 and options.get("window", 3) == 3)
    check(tile, 2, 48, 5, 9, 32, **options)


@pytest.mark.parametrize("tile", [PATCH, Tile(2, 48, 2, patch=True, promote=4), TILES[4]], ids=str)
@pytest.mark.parametrize("skip_channels", [0, 80])
def test_emulated_norm_rounds_to_e4m3(tile, skip_channels):
    """C ends inside the first 64 of a block, with a skip of another block; padding stays 0."""
    x, skip = draw(2, 160, 9, 9) + 1, draw(2, skip_channels, 9, 9)
    channels = 160 + skip_channels
    sums = [fused.sums_torch(t, 10) for t in ((x, skip) if skip_channels else (x,))]
    norm = fused.Norm(sums[0], channels // 40, draw(channels), draw(channels), *sums[1:])
    weight = page.Weight((draw(24, channels, 3, 3) * 100).to(page.E4M3), torch.rand(24) / channels)
    args = (draw(24), 1, 1, None, None, skip if skip_channels else None)
    out, _ = page.conv2d_fp8(x, weight, 0.02, *args, norm=norm, tile=tile)
    joined = torch.cat([x, skip], 1).double()
    scale, shift = (t.double()[:, :, None, None] for t in fused.scale_and_shift(norm))
    rounded = page.quantise(torch.nn.functional.silu(joined * scale + shift), 0.02)
    truth = page.conv2d_fp8_torch(rounded, weight, 0.02, *args[:5])
    # tanh.approx moves values across e4m3's rounding: one in some hundred by 2^-3 of itself
    assert ((out.double() - truth).norm() / truth.norm()) < 6e-3


def test_short_sums_are_promoted():
    """Of 2304 equal products wgmma's 14 bits lose what float32 keeps."""
    x = torch.ones(1, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = page.Weight(
        torch.full((8, 256, 3, 3), 1.125).contiguous(memory_format=torch.channels_last),
        torch.ones(8),
    )
    weight = replace(weight, values=weight.values.to(page.E4M3))

    def error(promote):
        tile = replace(PATCH, promote=promote)
        out, _ = page.conv2d_fp8(x.to(page.E4M3), weight, 1.0, None, 1, 1, tile=tile)
        return (out[0, 0, 3, 3].double() - 2592).abs().item()

    assert error(1) <= error(0) and error(1) <= 8  # half a unit of bfloat16 at 2592


def test_weights_use_their_range():
    weight = page.quantise_weight(draw(8, 16, 3, 3) * torch.logspace(-3, 3, 8)[:, None, None, None])
    assert (weight.values.float().abs().amax((1, 2, 3)) == page.LARGEST).all()


def test_values_past_the_calibrated_range_are_clamped():
    scale = page.calibrate([torch.tensor([0.5, -2.0])])
    values = page.quantise(torch.tensor([2.0, 40.0, -40.0]), scale)
    assert values.float().tolist() == [448.0, 448.0, -448.0]


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda: page.calibrate([]), ValueError, "finite and above 0"),
        (lambda: page.calibrate([torch.tensor([float("inf")])]), ValueError, "got inf"),
        (lambda: page.quantise_weight(draw(8, 24, 3, 3)), ValueError, "multiple of 16"),
        (
            lambda: page.conv2d_fp8(
                draw(1, 16, 4, 4), page.quantise_weight(draw(8, 16, 3, 3)), 1.0
            ),
            TypeError,
            "x must be torch.float8_e4m3fn",
        ),
    ],
)
def test_refusals(call, error, reason):
    with pytest.raises(error, match=reason):
        call()


@pytest.mark.parametrize(("groups", "block_n"), PROMOTED_WIDEST.items())
def test_assembles_without_spills(groups, block_n):
    tile = Tile(groups, block_n, patch=True, promote=4, stages=3)
    text = program(tile, 3, 3, 1, "bf16", fp8=True).text
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report and "C75" not in report


def test_chosen_tiles_promote():
    tile = choose_tile(1, 64, 64, 320, 27, 3, 3, 1, fp8=True)
    assert tile.promote and tile.patch


@pytest.mark.gpu
def test_random_shapes_on_the_gpu(seed):
    dice = random.Random(seed)
    for _ in range(30):
        size = dice.randint(1, 3), 16 * dice.randint(1, 30), dice.randint(1, 70)
        window, stride = dice.choice([(1, 1), (3, 1), (3, 1), (3, 2)])
        outputs = 8 * dice.randint(1, 40)
        check(None, *size, dice.randint(1, 70), outputs, window, stride, device="cuda")
