"""Block, vector and cache-hint sweep of silu and axpby on a GPU: parity first, then time.

    python bench/sweeps/elementwise.py [CASE-SUBSTRING]      writes $OUT/sweep-elementwise.json

A case is an op, a dtype and a size of each tensor. Each runs in a process of its own with a time
limit. Compare with kernels/elementwise.py: cut.
"""

import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import ops, parity
from mirage_hello.kernels.elementwise import SUFFIX, axpby_with, silu_with
from mirage_hello.ptx import loader

LIMIT_S = 90
KIB = 1024
SIZES = (KIB, 64 * KIB, KIB**2, 16 * KIB**2, 64 * KIB**2, 256 * KIB**2, KIB**3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THREADS = (128, 256, 512, 1024)
VECS = (1, 2, 4)
HINTS_FROM = 64 * KIB**2  # below, everything stays in the L2
HINTS = (
    ("", ""),
    (".nc", ""),
    ("", ".cs"),
    (".cs", ".cs"),
    (".nc.L1::no_allocate", ".L1::no_allocate"),
    (".L1::no_allocate.L2::256B", ""),
)
A, B = 0.7, -1.3


def case_names() -> list[str]:
    every = itertools.product(("silu", "axpby"), DTYPES, SIZES)
    return [f"{op} {dtype} {size // KIB} KiB" for op, dtype, size in every]


def variants(size_bytes: int) -> list[tuple[int, int, str, str]]:
    """(threads, vectors, load hint, store hint)."""
    plain = [(t, v, "", "") for t in THREADS for v in VECS]
    if size_bytes < HINTS_FROM:
        return plain
    hinted = [(t, v, *h) for t in (128, 256, 512) for v in (1, 2) for h in HINTS[1:]]
    return plain + hinted


def program(op: str, dtype: torch.dtype, variant: tuple[int, int, str, str]) -> loader.Program:
    variables = dict(zip(("THREADS", "VECS", "LOAD", "STORE"), variant, strict=True))
    return loader.program(op, dtype=SUFFIX[dtype], OVERLAP=True, **variables)


def kernel(op: str, variant: tuple[int, int, str, str]) -> Callable[..., Tensor]:
    make = silu_with if op == "silu" else axpby_with
    return make(lambda x, threads, vecs: program(op, x.dtype, variant), lambda x: variant[:2])


def run_case(name: str) -> dict:
    op, dtype_name, kib, _ = name.split()
    dtype, size_bytes = DTYPES[dtype_name], int(kib) * KIB
    n = size_bytes // dtype.itemsize
    x, y = (torch.randn(n, device="cuda", dtype=dtype) for _ in range(2))
    args = (x,) if op == "silu" else (A, x, B, y)
    moved = (2 if op == "silu" else 3) * size_bytes
    peers: dict[str, Callable[[], Tensor]] = {"copy": lambda: x.clone()}
    if op == "silu":
        peers["torch"] = lambda: torch.nn.functional.silu(x)
    else:
        peers["torch"] = lambda: torch.add(x, y, alpha=B)

    head = min(n, 2**20)
    small = tuple(a[-head:] if isinstance(a, Tensor) else a for a in args)
    truth = getattr(ops, op).reference(*parity.in_float64(small))
    plain = getattr(ops, op).torch_kernel.run(*small)
    tried = {str(v): kernel(op, v) for v in variants(size_bytes)}
    with ThreadPoolExecutor(8) as pool:
        arch = loader.device_arch(0)
        list(pool.map(lambda v: program(op, dtype, v).compile(arch), variants(size_bytes)))
    wrong, good = {}, {}
    for key, run in tried.items():
        out = run(*args)
        result = parity.judge(out[-head:], plain, truth)
        if result.passed and torch.isfinite(out).all():
            good[key] = lambda run=run: run(*args)
        else:
            wrong[key] = str(result)
            print(f"{name} {key} WRONG {result}", flush=True)
    effort = harness.Effort(rounds=8, sample_us=800.0)
    timed = harness.measure({**peers, **good}, "cuda", effort=effort)
    medians = {key: t.median_us for key, t in timed.items()}
    print(f"{name}: torch {medians['torch']:.2f} us, copy {medians['copy']:.2f} us", flush=True)
    for us, key in sorted((us, key) for key, us in medians.items() if key not in peers)[:6]:
        gbps, ratio = moved / us / 1e3, medians["torch"] / us
        print(f"   {us:9.2f} us  {gbps:6.0f} GB/s  {ratio:.3f} x torch  {key}", flush=True)
    return {"case": name, "bytes_moved": moved, "time_us": medians, "wrong": wrong}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "elementwise", case_names(), run_case, LIMIT_S))
