"""The Numba kernels without a GPU: in Numba's CUDA simulator, and their scalar code on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from mirage_hello.kernels import backends
from mirage_hello.kernels.numba import elementwise, scalars

TESTS = Path(__file__).parent
HALVES = [torch.float16, torch.bfloat16]


def test_simulated():
    """The simulator is chosen when numba.cuda is imported, so it takes a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:warnings"]
        + [str(TESTS / "numba_simulated.py")],
        cwd=TESTS,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]


def converted(dtype, values):
    """(decoded, encoded) by the compiled conversions of `dtype`, from uint16 or float32 values."""
    decode, encode = (elementwise.njit(f) for f in scalars.CONVERSIONS[dtype])

    @numba.njit
    def run(bits, floats, encoded):
        for i in range(encoded.size):
            if bits.size:
                floats[i] = decode(bits[i])
            encoded[i] = encode(floats[i])

    if values.dtype == torch.uint16:
        bits, floats = values.numpy(), np.empty(values.numel(), np.float32)
    else:
        bits, floats = np.empty(0, np.uint16), values.numpy()
    encoded = np.empty(values.numel(), np.uint16)
    run(bits, floats, encoded)
    return torch.from_numpy(floats), torch.from_numpy(encoded).view(dtype)


def same(x, y):
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("dtype", HALVES)
def test_all_bit_patterns_convert_both_ways(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    floats, back = converted(dtype, every)
    assert same(floats, every.view(dtype).float())
    assert same(back, every.view(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_to_nearest_even(dtype):
    """Random bits, denormals, and the ties between every two neighbours."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    ties = (every[:-1].double() + every[1:].double()).div(2).float()
    random_bits = torch.randint(-(2**31), 2**31 - 1, (200_000,)).to(torch.int32)
    small = (torch.rand(100_000) * 2 - 1) * 2.0**-13
    floats = torch.cat([ties, random_bits.view(torch.float32), small])
    assert same(converted(dtype, floats)[1], floats.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_launches_on_torchs_current_stream(dtype):
    """A side stream that is busy: a launch on another stream would read the old values."""
    if reason := backends.unavailable("numba", "cuda"):
        pytest.skip(reason)
    x = torch.zeros(1 << 20, device="cuda", dtype=dtype)
    elementwise.silu(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(2)
        out = elementwise.silu(x)
    stream.synchronize()
    assert torch.allclose(out, torch.nn.functional.silu(x), rtol=1e-2)
