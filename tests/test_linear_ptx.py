"""linear.sm90a: what ptxas says of its tiles, and the PTX in the emulator and on a GPU."""

import random

import pytest
import torch
from linear_calls import draw, in_parity, inputs, run

from mirage_hello.kernels import BackendError, linear_sm90a, ops, row_sums, use
from mirage_hello.kernels.linear_sm90a import Tile
from mirage_hello.ptx import assembler

# Tiles that between them render every branch of the template.
TILES = [
    Tile(1, 32),
    Tile(2, 48, split=3),
    Tile(2, 64, split=2),
    Tile(1, 40),
    Tile(2, 64, split=4),
    Tile(1, 32, 2),
    Tile(2, 160, stages=2),
    Tile(2, 32, pingpong=True, stages=2),
    Tile(2, 48, m_tiles=2, pingpong=True, stages=3),
    Tile(1, 32, shared="weight", stages=2),
    Tile(2, 48, shared="x", stages=3),
    Tile(2, 48, 2, pingpong=True, shared="weight", stages=3),
]
GATED = [Tile(1, 64), Tile(2, 96), Tile(1, 32, 2)]
GATED += [Tile(2, 64, 1, pingpong=True, shared="weight"), Tile(1, 64, shared="x")]
GATED += [Tile(2, 64, 1, pingpong=True), Tile(2, 160, 2, pingpong=True, stages=3)]


# (op, M, N, K) of Stable Diffusion: what is chosen for them must not spill.
LAYERS = [
    ("linear", 4096, 2560, 320), ("linear", 4096, 320, 1280), ("linear", 1024, 5120, 640),
    ("linear", 1024, 640, 2560), ("linear", 256, 10240, 1280), ("linear", 256, 1280, 5120),
    ("linear", 4096, 320, 320), ("linear", 1024, 640, 640), ("linear", 256, 1280, 1280),
    ("geglu", 4096, 1280, 320), ("geglu", 1024, 2560, 640), ("geglu", 256, 5120, 1280),
    ("linear", 4096, 960, 320), ("linear", 1024, 1920, 640), ("linear", 256, 3840, 1280),
]  # fmt: skip
CASES = [("linear", t) for t in TILES] + [("geglu", t) for t in GATED]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("op", "m", "n", "k"), LAYERS)
def test_chosen_tile_assembles_without_spills(op, m, n, k, norm):
    tile = linear_sm90a.choose_tile(op, m, n, k // 64, norm)
    assert_assembles(op, tile, k // 64, "bf16", norm, residual=op == "linear")


@pytest.mark.parametrize("dtype", ["f16", "e4m3"])
@pytest.mark.parametrize(("op", "tile"), CASES, ids=str)
def test_assembles_without_spills_or_serialised_products(op, tile, dtype):
    assert_assembles(op, tile, 4, dtype, norm=False, residual=op == "linear")


def assert_assembles(op, tile, blocks, dtype, norm, residual):
    fitted = tile.fitted(blocks, op == "geglu", norm or dtype == "e4m3", residual)
    text = linear_sm90a.program(op, fitted, dtype, norm, residual).text
    assert text.isascii()
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C75" not in report  # ptxas's notes on wgmma that it had to serialise or wait for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "tile"), CASES, ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated(op, tile, dtype):
    """Rows, columns and depth that fill no tile; races are findings, which raise."""
    result = in_parity(op, inputs(op, 397, 264, 88, dtype), tile)
    assert result.passed, result


@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_without_bias_and_residual():
    x, weight = inputs("linear", 200, 200, 104)[:2]
    for tile in (Tile(2, 64, split=2), Tile(2, 48, 2, pingpong=True)):
        result = in_parity("linear", (x, weight), tile)
        assert result.passed, result


@pytest.mark.parametrize("m", [1, 63, 64, 65])
@pytest.mark.parametrize("op", ["linear", "geglu"])
def test_emulated_chosen_tile(op, m):
    result = in_parity(op, inputs(op, m, 72, 24))
    assert result.passed, result


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 0.0, -30.0, 30.0])
def test_emulated_gate_at_its_limits(value):
    """gelu of what is not finite, and of what is far from zero."""
    x = torch.zeros(3, 8, dtype=torch.float16)
    bias = torch.full((16,), value, dtype=torch.float16)
    bias[:8] = 2.0
    args = (x, torch.zeros(16, 8, dtype=torch.float16), bias)
    result = in_parity("geglu", args)
    assert result.passed, result


@pytest.mark.parametrize(
    ("op", "tile", "reason"),
    [
        ("geglu", Tile(1, 64, split=2), "do not split K"),
        ("linear", Tile(1, 64, pingpong=True), "pingpong needs two warpgroups"),
        ("linear", Tile(2, 256, 2), "registers"),
        ("linear", Tile(1, 64, split=8), "4 K blocks cannot be split over 8"),
        ("linear", Tile(1, 40, split=2), "whole octets"),
    ],
)
def test_tiles_that_do_not_exist(op, tile, reason):
    with pytest.raises(ValueError, match=reason):
        run(op, *inputs(op, 8, 256, 32), tile=tile)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (draw(4, 12), draw(16, 12), "K must be a multiple of 8"),
        (draw(4, 16), draw(12, 16), "N must be a multiple of 8"),
        (draw(16, 4).T, draw(16, 16), "x must be contiguous"),
    ],
)
def test_refusals(x, weight, reason):
    with use("ptx-emulated"), pytest.raises(BackendError, match=reason):
        ops.linear(x, weight)


@pytest.mark.parametrize(
    ("width", "options", "reason"),
    [
        (104, {}, "no tile holds whole softmaxes of 104 columns"),
        (80, {"tile": Tile(2, 64)}, "block_n=64.* holds whole softmaxes"),
        (80, {"tile": Tile(1, 80, split=2)}, "a tile that is not split"),
        (
            80,
            {"sums": row_sums.RowSums(torch.zeros(3, 1, 2), 256)},
            r"contiguous float32 \(8, 1, 2\)",
        ),
        (80, {"depth": 8192}, "K must be 1 to"),
    ],
)
def test_a_softmax_that_no_tile_holds_is_refused(width, options, reason):
    options = dict(options)
    depth = options.pop("depth", 256)
    x, weight, columns = draw(8, depth), draw(2 * width, depth), torch.zeros(2 * width, 2)
    with pytest.raises(ValueError, match=reason):
        linear_sm90a.softmaxed(x, weight, columns, width, 1e-5, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear", "geglu"])
def test_random_shapes_on_the_gpu(op, seed):
    dice = random.Random(seed)
    for _ in range(40):
        m, k, n = dice.randint(1, 5000), 8 * dice.randint(1, 200), 8 * dice.randint(1, 200)
        dtype = dice.choice([torch.bfloat16, torch.float16])
        args = inputs(op, m, k, n, dtype, "cuda")
        fits = linear_sm90a.candidates(-(-k // 64), op == "geglu")
        for tile in (None, dice.choice(fits)):
            result = in_parity(op, args, tile)
            assert result.passed, (m, k, n, tile, str(result))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "tile"),
    [("linear", Tile(2, 160, split=4)), ("linear", Tile(2, 160, 2, True)), ("geglu", None)],
)
def test_same_bits_every_time_and_in_a_graph(op, tile):
    args = inputs(op, 1024, 640, 1280, device="cuda")
    first = run(op, *args, tile=tile)
    for _ in range(20):
        assert torch.equal(first, run(op, *args, tile=tile))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, *args, tile=tile)
    captured.zero_()
    graph.replay()
    assert torch.equal(first, captured)
