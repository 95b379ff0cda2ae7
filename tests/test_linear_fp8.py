"""linear in e4m3 behind a layer_norm: copies of rows, gates and softmaxes, in the emulator."""

import random

import pytest
import torch
from linear_calls import draw, inputs

from mirage_hello import reference
from mirage_hello.kernels import (
    layer_norm_linear,
    linear_fp8,
    linear_launch,
    linear_sm90a,
    linear_tile,
    prompt_attention,
)
from mirage_hello.kernels.linear_sm90a import Tile
from mirage_hello.ptx import assembler

E4M3 = torch.float8_e4m3fn
# M, K, N of the 880m at 512x512, batch 1: proj_in or heads, q k v, gate, scores, values
NORMED = [Tile(2, 48, 2, pingpong=True, shared="weight", stages=3), Tile(1, 32, shared="x")]
NORMED += [Tile(1, 32), Tile(2, 48, stages=2), Tile(2, 32, 2, pingpong=True, stages=3)]
FORMS = ("copied", "normed", "gated", "softmax")
SIZES = [(4096, 320), (1024, 640), (256, 1280), (64, 1280)]


@pytest.fixture
def two_multiprocessors(monkeypatch):
    monkeypatch.setattr(linear_tile, "MULTIPROCESSORS", 2)


def rows_of(m, n, k=96, mean=1.0, tile=None):
    """A linear in e4m3 with a residual: its rows, their sums and their copy; and what they are."""
    x, weight, bias, residual = inputs("linear", m, k, n)
    residual = (residual + mean).bfloat16()
    packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
    q = linear_fp8.quantize(x, packed.x_scale)
    scale = 4.0 / 448 * (1 + abs(mean))
    rows, sums = linear_fp8.linear_fp8_summed(q, packed, residual, scale, tile)
    return rows, sums, scale, linear_fp8.linear_fp8_torch(q, packed, residual)


def layer(n, k):
    weight, bias = draw(n, k, scale=k**-0.5), draw(n)
    gamma, beta = 1 + draw(k, scale=0.2), draw(k)
    return layer_norm_linear.fold(gamma, beta, weight, bias), (gamma, beta, weight, bias)


@pytest.mark.parametrize(
    "tile",
    [
        None,
        Tile(1, 32),
        Tile(2, 48, split=3),
        Tile(2, 160, stages=2),
        Tile(2, 48, 2, pingpong=True, shared="weight", stages=3),
    ],
    ids=str,
)
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_copies(tile):
    """The copy is the output's own rounding to e4m3; what is too large saturates."""
    rows, sums, scale, exact = rows_of(150, 264, 528, tile=tile)
    assert (rows.double() - exact.double()).norm() < 3e-3 * exact.double().norm()
    assert torch.equal(sums.copy.float(), linear_fp8.quantize(rows, scale).float())
    x, weight, bias, residual = inputs("linear", 150, 200, 264)
    wide, left = linear_sm90a.linear_summed(x, weight, bias, residual, copy_scale=1e-3)
    plain, plain_left = linear_sm90a.linear_summed(x, weight, bias, residual)
    assert torch.equal(wide, plain) and torch.equal(left.values, plain_left.values)
    assert torch.equal(left.copy.float(), linear_fp8.quantize(plain, 1e-3).float())
    assert left.copy.float().abs().max() == 448


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("tile", [None, *NORMED], ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_layer_norm_in_e4m3(tile, mean):
    rows, sums, scale, _ = rows_of(150, 176, mean=mean)
    folded, (gamma, beta, weight, bias) = layer(72, 176)
    eight = linear_fp8.fold(folded, scale)
    out = linear_fp8.layer_norm_linear_fp8(sums, eight, tile=tile).double()
    truth = linear_fp8.layer_norm_linear_fp8_torch(rows, sums.copy, eight)
    assert (out - truth).norm() < 3e-3 * truth.norm()
    normed = reference.layer_norm(rows.double(), gamma.double(), beta.double())
    exact = reference.linear(normed, weight.double(), bias.double())
    assert (out - exact).norm() < 0.06 * (1 + mean) * exact.norm()


@pytest.mark.parametrize("tile", [None, Tile(2, 160, 2, pingpong=True), Tile(1, 64)], ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_gate_in_e4m3(tile):
    rows, sums, scale, _ = rows_of(150, 176)
    eight = linear_fp8.fold(layer(2 * 48, 176)[0], scale)
    wide = linear_fp8.layer_norm_linear_fp8_torch(rows, sums.copy, eight)
    h, gate = wide.chunk(2, -1)
    truth = h * torch.nn.functional.gelu(gate)
    for unit in (truth.abs().max().item() / 448, truth.abs().max().item() / 4480):
        out = linear_fp8.layer_norm_geglu_fp8(sums, eight, unit, tile=tile)
        expected = (truth / unit).clamp(-448, 448)
        assert out.dtype == E4M3
        assert (out.double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("tile", [None, Tile(1, 80), Tile(2, 160, pingpong=True)], ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_emulated_softmax_in_e4m3(tile):
    """Scores of a prompt in e4m3, probabilities in units of 1 / 448, then their values."""
    rows, sums, scale, _ = rows_of(150, 96)
    x, to_q, to_out = (draw(96), draw(96, 96, scale=0.1), draw(96, 96))
    prompt = prompt_attention.fold(x, draw(96), to_q, draw(77, 192), to_out, heads=2)
    eight = prompt_attention.quantise(prompt, scale, None)
    p = prompt_attention.probabilities_fp8(sums, eight, tile=tile)
    scores = linear_fp8.layer_norm_linear_fp8_torch(rows, sums.copy, eight.scores)
    truth = torch.softmax(scores.unflatten(-1, (2, 80)) * 0.6931471805599453, -1).flatten(-2)
    assert p.dtype == E4M3
    assert (p.double() / 448 - truth).norm() < 0.03 * truth.norm()
    assert not p.unflatten(-1, (2, 80))[..., 77:].float().any()
    out = linear_fp8.linear_fp8(p, eight.values, rows).double()
    exact = rows.double() + truth @ prompt.values.double().T
    assert (out - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("m", "c"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_chosen_tile_assembles_without_spills(form, m, c):
    """What the 880m asks in e4m3."""
    blocks, merging = c // 128 + (c % 128 > 0), {}
    op, options, n = "linear", {}, c
    if form == "copied":
        options = {"residual": True, "summed": True, "copied": True}
        tile = linear_sm90a.choose_tile(op, m, n, blocks, fp8=True)
    else:
        values = torch.empty(m, -(-c // 80), 2)
        merging = linear_sm90a.RowSums(values, 80).variables(c)
        op, n = {"normed": ("linear", 3 * c), "gated": ("geglu", 4 * c)}.get(form, (op, 640))
        options = {"norm": True, "quantised": form != "normed"}
    if form == "softmax":
        tile = linear_sm90a.choose_softmax_tile(m, n, blocks, 80, True, True)
        options["softmax"] = 80
    elif form != "copied":
        tile = linear_sm90a.choose_tile(op, m, n, blocks, True, True, form == "gated")
    tiles, _ = tile.tiles(m, n, op == "geglu")
    loads = tile.loads(tiles, blocks)
    fitted = tile.fitted(loads, op == "geglu", True, options.get("residual", False))
    text = linear_launch.program(op, fitted, "e4m3", **options, **merging).text
    report = assembler.ptxas(text, "sm_90a", ("-v",))[1]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C75" not in report


def test_refusals():
    rows, sums, scale, _ = rows_of(8, 96)
    eight = linear_fp8.fold(layer(48, 96)[0], scale)
    bare = linear_sm90a.RowSums(sums.values, sums.width)
    with pytest.raises(ValueError, match="give their linear a copy_scale"):
        linear_fp8.layer_norm_linear_fp8(bare, eight)
    given = (sums.copy, eight.weight, eight.columns, None, 1e-5)
    with pytest.raises(ValueError, match="sums of it and a factor go together"):
        linear_sm90a.normed("linear", *given, sums=sums)
    with pytest.raises(ValueError, match="sums of it and a factor go together"):
        linear_sm90a.normed("linear", *given, factor=eight.factor)
    with pytest.raises(ValueError, match="copy_scale must be above 0"):
        linear_sm90a.linear_summed(rows, draw(16, 96), copy_scale=0.0)
    with pytest.raises(ValueError, match="x_scale must be above 0"):
        linear_fp8.fold(layer(48, 96)[0], 0.0)


@pytest.mark.gpu
def test_random_rows_on_the_gpu(seed):
    """A linear that copies its rows, then linear, gate and softmax of the copies: random sizes."""
    dice = random.Random(seed)
    for _ in range(8):
        m, c, n = dice.randint(1, 5000), 16 * dice.randint(2, 80), 16 * dice.randint(1, 120)
        x, weight, bias, residual = inputs("linear", m, c, c, device="cuda")
        scale = 6 / 448
        rows, sums = linear_sm90a.linear_summed(x, weight, bias, residual, copy_scale=scale)
        assert torch.equal(sums.copy.float(), linear_fp8.quantize(rows, scale).float())
        folded = layer_norm_linear.fold(None, None, draw(2 * n, c, scale=c**-0.5, device="cuda"))
        eight = linear_fp8.fold(folded, scale)
        truth = linear_fp8.layer_norm_linear_fp8_torch(rows, sums.copy, eight)
        out = linear_fp8.layer_norm_linear_fp8(sums, eight).double()
        assert (out - truth).norm() < 4e-3 * truth.norm(), (m, c, n)
        h, gate = truth.chunk(2, -1)
        truth = h * torch.nn.functional.gelu(gate)
        unit = truth.abs().max().item() / 448
        out = linear_fp8.layer_norm_geglu_fp8(sums, eight, unit).double() * unit
        assert (out - truth).norm() < 0.03 * truth.norm(), (m, c, n)
