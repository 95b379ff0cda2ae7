"""The same kernels on the same inputs, in the emulator and on a GPU.

Kernels made of sums, products and conversions agree bit for bit. Those with ex2, rcp, rsqrt or
tanh.approx, or whose launch depends on the machine (how many blocks share a sum), agree in norm
within one rounding of the output type, 2**-20 in float32 (ex2.approx: 2 units of 2**-23 per term).
The instruction forms of test_ptx_forms.py hold the emulator to recorded answers, one at a time.
"""

import pytest
import torch
from torch import Tensor

from mirage_hello.kernels import ops
from mirage_hello.kernels.parity import ROUNDING

EXACT = {
    "add_noise", "axpby", "ddim_step", "euler_step", "frame_to_model", "guidance",
    "model_to_frame", "residual_add",
}  # fmt: skip
KERNELS = [
    pytest.param(op, kernel, dtype, id=f"{kernel.name}-{str(dtype).split('.')[1]}")
    for op in ops
    for kernel in op.kernels
    if kernel.backend == "ptx"
    for dtype in kernel.dtypes
]


def moved(value, device):
    """Tensors on another device with the strides they have; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def bits(tensor):
    """Raw bits, so that NaN equals NaN and -0 does not equal 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def assert_same(op, emulated, computed, case):
    if op in EXACT:
        assert torch.equal(bits(emulated), bits(computed)), case
        return
    allowed = 2.0**-20 if computed.dtype == torch.float32 else ROUNDING[computed.dtype]
    difference = (emulated.double() - computed.double()).norm()
    assert difference <= allowed * computed.double().norm(), case


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "kernel", "dtype"), KERNELS)
def test_emulator_and_gpu_agree(op, kernel, dtype):
    compare(op, kernel, dtype, torch.device("cuda"))


def compare(op, kernel, dtype, device):
    """Run a kernel on the op's samples on the CPU and on `device`."""
    cases = 0
    for args, kwargs in op.samples(torch.device("cpu"), dtype):
        there = [moved(a, device) for a in args], {k: moved(v, device) for k, v in kwargs.items()}
        if kernel.refuses(op.describe(*there)) is not None:
            continue
        cases += 1
        computed = kernel.run(*there[0], **there[1]).cpu()
        assert_same(op.name, kernel.run(*args, **kwargs), computed, f"{kernel.name} case {cases}")
    assert cases, f"{kernel.name} runs none of the samples of {op.name} in {dtype} on {device}"
