"""Random calls of the hand-written GroupNorm and LayerNorm against float64, on a GPU.

    python bench/sweeps/norm_fuzz.py [CASES [SECONDS [SEED]]]    5000 cases, at most 60 s

group_norm and group_norm_silu of channels_last tensors, with and without a skip, and of contiguous
ones; group_norm_apply; layer_norm. Batch 1 to 9, images 1 to 129 pixels wide and high, groups 1, 2,
32 and C, means up to 300 deviations. The channels_last kernels have their shape as constants, so a
pool of SHAPES shapes is compiled first and drawn from. Writes $OUT/norm-fuzz.json.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mirage_hello import reference
from mirage_hello.bench.sweeps import fuzz
from mirage_hello.kernels import group_norm as page
from mirage_hello.kernels import group_norm_apply as apply_page
from mirage_hello.kernels import layer_norm as layer_page
from mirage_hello.kernels import ops, parity
from mirage_hello.kernels.conv2d_fused import Norm, sums_torch
from mirage_hello.kernels.group_norm_launch import ptx_program
from mirage_hello.kernels.group_norm_plan import plan

SHAPES = 240
MOST_VALUES = 6_000_000
KINDS = ("channels_last", "contiguous", "channels_last", "skip", "apply", "layer_norm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
randn = partial(torch.randn, device=fuzz.DEVICE)


@dataclass(frozen=True)
class Case:
    """A shape and a dtype: what a channels_last program has as constants."""

    op: str
    dtype: torch.dtype
    images: int
    channels: int
    extra: int  # channels of the skip
    height: int
    width: int
    groups: int

    def x(self, mean: float, channels: int, channels_last: bool) -> Tensor:
        x = (randn(self.images, channels, self.height, self.width) + mean).to(self.dtype)
        return x.to(memory_format=torch.channels_last) if channels_last else x


def draw_case(rng: random.Random, with_skip: bool) -> Case:
    """Groups 1, 2, 32 or C, or any divisor; odd channels where no skip asks for octets."""
    height, width = (rng.randint(1, rng.choice((20, 129))) for _ in range(2))
    step = 8 if with_skip else rng.choice((1, 2, 8, 32))
    channels = step * rng.randint(1, 640 // step)
    extra = 8 * rng.randint(1, 40) if with_skip else 0
    total = channels + extra
    images = rng.randint(1, max(1, min(9, MOST_VALUES // (height * width * total))))
    divisors = [g for g in range(1, total + 1) if total % g == 0 and total // g <= 1024]
    usual = [g for g in (1, 2, 32, total) if g in divisors]
    groups = rng.choice(usual or divisors) if rng.random() < 0.6 else rng.choice(divisors)
    op = rng.choice(("group_norm", "group_norm_silu"))
    return Case(op, rng.choice(DTYPES), images, channels, extra, height, width, groups)


POOL: dict[bool, list[Case]] = {False: [], True: []}  # by whether there is a skip


def compile_all() -> None:
    """The pool, and every program of it; from a seed of its own, so that a cache serves again."""
    rng = random.Random(0)
    for with_skip, count in ((False, SHAPES), (True, SHAPES // 3)):
        POOL[with_skip] = [draw_case(rng, with_skip) for _ in range(count)]

    def compile_one(case: Case) -> None:
        empty = partial(torch.empty, device="meta", dtype=case.dtype)
        last = torch.channels_last
        size = (case.height, case.width)
        x = empty(case.images, case.channels, *size).to(memory_format=last)
        skip = empty(case.images, case.extra, *size).to(memory_format=last) if case.extra else None
        shape = page.shape_of(x, case.groups, 16, *page.device_limits(0), skip)
        chosen = plan(shape)
        if chosen:
            ptx_program(case.op, shape, chosen, case.dtype).compile("sm_90a")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_one, POOL[False] + POOL[True]))


def check(rng: random.Random, kind: str) -> tuple[str, str] | None:
    """A call of a kind, and what is wrong with it; None where nothing is."""
    mean = rng.choice((0.0, 1.0, 300.0))
    if kind == "layer_norm":
        return wrong_layer_norm(rng, mean)
    if kind == "apply":
        return wrong_apply(rng, mean)
    with_skip, channels_last = kind == "skip", kind != "contiguous"
    case = rng.choice(POOL[with_skip]) if channels_last else draw_case(rng, False)
    x = case.x(mean, case.channels, channels_last)
    skip = case.x(-mean, case.extra, True) if with_skip else None
    weight, bias = parameters(rng, case.channels + case.extra, case.dtype)
    op = getattr(ops, case.op)
    kernel = next(k for k in op.kernels if k.backend == "ptx")
    args = (x, case.groups, weight, bias, 1e-5, skip)
    if page.supports(op.describe(args, {})):
        return None
    truth = op.reference(*parity.in_float64(args))
    parity.poison(truth)
    result = parity.judge(kernel.run(*args), op.torch_kernel.run(*args), truth)
    return None if result.passed else (f"{kind} {case} mean {mean}", str(result))


def parameters(
    rng: random.Random, channels: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    given = rng.choice(((True, True), (True, True), (False, True), (False, False)))
    weight, bias = (randn(channels).to(dtype) if g else None for g in given)
    return weight, bias


def wrong_apply(rng: random.Random, mean: float) -> tuple[str, str] | None:
    """GroupNorm of given sums, whose parts are bands of rows."""
    dtype, unit = rng.choice(DTYPES[:2]), 10
    channels, extra = 40 * rng.randint(1, 16), rng.choice((0, 40 * rng.randint(1, 8)))
    h, w, images = rng.randint(1, 33), rng.randint(1, 33), rng.randint(1, 9)
    total = channels + extra
    groups = rng.choice([g for g in range(1, total // unit + 1) if total // unit % g == 0])
    case = Case("apply", dtype, images, channels, extra, h, w, groups)
    x = case.x(mean, channels, True)
    skip = case.x(-mean, extra, True) if extra else None
    weight, bias = (randn(total).to(dtype) for _ in range(2))

    def sums(t: Tensor) -> Tensor:
        bands = t.chunk(rng.randint(1, 9), 2)
        return torch.cat([sums_torch(band, unit) for band in bands], 1).contiguous()

    silu, of_skip = rng.random() < 0.7, None if skip is None else sums(skip)
    norm = Norm(sums(x), groups, weight, bias, of_skip, silu=silu)
    reads = x if skip is None else torch.cat([x, skip], 1)
    run = reference.group_norm_silu if silu else reference.group_norm
    truth = run(reads.double(), groups, weight.double(), bias.double())
    plain = run(reads, groups, weight, bias)
    parity.poison(plain)
    result = parity.judge(apply_page.group_norm_apply(x, norm, skip), plain, truth)
    return None if result.passed else (f"{case} mean {mean} silu {silu}", str(result))


def wrong_layer_norm(rng: random.Random, mean: float) -> tuple[str, str] | None:
    dtype = rng.choice(DTYPES)
    octet = 16 // dtype.itemsize
    width, rows = octet * rng.randint(1, rng.choice((40, 8192 // octet))), rng.randint(1, 300)
    x = (randn(rows, width) + mean).to(dtype)
    weight, bias = parameters(rng, width, dtype)
    truth = reference.layer_norm(*parity.in_float64((x, weight, bias)))
    plain = reference.layer_norm(x, weight, bias)
    parity.poison(plain)
    result = parity.judge(layer_page.layer_norm_ptx(x, weight, bias), plain, truth)
    return None if result.passed else (f"{dtype} {rows} x {width} mean {mean}", str(result))


if __name__ == "__main__":
    sys.exit(fuzz.main("norm", KINDS, check, compile_all))
