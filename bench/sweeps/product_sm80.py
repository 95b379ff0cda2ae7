"""The sm_80 products on a GPU, in CUDA C++ and PTX, beside cuDNN and cuBLAS; the CUDA ladder.

python bench/sweeps/product_sm80.py [CASE-SUBSTRING]      writes $OUT/sweep-product_sm80.json

Parity first, of every tile and every step of the ladder. On Hopper mma.sync reaches about 62 % of
what wgmma, which the libraries use there, can do.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mirage_hello.bench import conv2d, harness, linear, peers
from mirage_hello.bench.case import Case
from mirage_hello.bench.rows import Options, prepare
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import product_sm80 as product
from mirage_hello.kernels.product_sm80 import Tile

LIMIT_S = 60
EFFORT = harness.Effort(rounds=8, sample_us=500.0)
WITH = {
    "conv2d": product.conv2d_with,
    "linear": product.linear_with,
    "geglu": product.geglu_with,
}
CONV2D = ("320->320 @64", "960->320 @64", "640->640 @32", "1280->1280 @16", "512->512 @128")
GROUPS = {
    "conv2d": [case for case in conv2d.CASES if case.name in CONV2D],
    "linear": [case for case in linear.CASES if case.op == "linear" and "+" not in case.name],
    "geglu": [case for case in linear.CASES if case.op == "geglu"],
}
# Steps of kernels/cuda/product.cu: what each brought on top of the one above it
LADDER: dict[str, tuple[int, dict[str, int]]] = {
    "one tile of x and weight at a time, rows as they are": (
        64,
        {"SWIZZLE": 0, "ASYNC": 0, "RING": 2},
    ),
    "swizzled rows": (64, {"ASYNC": 0, "RING": 2}),
    "cp.async, one load ahead": (64, {"RING": 2}),
    "a ring of 4 stages": (64, {}),
    "128 x 128 in 64 x 64 a warp": (128, {}),
}
LADDER_CASES = {"conv2d": ("320->320 @64", "512->512 @128"), "linear": ("4096x320x2560",)}


def run_case(name: str) -> dict:
    """All cases of a group; of "ladder", every step on its cases."""
    if name == "ladder":
        found = [
            compared(case, {step: laddered(*LADDER[step]) for step in LADDER})
            for group, names in LADDER_CASES.items()
            for case in GROUPS[group]
            if case.name in names
        ]
        return {"case": name, "rows": found}
    ways = {
        f"{source.__name__.removesuffix('_source')} 128x{tile.block_n}": (source, tile)
        for source in (product.ptx_source, product.cuda_source)
        for tile in product.TILES
    }
    return {"case": name, "rows": [compared(case, ways) for case in GROUPS[name]]}


def laddered(block_n: int, switches: dict[str, int]) -> tuple[product.Source, Tile]:
    return functools.partial(product.cuda_source, switches=switches), Tile(block_n)


def compared(case: Case, ways: Mapping[str, tuple[product.Source, Tile]]) -> dict:
    """Parity and hot time of each way and of torch's library."""
    subject = prepare(case, "bfloat16", Options(device="cuda"))
    contenders: dict[str, Callable[[], Tensor]]
    contenders = {"library": functools.partial(peers.EAGER[case.op], *subject.args)}
    wrong = {}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda way: compiled(case.op, *way), ways.values()))
    for name, (source, tile) in ways.items():
        run = functools.partial(WITH[case.op](source), *subject.args, tile=tile)
        parity = subject.judge(run())
        if parity.passed:
            contenders[name] = run
        else:
            wrong[name] = str(parity)
            print(f"WRONG {case.op} {case.name} {name}: {parity}", flush=True)
    timed = harness.measure(contenders, "cuda", effort=EFFORT)
    times = {name: timing.median_us for name, timing in timed.items()}
    print(f"{case.op} {case.name}", flush=True)
    for name, us in times.items():
        rate, ratio = case.flops / us * 1e-6, times["library"] / us
        print(f"  {us:8.2f} us {rate:4.0f} TFLOP/s {ratio:.2f} x library  {name}", flush=True)
    return {"op": case.op, "case": case.name, "us": times, "flops": case.flops, "wrong": wrong}


def compiled(op: str, source: product.Source, tile: Tile) -> bytes:
    return source(torch.bfloat16, op == "geglu", tile)[0].compile("sm_90a")


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "product_sm80", [*GROUPS, "ladder"], run_case, LIMIT_S))
