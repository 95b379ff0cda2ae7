"""The tile of a matrix product from its shape: a model of one multiprocessor instead of a tuner.

Time of a tile = prologue + steps * max(matrix work, loads); time of the product = tiles of the
busiest multiprocessor * that. Split-K adds work items where there are fewer tiles than
multiprocessors, for the price of writing and reading float32 partial sums.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from mirage_hello.kernels.triton import Device


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M x BLOCK_N outputs, BLOCK_K deep steps, K cut into `split_k` parts of whole steps."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1


# (BLOCK_M, BLOCK_N, warps). 64 rows a warpgroup is what wgmma needs; 16 and 32 rows use mma.sync.
TENSOR_CORE_TILES = (
    (128, 256, 8), (128, 128, 8), (128, 64, 4), (64, 256, 4), (64, 128, 4), (64, 64, 4),
    (128, 16, 4), (64, 32, 4), (32, 64, 4), (16, 64, 4), (16, 128, 4),
)  # fmt: skip
# One product of two tiles is 64 * 64 * 16 / 128 threads = 512 FMAs a thread, all unrolled.
FMA_TILES = ((64, 64, 4), (32, 32, 4), (16, 64, 4))

# Clocks of a Hopper multiprocessor.
MACS_PER_CLOCK = 1400  # of 2048 dense bf16; what Triton's wgmma pipeline reaches
SYNC_MACS_PER_CLOCK = 700  # tiles under 64 rows: mma.sync
FMAS_PER_CLOCK = 90  # of 128
LOAD_BYTES_PER_CLOCK = 40  # of 64 from L2
TILE_CLOCKS = 2000  # launch, first loads, epilogue
REDUCE_CLOCKS = 2500  # the second kernel of a split
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


def choose(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: Device,
    taps: int = 1,
    weights: int = 1,
    splits: bool = True,
) -> Tiles:
    """The fastest tile by the model for an [m, taps k] x [taps k, n] product.

    Args:
        m, n, k: sizes of the product; a step covers part of one tap's k.
        dtype: of the operands.
        device: what it runs on.
        taps: of a convolution, R S.
        weights: matrices multiplied at once with the same left operand (2 for GEGLU).
        splits: whether K may be split.
    """
    return ranked(m, n, k, dtype, device, taps, weights, splits)[0]


@functools.lru_cache(maxsize=4096)
def ranked(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: Device,
    taps: int = 1,
    weights: int = 1,
    splits: bool = True,
) -> tuple[Tiles, ...]:
    """Every tile for the product, fastest by the model first; arguments as for `choose`."""
    exact = dtype == torch.float32
    block_k = 16 if exact or k <= 16 else 32 if k <= 32 else 64
    steps = taps * triton.cdiv(k, block_k)
    candidates = [
        (_clocks(m, n, block_k, steps, tile, split, exact, device, weights), tile, split)
        for tile in (FMA_TILES if exact else TENSOR_CORE_TILES)
        for split in (SPLITS if splits else (1,))
        if (split == 1 or steps >= 4 * split) and tile[0] * tile[1] * weights <= 128 * 256
    ]
    found = []
    for _, (block_m, block_n, warps), split in sorted(candidates):
        step_bytes = 2 * block_k * (block_m + block_n * weights)
        fitting = max(2, min(4, (device.smem_bytes - 4096) // step_bytes))
        stages = 2 if exact else fitting
        found.append(Tiles(block_m, block_n, block_k, warps, stages, split))
    return tuple(found)


def _clocks(
    m: int, n: int, block_k: int, steps: int, tile: tuple[int, int, int], split: int,
    exact: bool, device: Device, weights: int,
) -> float:  # fmt: skip
    """Clocks of the whole product on the busiest multiprocessor."""
    block_m, block_n, _ = tile
    rate = FMAS_PER_CLOCK if exact else MACS_PER_CLOCK if block_m >= 64 else SYNC_MACS_PER_CLOCK
    math = block_m * max(block_n, 32) * block_k * weights / rate
    loads = (4 if exact else 2) * block_k * (block_m + block_n * weights) / LOAD_BYTES_PER_CLOCK
    items = triton.cdiv(m, block_m) * triton.cdiv(n, block_n) * split
    rounds = triton.cdiv(items, device.multiprocessors)
    clocks = rounds * (triton.cdiv(steps, split) * max(math, loads)) + TILE_CLOCKS
    if split > 1:  # float32 partial sums, written once and read once by all multiprocessors
        traffic = 2 * 4 * m * n * split / device.multiprocessors
        clocks += REDUCE_CLOCKS + traffic / LOAD_BYTES_PER_CLOCK
    return clocks
