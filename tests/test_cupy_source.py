"""The CUDA C++ of the CuPy backend: compiled by NVRTC, without CUDA's headers and without a GPU."""

import pytest
import torch
from cuda.core import Program, ProgramOptions

from mirage_hello.kernels.cupy import elementwise

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(d, d) for d in FLOATS] + [(torch.uint8, d) for d in FLOATS]
PAIRS += [(d, torch.uint8) for d in FLOATS]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_compiles(source, target, arch):
    macros = [option[2:] for option in elementwise.options(source, target) if option[:2] == "-D"]
    options = ProgramOptions(arch=arch, std="c++17", define_macro=macros)
    program = Program(elementwise.SOURCE, "c++", options)
    assert len(program.compile("cubin").code) > 1000


@pytest.mark.gpu
def test_launches_on_torchs_current_stream():
    """A side stream that is busy: a launch on another stream would read the old values."""
    x = torch.zeros(1 << 20, device="cuda")
    elementwise.silu(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(2)
        out = elementwise.silu(x)
    stream.synchronize()
    assert torch.allclose(out, torch.nn.functional.silu(x))
