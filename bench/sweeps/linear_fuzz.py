"""Random calls of linear.sm90a and its variants against float64, on a GPU.

    python bench/sweeps/linear_fuzz.py [CASES [SECONDS [SEED]]]    5000 cases, at most 60 s

A few tiles of each variant, many sizes: 1 to 2000 rows, N and K that are no multiples of the tile,
with and without bias and residual, means up to 30 deviations. Writes $OUT/linear-fuzz.json.
"""

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mirage_hello import reference
from mirage_hello.bench.sweeps import fuzz
from mirage_hello.kernels import layer_norm_linear as folding
from mirage_hello.kernels import linear_fp8, linear_sm90a, parity
from mirage_hello.kernels.linear_sm90a import Tile

TILES = [
    Tile(1, 32), Tile(2, 48, split=3), Tile(1, 64, split=8), Tile(2, 160), Tile(1, 40, 2),
    Tile(2, 96, 2, pingpong=True), Tile(2, 128, pingpong=True), Tile(1, 64, shared="weight"),
    Tile(2, 48, shared="x"), Tile(2, 48, 2, pingpong=True, shared="weight"),
]  # fmt: skip
UNSPLIT = [t for t in TILES if t.split == 1 and t.block_n % 32 == 0]
VARIANTS = {
    "linear": TILES,
    "geglu": UNSPLIT,
    "layer_norm linear": [t for t in TILES if t.m_tiles * t.block_n <= 192],
    "layer_norm geglu": [t for t in UNSPLIT if t.m_tiles * t.block_n <= 192],
    "e4m3": TILES,
}
Kind = tuple[str, Tile]
KINDS: list[Kind] = [(name, tile) for name, tiles in VARIANTS.items() for tile in tiles]
STAGES = 3  # the same for every K, so that a tile is one program
DTYPES = (torch.bfloat16, torch.float16)
FP8_ERROR = 0.004  # against the products of the rounded inputs: bfloat16's rounding and 14 bits
randn = partial(torch.randn, device=fuzz.DEVICE)


def check(rng: random.Random, kind: Kind) -> tuple[str, str] | None:
    """A call of a kind, and what is wrong with it; None where nothing is."""
    name, tile = kind[0], replace(kind[1], stages=STAGES)
    dtype, gated = rng.choice(DTYPES), name.endswith("geglu")
    per_block = 128 if name == "e4m3" else 64
    m = rng.choice((rng.randint(1, 300), rng.randint(1, 2000)))
    n = 8 * rng.randint(1, 80)
    step, fewest = (16 if name == "e4m3" else 8), per_block * (tile.split - 1) + 1
    k = step * rng.randint(-(-fewest // step), max(160, fewest // step + 40))
    mean = rng.choice((0.0, 0.0, 30.0)) if name.startswith("layer_norm") else 0.0
    x = (randn(m, k) + mean).to(dtype)
    weight = (k**-0.5 * randn(2 * n if gated else n, k)).to(dtype)
    bias = rng.choice((None, randn(len(weight)).to(dtype)))
    residual = None if gated else rng.choice((None, randn(m, n).to(dtype)))
    wrong = VARIANT_CHECKS[name](tile, x, weight, bias, residual)
    given = f"{dtype} m {m} n {n} k {k} mean {mean} bias {bias is not None}"
    return (f"{given} residual {residual is not None}", wrong) if wrong else None


def wide(*tensors: Tensor | None) -> Any:
    return parity.in_float64(tensors)


def wrong_plain(
    tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    args = (x, weight, bias, residual)
    plain, truth = reference.linear(*args), reference.linear(*wide(*args))
    return judged(linear_sm90a.linear_sm90a(*args, tile=tile), plain, truth)


def wrong_gated(tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, _: None) -> str | None:
    plain, truth = reference.geglu(x, weight, bias), reference.geglu(*wide(x, weight, bias))
    return judged(linear_sm90a.geglu_sm90a(x, weight, bias, tile=tile), plain, truth)


def wrong_normed(
    tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    gamma, beta = randn(x.shape[1]).to(x.dtype), randn(x.shape[1]).to(x.dtype)
    folded = folding.fold(gamma, beta, weight, bias)
    normed = reference.layer_norm(*wide(x, gamma, beta))
    truth = reference.linear(normed, *wide(weight, bias, residual))
    plain = reference.linear(reference.layer_norm(x, gamma, beta), weight, bias, residual)
    return judged(folding.layer_norm_linear(x, folded, residual, tile=tile), plain, truth)


def wrong_normed_gated(
    tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, _: None
) -> str | None:
    gamma, beta = randn(x.shape[1]).to(x.dtype), randn(x.shape[1]).to(x.dtype)
    folded = folding.fold(gamma, beta, weight, bias)
    truth = reference.geglu(reference.layer_norm(*wide(x, gamma, beta)), *wide(weight, bias))
    plain = reference.geglu(reference.layer_norm(x, gamma, beta), weight, bias)
    return judged(folding.layer_norm_geglu(x, folded, tile=tile), plain, truth)


def wrong_fp8(
    tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
    q = linear_fp8.quantize(x, packed.x_scale)
    residual = None if residual is None else residual.bfloat16()
    sums = q.double() @ packed.weight.double().T
    truth = sums * packed.columns[:, 0].double() + packed.columns[:, 1].double()
    truth = truth if residual is None else truth + residual.double()
    out = linear_fp8.linear_fp8(q, packed, residual, tile)
    error = ((out.double() - truth).norm() / truth.norm()).item()
    return None if error <= FP8_ERROR else f"error {error:.2e}"


def judged(out: Tensor, plain: Tensor, truth: Tensor) -> str | None:
    result = parity.judge(out, plain, truth)
    return None if result.passed else str(result)


VARIANT_CHECKS: dict[str, Callable[..., str | None]] = {
    "linear": wrong_plain,
    "geglu": wrong_gated,
    "layer_norm linear": wrong_normed,
    "layer_norm geglu": wrong_normed_gated,
    "e4m3": wrong_fp8,
}


def compile_all() -> None:
    """Every program of the kinds."""
    jobs = set()
    for name, tile in KINDS:
        tile, gated = replace(tile, stages=STAGES), name.endswith("geglu")
        norm = name.startswith("layer_norm")
        for dtype in ("e4m3",) if name == "e4m3" else ("bf16", "f16"):
            for residual in (False,) if gated else (False, True):
                op = "geglu" if gated else "linear"
                jobs.add(linear_sm90a.program(op, tile, dtype, norm, residual))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda program: program.compile("sm_90a"), jobs))


if __name__ == "__main__":
    sys.exit(fuzz.main("linear", KINDS, check, compile_all))
