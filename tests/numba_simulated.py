"""Run by test_numba_simulator.py with NUMBA_ENABLE_CUDASIM=1: the CUDA kernels as plain Python."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import config

from mirage_hello import reference
from mirage_hello.kernels.numba import elementwise_cuda
from mirage_hello.kernels.numba.elementwise import stored

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
THREADS = 32  # the simulator makes a thread of the operating system of each


def unary(op, x, target):
    out = torch.empty(x.shape, dtype=target)
    kernel = elementwise_cuda.unary_kernel(op, x.dtype, target)
    kernel[-(-x.numel() // THREADS), THREADS](stored(x).numpy(), stored(out).numpy())
    return out


def close(out, truth):
    bound = ROUNDING[out.dtype] * (truth.abs() + 1e-6)
    return ((out.double() - truth).abs() <= bound).all()


def test_the_simulator_is_on():
    assert config.ENABLE_CUDASIM


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 77])
def test_silu(numel, dtype):
    x = (4 * torch.randn(numel)).to(dtype)
    assert close(unary("silu", x, dtype), F.silu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_extreme_values(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -6e4, 6e4, 0.0, 1e-7]).to(dtype)
    out, expected = unary("silu", x, dtype), F.silu(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.allclose(out.nan_to_num(), expected.nan_to_num(), rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a_each", "b_each"), [(False, False), (True, False), (True, True)])
def test_axpby(a_each, b_each, dtype):
    x, y = (torch.randn(3, 13).to(dtype) for _ in "xy")
    a, b = (torch.randn(3) if each else 0.7 for each in (a_each, b_each))
    out = torch.empty_like(x)
    kernel = elementwise_cuda.axpby_kernel(dtype, a_each, b_each)
    values = (c.numpy() if isinstance(c, torch.Tensor) else np.float32(c) for c in (a, b))
    arrays = [stored(t).numpy() for t in (x, y, out)]
    a_value, b_value = values
    blocks = -(-x.numel() // THREADS)
    kernel[blocks, THREADS](a_value, arrays[0], b_value, arrays[1], arrays[2], 13)
    truth = reference.axpby(a, x.double(), b, y.double())
    assert ((out.double() - truth).abs() <= ROUNDING[dtype] * 8).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_survives_the_model_range(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    x = unary("frame_to_model", levels, dtype)
    assert ((x.double() - (levels.double() / 127.5 - 1)).abs() <= ROUNDING[dtype]).all()
    assert torch.equal(unary("model_to_frame", x, torch.uint8), levels)


def test_model_to_frame_clamps_and_rounds_ties_to_even():
    ties = [(level + 0.5) / 127.5 - 1 for level in (0, 1, 2)]
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 2.0, *ties, 0.9999])
    shown = reference.model_to_frame(x.expand(1, 3, 1, 9))[0, 0, :, 0]
    assert torch.equal(unary("model_to_frame", x, torch.uint8), shown)
