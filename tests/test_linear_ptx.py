"""linear.sm90a (linear and geglu): what ptxas says, and the PTX in the emulator and on a GPU."""

import random

import pytest
import torch

from mirage_hello import reference
from mirage_hello.kernels import BackendError, linear_sm90a, ops, parity, use
from mirage_hello.kernels.product_sm90a import Tile
from mirage_hello.ptx import assembler

# Tiles that between them render every branch of the template.
TILES = [
    Tile(1, 32),
    Tile(2, 48, split=3),
    Tile(2, 64, split=2),
    Tile(3, 32, split=4),
    Tile(1, 32, blocks_per_sm=2),
    Tile(2, 48, persistent=True),
]
GATED = [Tile(1, 64), Tile(2, 96), Tile(2, 64, persistent=True), Tile(1, 32, blocks_per_sm=2)]
# (op, M, N, K) of Stable Diffusion: what is chosen for them must not spill.
LAYERS = [
    ("linear", 4096, 2560, 320), ("linear", 4096, 320, 1280), ("linear", 1024, 5120, 640),
    ("linear", 1024, 640, 2560), ("linear", 256, 10240, 1280), ("linear", 256, 1280, 5120),
    ("linear", 4096, 320, 320), ("linear", 1024, 640, 640), ("linear", 256, 1280, 1280),
    ("geglu", 4096, 1280, 320), ("geglu", 1024, 2560, 640), ("geglu", 256, 5120, 1280),
]  # fmt: skip
CHOSEN = {
    (op, linear_sm90a.choose_tile(m, n, k, op == "geglu").fitted(-(-k // 64)))
    for op, m, n, k in LAYERS
}
CASES = [("linear", t) for t in TILES] + [("geglu", t) for t in GATED]


def draw(*shape, dtype=torch.bfloat16, scale=1.0, device="cpu"):
    return (scale * torch.randn(shape)).to(device=device, dtype=dtype)


def inputs(op, m, k, n, dtype=torch.bfloat16, device="cpu"):
    """x, weight, bias, and linear's residual."""
    size = {"dtype": dtype, "device": device}
    weight = draw(2 * n if op == "geglu" else n, k, scale=k**-0.5, **size)
    residual = (draw(m, n, **size),) if op == "linear" else ()
    return draw(m, k, **size), weight, draw(weight.shape[0], **size), *residual


def run(op, *args, tile=None):
    return getattr(linear_sm90a, f"{op}_sm90a")(*args, tile=tile)


def in_parity(op, args, tile=None):
    """Hold the kernel with a tile against the float64 reference."""
    truth = getattr(reference, op)(*(t.double() for t in args))
    return parity.judge(run(op, *args, tile=tile), getattr(reference, op)(*args), truth)


@pytest.mark.parametrize(("op", "tile"), [*CASES, *sorted(CHOSEN, key=str)], ids=str)
def test_assembles_without_spills_or_serialised_products(op, tile):
    text = linear_sm90a.program(op, tile.fitted(4), "bf16").text
    assert text.isascii()
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C75" not in report  # ptxas's notes on wgmma that it had to serialise or wait for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "tile"), CASES, ids=str)
def test_emulated(op, tile, dtype):
    """Rows, columns and depth that fill no tile; races are findings, which raise."""
    result = in_parity(op, inputs(op, 197, 264, 88, dtype), tile)
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


def test_a_gate_is_not_split():
    with pytest.raises(ValueError, match="must not split K"):
        run("geglu", *inputs("geglu", 8, 256, 32), tile=Tile(1, 64, split=2))


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
@pytest.mark.parametrize(("op", "tile"), [("linear", Tile(2, 160, split=4)), ("geglu", None)])
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
