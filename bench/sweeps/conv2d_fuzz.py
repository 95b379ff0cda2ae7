"""Random calls of conv2d.sm90a against the float64 reference, on a GPU.

    python bench/sweeps/conv2d_fuzz.py [CASES [SECONDS [SEED]]]    5000 cases, at most 60 s

A few programs (a tile, a window, an input and an epilogue each), many shapes: batch 1 to 9, images
1 to 129 pixels wide and high, channels that are no multiples of the tile, any padding. Every case
also holds its sums against its own output. Prints every failure, exits with 1 if there is one, and
writes $OUT/conv2d-fuzz.json.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mirage_hello.bench.sweeps import fuzz
from mirage_hello.kernels import conv2d_fused as page
from mirage_hello.kernels import conv2d_sm90a as conv
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_sm90a import SHORT_NAME
from mirage_hello.kernels.conv2d_tiles import Tile
from mirage_hello.reference import sides

# (tile, window, stride, skip, upsample, unit, activation, whether SiLU follows a norm or None)
Kind = tuple[Tile, int, int, bool, bool, int, str | None, bool | None]
PROGRAMS: list[Kind] = [
    (Tile(2, 80, patch=True), 3, 1, False, False, 10, None, None),
    (Tile(2, 80, patch=True), 3, 1, True, False, 0, None, None),
    (Tile(2, 80, 2, patch=True), 3, 1, False, False, 10, None, None),
    (Tile(2, 96, 4, patch=True), 3, 1, True, False, 10, None, None),
    (Tile(1, 64, 5, patch=True), 3, 1, False, False, 10, None, None),
    (Tile(3, 96, patch=True), 3, 1, False, True, 0, "silu", None),
    (Tile(1, 80, 3, patch=True), 3, 1, True, True, 10, None, None),
    (Tile(2, 160, persistent=True, patch=True), 3, 1, False, False, 10, None, None),
    (Tile(1, 64, patch=True, blocks_per_sm=2), 3, 1, False, False, 0, None, None),
    (Tile(2, 64, 4), 3, 2, False, False, 10, None, None),
    (Tile(1, 160), 1, 1, True, False, 4, "silu", None),
    (Tile(2, 128, persistent=True), 3, 2, False, False, 4, None, None),
    (Tile(2, 80, patch=True), 3, 1, False, False, 10, None, True),
    (Tile(2, 80, 2, patch=True), 3, 1, True, False, 10, None, True),
    (Tile(2, 96, 4, patch=True), 3, 1, True, False, 10, None, True),
    (Tile(1, 64, 5, patch=True), 3, 1, False, False, 10, None, True),
    (Tile(2, 160, persistent=True, patch=True), 3, 1, False, True, 10, None, True),
    (Tile(1, 160, patch=True), 1, 1, False, False, 0, None, False),
]
DTYPES = (torch.bfloat16, torch.float16)
STAGES = 4  # the same for every K, so that a tile is one program
MOST_PIXELS = 40000  # of all images of a call: the reference multiplies in float64
randn = partial(torch.randn, device=fuzz.DEVICE)


def image(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    drawn = (scale * randn(shape)).to(dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def draw(rng: random.Random, kind: Kind) -> dict[str, Any]:
    """Arguments of conv2d_fused_sm90a."""
    tile, window, stride, with_skip, upsample, unit, activation, norm_silu = kind
    dtype = rng.choice(DTYPES)
    h, w = (rng.randint(1, rng.choice((20, 129))) for _ in range(2))
    most = 2 if tile.persistent and norm_silu is not None else 9  # a table of every image
    b = rng.randint(1, max(1, min(most, MOST_PIXELS // (h * w))))
    step = 8 if norm_silu is None else 40  # whole units
    c = step * rng.randint(-(-64 * -(-tile.split // window**2) // step), 320 // step)
    extra = step * rng.randint(1, 160 // step) if with_skip else 0
    o = 40 * rng.randint(1, 6) if unit else 8 * rng.randint(1, 30)
    up, pad = 2 if upsample else 1, (window // 2, window // 2)
    if not upsample:  # as far as a window fits, and up to one that sees nothing but zeros
        least = max(0, -(-(window - min(h, w)) // 2))
        pad = rng.randint(least, window - 1), rng.randint(least, window - 1)
    p, q = ((up * n + sum(sides(pad)) - window) // stride + 1 for n in (h, w))
    size, mean = (c + extra, window, window), rng.choice((0.0, 0.0, 100.0))
    x = image(b, c, h, w, dtype=dtype)
    skip = image(b, extra, h, w, dtype=dtype) if extra else None
    return {
        "x": x,
        "weight": image(o, *size, dtype=dtype, scale=(window**2 * (c + extra)) ** -0.5),
        "bias": (randn(o) + mean).to(dtype),
        "stride": stride,
        "padding": pad,
        "channel_bias": rng.choice((None, randn(b, o).to(dtype))),
        "residual": rng.choice((None, image(b, o, p, q, dtype=dtype))),
        "skip": skip,
        "upsample": upsample,
        "norm": None if norm_silu is None else draw_norm(rng, x, skip, norm_silu),
        "unit": unit,
        "activation": activation,
    }


def draw_norm(
    rng: random.Random, x: torch.Tensor, skip: torch.Tensor | None, silu: bool
) -> page.Norm:
    """Of a random number of groups, with sums of 10 channels in several parts."""

    def sums(t: torch.Tensor) -> torch.Tensor:
        rows = t.chunk(rng.randint(1, 9), 2)
        return torch.cat([page.sums_torch(part, 10) for part in rows], 1)

    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    groups = rng.choice([g for g in range(1, channels // 10 + 1) if channels % (10 * g) == 0])
    weight, bias = (randn(channels).to(x.dtype) for _ in range(2))
    of_skip = None if skip is None else sums(skip)
    return page.Norm(sums(x), groups, weight, bias, of_skip, silu=silu)


def wrong_sums(out: torch.Tensor, sums: torch.Tensor, unit: int) -> bool:
    found = page.merged(sums.double())
    count, mean, m2 = page.merged(page.sums_torch(out.double(), unit).double()).unbind(-1)
    near = (found[..., 1] - mean).abs() <= 1e-6 * mean.abs() + 1e-5 * (m2 / count).sqrt()
    squares = (found[..., 2] - m2).abs() <= 1e-4 * m2 + 1e-30
    return not (torch.equal(found[..., 0], count) and near.all() and squares.all())


def in_double(value: Any) -> Any:
    if isinstance(value, page.Norm):
        return replace(value, **{n: in_double(v) for n, v in vars(value).items()})
    return value.double() if isinstance(value, torch.Tensor) else value


def check(rng: random.Random, kind: Kind) -> tuple[str, str] | None:
    """A call of a kind, and what is wrong with it; None where nothing is."""
    values, tile = draw(rng, kind), replace(kind[0], stages=STAGES)
    wrong = wrong_result(values, tile)
    if not wrong:
        return None
    shapes = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return f"{values['x'].dtype} {shapes | {'norm': values['norm'] is not None}}", wrong


def wrong_result(values: dict[str, Any], tile: Tile) -> str | None:
    unsummed: Any = values | {"unit": 0}
    doubled: Any = {name: in_double(value) for name, value in unsummed.items()}
    truth = page.conv2d_fused_torch(**doubled)[0]
    plain = page.conv2d_fused_torch(**unsummed)[0]
    parity.poison(plain)
    out, sums = conv.conv2d_fused_sm90a(**values, tile=tile)
    result = parity.judge(out, plain, truth)
    if not result.passed:
        return str(result)
    return "sums" if sums is not None and wrong_sums(out, sums, values["unit"]) else None


def compile_all() -> None:
    """Every program, on all cores, before the clock starts."""
    jobs = [
        conv.program(
            replace(tile, stages=STAGES), window, window, stride, SHORT_NAME[dtype],
            skip=skip, upsample=upsample, unit=unit, silu=bool(activation), norm_silu=norm_silu,
        )
        for tile, window, stride, skip, upsample, unit, activation, norm_silu in PROGRAMS
        for dtype in DTYPES
    ]  # fmt: skip
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda program: program.compile("sm_90a"), set(jobs)))


if __name__ == "__main__":
    sys.exit(fuzz.main("conv2d", PROGRAMS, check, compile_all))
