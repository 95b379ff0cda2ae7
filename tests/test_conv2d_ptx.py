"""conv2d.sm90a: what ptxas says of it, and its PTX in the emulator and on a GPU."""

import random
from dataclasses import replace

import pytest
import torch

from mirage_hello import reference
from mirage_hello.kernels import BackendError, conv2d_sm90a, ops, parity, use
from mirage_hello.kernels.conv2d_tiles import SMEM_BYTES, Tile
from mirage_hello.ptx import assembler

PATCH = Tile(1, 32, patch=True)
# Tiles that between them render every branch of the template.
TILES = [
    PATCH,
    Tile(2, 48, split=3, patch=True),
    Tile(2, 64, split=4, patch=True),
    Tile(3, 32, split=4, patch=True),
    Tile(1, 64, split=5, patch=True),
    Tile(1, 32, blocks_per_sm=2, patch=True),
    replace(PATCH, persistent=True),
    Tile(2, 32, split=2),
    Tile(1, 32, persistent=True),
]


def draw(*shape, dtype=torch.bfloat16, scale=1.0, device="cpu"):
    values = (scale * torch.randn(shape)).to(device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def inputs(b, c, h, w, o, window=3, stride=1, padding=1, dtype=torch.bfloat16, device="cpu"):
    """Arguments of ops.conv2d with everything in the epilogue."""
    around = sum(reference.sides(padding))
    p, q = ((n + around - window) // stride + 1 for n in (h, w))
    size = {"dtype": dtype, "device": device}
    weight = draw(o, c, window, window, scale=(window**2 * c) ** -0.5, **size)
    image = draw(b, c, h, w, **size), weight, draw(o, **size)
    return *image, stride, padding, draw(b, o, **size), draw(b, o, p, q, **size)


def in_parity(args, tile=None, **options):
    """Hold conv2d_sm90a with a tile against the float64 reference."""
    names = ("x", "weight", "bias", "stride", "padding", "channel_bias", "residual")
    values = dict(zip(names, args, strict=True)) | options
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    out = conv2d_sm90a.conv2d_sm90a(**values, tile=tile)
    return parity.judge(out, reference.conv2d(**values), reference.conv2d(**doubled))


# (batch, channels, outputs, image) of Stable Diffusion: what is chosen for them must not spill.
LAYERS = [
    (1, 320, 320, 64), (8, 320, 320, 64), (1, 960, 320, 64), (1, 640, 640, 32), (1, 1920, 640, 32),
    (1, 1280, 1280, 16), (1, 2560, 1280, 16), (1, 1280, 1280, 8), (1, 128, 128, 512),
    (1, 512, 512, 128),
]  # fmt: skip
CHOSEN = {
    conv2d_sm90a.choose_tile(b, n, n, o, 9 * -(-c // 64), 3, 3, 1).fitted(9 * -(-c // 64), 3, 3)
    for b, c, o, n in LAYERS
}


@pytest.mark.parametrize("tile", [*TILES, *sorted(CHOSEN, key=str)], ids=str)
def test_assembles_without_spills_or_serialised_products(tile):
    fitted = tile.fitted(4, 3, 3)
    assert fitted.layout(3, 3)[1] <= SMEM_BYTES[tile.blocks_per_sm]
    text = conv2d_sm90a.program(fitted, 3, 3, 1, "bf16").text
    assert text.isascii()
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C75" not in report  # ptxas's notes on wgmma that it had to serialise or wait for


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_emulated(tile):
    """Edges cut in both directions, C and O past their blocks; races are findings, which raise."""
    result = in_parity(inputs(1, 72, 9, 9, 40), tile)
    assert result.passed, result


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_emulated_windows(window, stride):
    result = in_parity(inputs(2, 16, 7, 11, 24, window, stride, window // 2, torch.float16))
    assert result.passed, result


@pytest.mark.parametrize("padding", [0, 2, (0, 1), (2, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_emulated_paddings(stride, padding):
    """Even and uneven, as Stable Diffusion's autoencoder pads where it halves an image."""
    tile = Tile(1, 32, patch=stride == 1)
    result = in_parity(inputs(2, 24, 13, 10, 40, 3, stride, padding), tile)
    assert result.passed, str(result)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("skip_channels", [0, 8, 72])
def test_emulated_inputs(skip_channels, upsample):
    """Channels of two tensors, pixels of a smaller image: both read in place."""
    x, weight = draw(2, 72, 5, 9), draw(32, 72 + skip_channels, 3, 3, scale=0.04)
    skip = draw(2, skip_channels, 5, 9) if skip_channels else None
    args = (x, weight, draw(32), 1, 1, None, None)
    result = in_parity(args, skip=skip, upsample=upsample)
    assert result.passed, result


def test_the_sum_over_a_cluster_has_one_order():
    args = inputs(1, 128, 8, 8, 32)
    tile = Tile(1, 32, split=4, patch=True)
    first, second = (conv2d_sm90a.conv2d_sm90a(*args, tile=tile) for _ in range(2))
    assert torch.equal(first, second)


def test_every_candidate_fits_the_shared_memory():
    for window, stride in ((3, 1), (3, 2), (1, 1)):
        for tile in conv2d_sm90a.candidates(5 * window**2, window, window, stride):
            fitted = tile.fitted(tile.share(5 * window**2), window, window)
            assert fitted.layout(window, window)[1] <= SMEM_BYTES[tile.blocks_per_sm], tile


def test_narrow_tiles_have_deep_rings():
    """One warpgroup waits for weights; rings that go round, and one longer than its K blocks."""
    assert Tile(1, 64, 5, patch=True).fitted(36, 3, 3).stages == 12
    tile = Tile(1, 64, 5, patch=True, stages=20).fitted(36, 3, 3)
    assert tile.layout(3, 3)[1] <= SMEM_BYTES[1]
    assert Tile(2, 80, patch=True).fitted(45, 3, 3).stages == 12
    for split, channels in ((1, 200), (2, 264)):
        narrow = Tile(1, 32, split, patch=True)
        result = in_parity(inputs(1, channels, 9, 10, 40), narrow)
        assert result.passed, str(result)


def test_stages_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="a block may have 232448 bytes of shared memory"):
        Tile(2, 160, patch=True, stages=12).fitted(45, 3, 3)


def test_a_split_without_work_is_an_error():
    with pytest.raises(ValueError, match="1 K blocks cannot be split over 2"):
        conv2d_sm90a.conv2d_sm90a(draw(1, 8, 4, 4), draw(8, 8, 1, 1), tile=Tile(1, 32, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": draw(1, 12, 8, 8), "weight": draw(16, 12, 3, 3)}, "C must be a multiple of 8"),
        ({"weight": draw(12, 16, 3, 3)}, "O must be a multiple of 8"),
        ({"x": torch.randn(1, 16, 8, 8).bfloat16()}, "x must be channels-last"),
        ({"upsample": True, "padding": 0}, "upsample needs a 3x3 window"),
        ({"upsample": True, "padding": (1, 2)}, "upsample needs a 3x3 window"),
    ],
)
def test_refusals(change, reason):
    values = {"x": draw(1, 16, 8, 8), "weight": draw(16, 16, 3, 3), "padding": 1} | change
    with use("ptx-emulated"), pytest.raises(BackendError, match=reason):
        ops.conv2d(**values)


@pytest.mark.gpu
def test_random_shapes_on_the_gpu(seed):
    """Any image, batch and channel count, the chosen tile and a random one; poisoned outputs."""
    dice = random.Random(seed)
    for _ in range(40):
        b, h, w = dice.randint(1, 9), dice.randint(1, 129), dice.randint(1, 129)
        c, o = 8 * dice.randint(1, 40), 8 * dice.randint(1, 40)
        window, stride = dice.choice([1, 3, 3]), dice.choice([1, 1, 2])
        dtype = dice.choice([torch.bfloat16, torch.float16])
        padding = dice.choice([window // 2, (0, window // 2), (window // 2, window - 1)])
        h, w = max(h, window), max(w, window)
        args = inputs(b, c, h, w, o, window, stride, padding, dtype, "cuda")
        fits = conv2d_sm90a.candidates(window**2 * -(-c // 64), window, window, stride)
        for tile in (None, dice.choice(fits)):
            parity.poison(args[-1])
            result = in_parity(args, tile)
            assert result.passed, (b, c, h, w, o, window, stride, tile, str(result))


@pytest.mark.gpu
@pytest.mark.parametrize("upsample", [False, True])
def test_two_inputs_on_the_gpu(upsample):
    x, skip = draw(2, 320, 32, 24, device="cuda"), draw(2, 72, 32, 24, device="cuda")
    weight = draw(160, 392, 3, 3, scale=0.017, device="cuda")
    result = in_parity((x, weight, None, 1, 1, None, None), skip=skip, upsample=upsample)
    assert result.passed, result


@pytest.mark.gpu
@pytest.mark.parametrize("split", [1, 2, 4, 6])
def test_same_bits_every_time_and_in_a_graph(split):
    args = inputs(1, 640, 32, 32, 640, device="cuda")
    tile = Tile(2, 80 if split < 4 else 160, split, patch=True)
    first = conv2d_sm90a.conv2d_sm90a(*args, tile=tile)
    for _ in range(20):
        assert torch.equal(first, conv2d_sm90a.conv2d_sm90a(*args, tile=tile))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = conv2d_sm90a.conv2d_sm90a(*args, tile=tile)
    captured.zero_()
    graph.replay()
    assert torch.equal(first, captured)
