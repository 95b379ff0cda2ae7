"""LayerNorm folded into the linear or GEGLU behind it, in the emulator and on a GPU."""

import random

import pytest
import torch
from linear_calls import draw, inputs

from mirage_hello import reference
from mirage_hello.kernels import layer_norm_linear, linear_sm90a, parity
from mirage_hello.kernels.linear_sm90a import Tile

NORMED = [Tile(2, 48, 2, pingpong=True, shared="weight", stages=3), Tile(1, 32, shared="x")]
NORMED += [Tile(1, 32), Tile(2, 48, stages=2), Tile(2, 32, 2, pingpong=True, stages=3)]


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


def test_layer_norm_of_a_row_far_from_zero():
    """|mean| = 1000 std: what x W'^T and mean s leave of each other is still right."""
    x, gamma, beta, weight, bias = normed_inputs("geglu", 70, 128, 16, 0.0, torch.float16)
    x = (1000 + torch.randint(-2, 3, x.shape)).half()
    result = normed_in_parity("geglu", (x, gamma, beta, weight, bias), Tile(1, 32))
    assert result.passed, result


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
