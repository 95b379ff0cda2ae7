"""Sums of rows that a linear leaves, what merges them; row_statistics, which reads rows anew."""

import random
import re

import pytest
import torch
from linear_calls import draw, inputs

from mirage_hello import reference
from mirage_hello.kernels import layer_norm_linear, linear_sm90a, parity, row_sums
from mirage_hello.kernels.linear_sm90a import Tile
from mirage_hello.ptx import assembler, loader

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [8, 256, 320, 1280, 4096])
def test_emulated_row_statistics(depth, dtype):
    """-mean rstd and rstd of rows far from zero, the last block of rows not full."""
    x = (3 + draw(5, depth, dtype=torch.float32)).to(dtype)
    truth = x.double()
    rstd = (truth.var(1, unbiased=False) + 1e-5).rsqrt()
    expected = torch.stack([-truth.mean(1) * rstd, rstd], 1)
    got = row_sums.row_statistics(x, 1e-5).double()
    assert torch.allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("chunks", range(1, linear_sm90a.MAX_DEPTH // 256 + 1))
def test_row_statistics_assembles_within_its_budget(chunks, dtype):
    text = loader.program("row_statistics", dtype=dtype, CHUNKS=chunks).text
    assert text.isascii()
    budget = int(re.search(r"// Budget +registers <= (\d+), .*spills 0", text)[1])
    _, report = assembler.ptxas(text, "sm_90a", ("-v",))
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= budget, report
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report


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
