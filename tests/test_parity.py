"""The checker itself: right kernels pass, each deliberately wrong one fails."""

import pytest
import torch
import wrong_kernels

from mirage_hello import reference
from mirage_hello.kernels import Kernel, ops, parity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def as_kernel(op: str, run) -> Kernel:
    return Kernel(op=op, backend="torch", run=run, devices=("cpu", "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", wrong_kernels.ALL, ids=lambda f: f.__name__)
def test_wrong_kernels_fail(wrong, dtype, device):
    x = torch.randn(3, 1000, device=device).to(dtype)
    x[-1, -1] = 1  # silu of a value near 0 may be left out unseen, and rightly
    result = parity.compare("silu", as_kernel("silu", wrong), (x,))
    assert not result.passed, f"{wrong.__name__} passed: {result}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (127,), (3, 1000), (0,), (2, 0, 5)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_reference_passes(shape, dtype, scale, device):
    x = torch.randn(shape, device=device) * scale
    if x.numel() == 1:  # silu(-90) alone is 0 or a subnormal: no other value gives it a scale
        x = x.abs()
    x = x.to(dtype)
    result = parity.compare("silu", as_kernel("silu", reference.silu), (x,))
    assert result.passed, str(result)


def test_short_accumulator_fails(device):
    """The usual sin of a fast convolution: 1152 products summed in bfloat16."""
    x = torch.randn(1, 128, 12, 12, device=device).bfloat16()
    weight = torch.randn(32, 128, 3, 3, device=device).bfloat16()
    kernel = as_kernel("conv2d", wrong_kernels.conv2d_short_accumulator)
    result = parity.compare("conv2d", kernel, (x, weight), {"padding": 1})
    assert not result.passed, str(result)


def test_nonfinite_values_must_stand_where_they_belong():
    x = torch.tensor([1.0, float("inf"), float("nan"), -2.0])
    right = parity.judge(reference.silu(x), reference.silu(x), reference.silu(x.double()))
    assert right.passed
    hidden = torch.nan_to_num(reference.silu(x))
    assert not parity.judge(hidden, reference.silu(x), reference.silu(x.double())).passed


def test_uint8_allows_a_tie_and_nothing_more():
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    plain, truth = reference.model_to_frame(x), reference.model_to_frame(x.double())
    one_tie = plain.clone()
    one_tie.view(-1)[7] ^= 1
    assert parity.judge(one_tie, plain, truth).passed
    assert not parity.judge(plain ^ 1, plain, truth).passed
    two_levels = plain.clone()
    two_levels.view(-1)[7] ^= 2
    assert not parity.judge(two_levels, plain, truth).passed


def test_samples_of_every_op_are_usable(device):
    for op in ops:
        for dtype in DTYPES:
            samples = op.samples(device, dtype)
            assert samples, f"{op.name} has no samples for {dtype}"
            for args, kwargs in samples:
                result = parity.compare(op.name, op.torch_kernel, args, kwargs)
                assert result.passed, f"{op.name} {dtype}: {result}"
