"""What this machine can do at most, measured in the run that is held against it.

copy_gbps       bytes read + bytes written by a large copy, over its time
matrix_tflops   2 n^3 of a large square matrix product on random data, over its time, by dtype
launch_us       one of a chain of dependent one-element kernels in a CUDA graph (on a CPU: one
                one-element operation), the floor of any single launch
"""

from __future__ import annotations

from typing import Any

import torch

from .case import Case
from .harness import QUICK, Effort, measure

MIB = 1 << 20
# 256 MiB read and as many written: 9 times the H200's L2. 64 MiB keeps a CPU run short.
COPY_BYTES = {"cuda": 256 * MIB, "cpu": 64 * MIB}
# 8192^3: 1.1 TFLOP, 1.4 ms on an H200. float32 runs without TF32, so it is 15 times slower there.
MATRIX_SIZE = {
    "cuda": {"bfloat16": 8192, "float16": 8192, "float32": 4096},
    "cpu": {"float32": 512, "bfloat16": 256},
}


def ceilings(device: str, effort: Effort = QUICK) -> dict[str, Any]:
    """Measure the three ceilings.

    Args:
        device: "cuda" or "cpu".
        effort: rounds and length of a sample.

    Returns:
        {"copy_gbps": float, "matrix_tflops": {dtype: float}, "launch_us": float,
         "samples_us": {name: [float]}}
    """
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)
    functions = {"copy": lambda: copy_pass(source, target), "launch": lambda: one.add_(1.0)}
    for dtype, size in MATRIX_SIZE[device].items():
        functions[dtype] = _matrix_product(device, getattr(torch, dtype), size)
    timings = measure(functions, device, effort=effort)
    microseconds = {name: timing.median_us for name, timing in timings.items()}
    return {
        "copy_gbps": 2 * COPY_BYTES[device] / microseconds["copy"] * 1e-3,
        "matrix_tflops": {
            dtype: 2 * size**3 / microseconds[dtype] * 1e-6
            for dtype, size in MATRIX_SIZE[device].items()
        },
        "launch_us": microseconds["launch"],
        "samples_us": {name: timing.samples_us for name, timing in timings.items()},
    }


def copy_pass(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One elementwise pass, source to target: what a kernel that only moves bytes can reach.

    Not copy_: in a CUDA graph it becomes a memcpy node, which ran at 2.7 TB/s on an H200 where
    elementwise kernels ran at 4.2 (both counting bytes read and written).
    """
    return torch.neg(source, out=target)


def _matrix_product(device: str, dtype: torch.dtype, size: int):
    # Random data: a product of zeros draws less power and ran 13 % faster on an H200.
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def bound_us(case: Case, dtype: str, limits: dict[str, Any]) -> float:
    """max(bytes / copy rate, FLOPs / matrix rate): no kernel that reads device memory is faster.

    A dtype without a matrix rate (float64) is held against the float32 one.
    """
    rates = limits["matrix_tflops"]
    in_dtype = getattr(torch, dtype)
    memory_us = case.bytes_moved(in_dtype) / limits["copy_gbps"] * 1e-3
    matrix_us = case.flops_in(in_dtype) / rates.get(dtype, rates["float32"]) * 1e-6
    return max(memory_us, matrix_us)
