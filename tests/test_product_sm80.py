"""The sm_80 product in CUDA C++ (what NVRTC makes of it) and in PTX, run by the emulator.

On a GPU, test_conv2d.py and test_linear.py hold every registered kernel against the reference.
"""

import pytest
import torch

from mirage_hello import reference
from mirage_hello.kernels import parity, product_sm80
from mirage_hello.ptx import assembler, emulator, loader

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC compiles the CUDA sources")
SOURCES = [product_sm80.cuda_source, product_sm80.ptx_source]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """CPU tensors run NVRTC's PTX in the emulator, which finds races in the ring of stages too."""

    def parsed(self):
        return emulator.parse(self.ptx("sm_80"), name=self.name)

    monkeypatch.setattr(loader.Program, "parsed", property(parsed))


def draw(*shape, dtype, scale=1.0):
    values = (scale * torch.randn(shape)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def judge(run, truth, *args):
    doubled = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    return parity.judge(run(*args), truth(*args), truth(*doubled))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("gated", [False, True])
def test_assembles_without_spills(gated, arch):
    program, _ = product_sm80.ptx_source(torch.bfloat16, gated)
    report = assembler.ptxas(program.text, arch, ("-v",))[1]
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(report.split(" registers")[0].split()[-1])
    assert registers <= 168, report


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "c", "h", "w", "o", "window", "stride"),
    [(2, 40, 7, 5, 72, 3, 1), (1, 72, 9, 9, 24, 3, 2), (1, 8, 4, 4, 8, 1, 1)],
)
def test_conv2d(b, c, h, w, o, window, stride, dtype, source):
    """C, O and pixels that fill no tile; everything in the epilogue."""
    pad = window // 2
    p, q = ((n + 2 * pad - window) // stride + 1 for n in (h, w))
    x, weight = draw(b, c, h, w, dtype=dtype), draw(o, c, window, window, dtype=dtype, scale=0.06)
    rest = draw(b, o, dtype=dtype), draw(b, o, p, q, dtype=dtype)
    args = (x, weight, draw(o, dtype=dtype), stride, pad, *rest)
    result = judge(product_sm80.conv2d_with(source), reference.conv2d, *args)
    assert result.passed, result


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(150, 72, 80), (1, 8, 8)])
def test_linear_and_geglu(m, k, n, dtype, source):
    x, weight = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5)
    bias, residual = draw(n, dtype=dtype), draw(m, n, dtype=dtype)
    result = judge(product_sm80.linear_with(source), reference.linear, x, weight, bias, residual)
    assert result.passed, result
    gated = draw(2 * n, k, dtype=dtype, scale=k**-0.5), draw(2 * n, dtype=dtype)
    result = judge(product_sm80.geglu_with(source), reference.geglu, x, *gated)
    assert result.passed, result
