"""linear.sm90a and its variants: what ptxas says, and the PTX in the emulator and on a GPU."""

import random

import pytest
import torch

from mirage_hello import reference
from mirage_hello.kernels import (
    BackendError,
    layer_norm_linear,
    linear_fp8,
    linear_sm90a,
    linear_tile,
    ops,
    parity,
    row_sums,
    use,
)
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
NORMED = [Tile(2, 48, 2, pingpong=True, shared="weight", stages=3), Tile(1, 32, shared="x")]
NORMED += [Tile(1, 32), Tile(2, 48, stages=2), Tile(2, 32, 2, pingpong=True, stages=3)]
# (op, M, N, K) of Stable Diffusion: what is chosen for them must not spill.
LAYERS = [
    ("linear", 4096, 2560, 320), ("linear", 4096, 320, 1280), ("linear", 1024, 5120, 640),
    ("linear", 1024, 640, 2560), ("linear", 256, 10240, 1280), ("linear", 256, 1280, 5120),
    ("linear", 4096, 320, 320), ("linear", 1024, 640, 640), ("linear", 256, 1280, 1280),
    ("geglu", 4096, 1280, 320), ("geglu", 1024, 2560, 640), ("geglu", 256, 5120, 1280),
    ("linear", 4096, 960, 320), ("linear", 1024, 1920, 640), ("linear", 256, 3840, 1280),
]  # fmt: skip
CASES = [("linear", t) for t in TILES] + [("geglu", t) for t in GATED]


@pytest.fixture
def two_multiprocessors(monkeypatch):
    """Blocks take several tiles each, so that the ring and the turns go round."""
    monkeypatch.setattr(linear_tile, "MULTIPROCESSORS", 2)


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


def normed_inputs(op, m, k, n, mean, dtype=torch.bfloat16, device="cpu"):
    """x, gamma, beta, weight, bias, and linear's residual."""
    size = {"dtype": dtype, "device": device}
    x, weight, bias, *residual = inputs(op, m, k, n, **size)
    return x + mean, 1 + draw(k, scale=0.2, **size), draw(k, **size), weight, bias, *residual


def normed_in_parity(op, args, tile=None):
    def unfused(x, gamma, beta, *rest):
        return getattr(reference, op)(reference.layer_norm(x, gamma, beta), *rest)

    x, gamma, beta, weight, bias, *residual = args
    folded = layer_norm_linear.fold(gamma, beta, weight, bias)
    run = getattr(layer_norm_linear, f"layer_norm_{op}")
    out = run(x, folded, *residual, tile=tile)
    return parity.judge(out, unfused(*args), unfused(*(t.double() for t in args)))


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("tile", NORMED, ids=str)
@pytest.mark.parametrize("op", ["linear", "geglu"])
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_layer_norm(op, tile, mean):
    result = normed_in_parity(op, normed_inputs(op, 300, 328, 72, mean), tile)
    assert result.passed, result


SUMMED = [Tile(1, 32), Tile(2, 48, split=3), Tile(2, 160, stages=2), Tile(1, 32, 2)]
SUMMED += [Tile(2, 48, 2, pingpong=True, shared="weight", stages=3), Tile(1, 32, shared="x")]


def summed(tile, m=150, n=176, k=200, dtype=torch.bfloat16, mean=0.0, device="cpu"):
    """A linear with a residual, its output, and the sums that it left."""
    x, weight, bias, residual = inputs("linear", m, k, n, dtype, device)
    residual = (residual + mean).to(dtype)
    return linear_sm90a.linear_summed(x, weight, bias, residual, tile)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("tile", SUMMED, ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_row_sums(tile, mean):
    """Mean and M2 of what was stored, a tile's columns each, the last of them ragged."""
    out, sums = summed(tile, mean=mean)
    pieces = out.double().split(sums.width, 1)
    for part, piece in enumerate(pieces):
        centre, m2 = piece.mean(1), piece.var(1, unbiased=False) * piece.shape[1]
        got = sums.values[:, part].double()
        assert torch.allclose(got[:, 0], centre, rtol=1e-6, atol=1e-5)
        assert torch.allclose(got[:, 1], m2, rtol=2e-5, atol=1e-6)
    assert sums.values.shape[1] == len(pieces)


@pytest.mark.parametrize("op", ["linear", "geglu"])
@pytest.mark.parametrize("tile", SUMMED[1:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_layer_norm_of_sums(op, tile, dtype):
    """The linear behind it merges the sums: as good as torch on the same rows."""
    x, sums = summed(tile, n=176, dtype=dtype, mean=3.0)
    weight = draw(2 * 48 if op == "geglu" else 48, 176, scale=176**-0.5, dtype=dtype)
    gamma, beta, bias = (
        draw(176, dtype=dtype),
        draw(176, dtype=dtype),
        draw(len(weight), dtype=dtype),
    )
    folded = layer_norm_linear.fold(gamma, beta, weight, bias)
    truth = getattr(reference, op)(
        reference.layer_norm(x.double(), gamma.double(), beta.double()), weight.double(),
        bias.double(),
    )  # fmt: skip
    plain = getattr(reference, op)(reference.layer_norm(x, gamma, beta), weight, bias)
    run_normed = getattr(layer_norm_linear, f"layer_norm_{op}")
    for out in (run_normed(x, folded, sums=sums), run_normed(x, folded)):
        result = parity.judge(out, plain, truth)
        assert result.passed, str(result)


def test_sums_of_other_rows_are_refused():
    x, sums = summed(Tile(1, 32), m=8)
    folded = layer_norm_linear.fold(None, None, draw(48, 176))
    with pytest.raises(ValueError, match="sums of 32 columns must be contiguous float32"):
        layer_norm_linear.layer_norm_linear(x[:4].contiguous(), folded, sums=sums)


def test_sums_that_are_a_view_are_refused():
    x, sums = summed(Tile(1, 32), m=8)
    strided = row_sums.RowSums(sums.values.mT.contiguous().mT, sums.width)
    folded = layer_norm_linear.fold(None, None, draw(48, 176))
    with pytest.raises(ValueError, match="must be contiguous float32"):
        layer_norm_linear.layer_norm_linear(x, folded, sums=strided)


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


@pytest.mark.parametrize("tile", [None, Tile(2, 160, 2, pingpong=True), Tile(1, 64)])
def test_emulated_layer_norm_geglu_to_e4m3(tile):
    """Values that e4m3 holds are those of the bfloat16 output; what is too large saturates."""
    x, gamma, beta, weight, bias = normed_inputs("geglu", 150, 128, 112, 0.0)
    folded = layer_norm_linear.fold(gamma, beta, weight, bias)
    wide = layer_norm_linear.layer_norm_geglu(x.half(), folded_half(folded), tile=tile).float()
    for scale in (wide.abs().max().item() / 448, wide.abs().max().item() / 4480):
        out = layer_norm_linear.layer_norm_geglu(x, folded, tile=tile, out_scale=scale)
        expected = (wide / scale).clamp(-448, 448)
        assert out.dtype == torch.float8_e4m3fn
        assert ((out.float() - expected).norm() / expected.norm()) < 0.04


def folded_half(folded):
    return layer_norm_linear.FoldedLinear(folded.weight.half(), folded.columns)


def test_layer_norm_of_a_row_far_from_zero():
    """|mean| = 1000 std: what x W'^T and mean s leave of each other is still right."""
    x, gamma, beta, weight, bias = normed_inputs("geglu", 70, 128, 16, 0.0, torch.float16)
    x = (1000 + torch.randint(-2, 3, x.shape)).half()
    result = normed_in_parity("geglu", (x, gamma, beta, weight, bias), Tile(1, 32))
    assert result.passed, result


def test_torch_form_of_layer_norm_linear():
    x, gamma, beta, weight, bias, residual = (
        t.double() for t in normed_inputs("linear", 9, 64, 24, 1.0)
    )
    folded = layer_norm_linear.fold(gamma, beta, weight, bias)
    out = layer_norm_linear.layer_norm_linear_torch(x, folded, residual)
    truth = reference.linear(reference.layer_norm(x, gamma, beta), weight, bias, residual)
    assert torch.allclose(out, truth, rtol=1e-5, atol=1e-5)  # columns are float32


def test_layer_norm_refuses_a_ragged_row():
    folded = layer_norm_linear.fold(None, None, draw(16, 76))
    with pytest.raises(ValueError, match=r"K of 8 and that of x \(got x \(4, 76\)"):
        layer_norm_linear.layer_norm_linear(draw(4, 76), folded)


@pytest.mark.parametrize("tile", [Tile(1, 32), Tile(2, 48, split=3), Tile(2, 32, pingpong=True)])
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_fp8(tile):
    """Against float64 on the quantised values, and against the exact product."""
    x, weight, bias, residual = inputs("linear", 200, 528, 72)
    packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
    out = linear_fp8.linear_fp8(x, packed, residual, tile=tile).double()
    quantised = linear_fp8.linear_fp8_torch(x.double(), packed, residual)
    exact = reference.linear(*(t.double() for t in (x, weight, bias, residual)))
    assert (out - quantised).norm() < 3e-3 * quantised.norm()
    assert (out - exact).norm() < 6e-2 * exact.norm()


def test_fp8_calibration_reaches_the_largest_value():
    samples = [draw(5, 16), 3 * draw(7, 16)]
    scale = linear_fp8.calibrate(samples)
    assert max(linear_fp8.quantize(s, scale).float().abs().max() for s in samples) == 448
    assert linear_fp8.calibrate([torch.zeros(3)]) == 1.0


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
@pytest.mark.parametrize("op", ["linear", "geglu"])
def test_random_layer_norm_on_the_gpu(op, seed):
    dice = random.Random(seed)
    for _ in range(20):
        m, k, n = dice.randint(1, 5000), 64 * dice.randint(1, 24), 8 * dice.randint(1, 200)
        mean, dtype = dice.choice([0.0, 30.0]), dice.choice([torch.bfloat16, torch.float16])
        args = normed_inputs(op, m, k, n, mean, dtype, "cuda")
        for tile in (None, dice.choice(linear_sm90a.candidates(k // 64, op == "geglu", True))):
            result = normed_in_parity(op, args, tile)
            assert result.passed, (m, k, n, mean, tile, str(result))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear", "geglu"])
def test_random_row_sums_on_the_gpu(op, seed):
    """A linear that leaves sums and one that merges them: random sizes and means, chosen tiles."""
    rng = random.Random(seed)
    for _ in range(8):
        m, n, k = rng.randint(1, 700), 8 * rng.randint(1, 160), 8 * rng.randint(1, 80)
        mean, width = rng.choice((0.0, 5.0, 30.0)), 16 * rng.randint(1, 40)
        x, sums = summed(None, m, n, k, mean=mean, device="cuda")
        weight = draw(2 * width if op == "geglu" else width, n, scale=n**-0.5, device="cuda")
        bias = draw(len(weight), device="cuda")
        folded = layer_norm_linear.fold(None, None, weight, bias)
        call = getattr(layer_norm_linear, f"layer_norm_{op}")
        normed = reference.layer_norm(x.double(), None, None)
        truth = getattr(reference, op)(normed, weight.double(), bias.double())
        plain = getattr(reference, op)(reference.layer_norm(x, None, None), weight, bias)
        result = parity.judge(call(x, folded, sums=sums), plain, truth)
        assert result.passed, (m, n, k, mean, width, str(result))


@pytest.mark.gpu
def test_random_fp8_on_the_gpu(seed):
    dice = random.Random(seed)
    for _ in range(20):
        m, k, n = dice.randint(1, 5000), 16 * dice.randint(1, 300), 8 * dice.randint(1, 200)
        x, weight, bias, residual = inputs("linear", m, k, n, device="cuda")
        packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
        out = linear_fp8.linear_fp8(x, packed, residual).double()
        truth = linear_fp8.linear_fp8_torch(x.double(), packed, residual)
        assert (out - truth).norm() < 4e-3 * truth.norm(), (m, k, n)


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
