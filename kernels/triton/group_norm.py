"""group_norm: (x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c, groups of channels of a sample.
group_norm_silu: the same, then y / (1 + exp(-y)).

Algorithm: x is [B, C, S], S pixels, with strides that make one kernel serve both layouts.
    A group of at most MAX_GROUP elements stays in one program's registers: one read, one write.
    A larger one takes three kernels: (count, mean, M2) of each channel over a run of pixels; the
    runs and channels of each group merged; the result. Mean and M2 = sum (x - mean)^2 merge by
    Chan's formula, which has no cancellation however large the mean, and in a fixed order.
    Means are held as distances from the group's first element: a mean of 1000 in 24 bits would be
    wrong by 3e-4 of a spread of 0.1.
Bound by: memory; one read and one write in one pass, two reads and one write in three.
Source: Wu and He, Group Normalization (2018); Chan, Golub and LeVeque, Updating formulae and a
    pairwise algorithm for computing sample variances (1979), equation 2.1.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels.triton import device_of, on_device

# 32768 float32 values over 16 warps are 64 registers a thread.
MAX_GROUP = 32768
TILE = 8192  # elements of a tile of the three-kernel path, 32 a thread of 8 warps


@triton.jit
def _scale(value, mean, rstd, channels, mask, weight, bias, SILU: tl.constexpr):
    """(value - mean) * rstd * weight + bias for a tile [pixels, channels], then SiLU."""
    value = (value - mean) * rstd
    if weight is not None:
        value *= tl.load(weight + channels, mask=mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def _first_offsets(sample, channels, width, x_b, x_c):
    """Where the first element of each channel's group lies: its first channel at pixel 0."""
    return sample * x_b + (channels // width * width).to(tl.int64) * x_c


@triton.jit
def one_pass_kernel(
    x, weight, bias, out, C, G, S, x_b, x_c, x_s, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # Indices: 32-bit offsets inside a group, which spans at most MAX_GROUP pixels.
    width = C // G
    first = tl.program_id(0) % G * width
    pixels = tl.arange(0, BLOCK_S)
    inner = tl.arange(0, BLOCK_C)
    inside = inner < width
    mask = (pixels < S)[:, None] & inside[None, :]
    base = (tl.program_id(0) // G).to(tl.int64) * x_b + first.to(tl.int64) * x_c
    offsets = pixels[:, None] * x_s + inner[None, :] * x_c
    # Load
    value = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
    # Reduce
    count = tl.cast(width * S, tl.float32)
    # Distances from one element of the group: a sum of large values would round at their size.
    value -= tl.load(x + base).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(mask, value, 0.0), 1), 0) / count
    centred = tl.where(mask, value - mean, 0.0)
    # What rounding left of the mean: 3e-5 at 857, where the spread may be 100.
    centred = tl.where(mask, centred - tl.sum(tl.sum(centred, 1), 0) / count, 0.0)
    variance = tl.sum(tl.sum(centred * centred, 1), 0) / count
    # Store
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    value = _scale(centred, 0.0, rstd, first + inner, inside, weight, bias, SILU)
    tl.store(out + base + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def statistics_kernel(
    x, means, m2s, C, G, S, x_b, x_c, x_s, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean - the group's first element, M2) of each channel over tiles * BLOCK_S pixels."""
    # Indices
    run = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = x + sample * x_b + channels.to(tl.int64)[None, :] * x_c
    # Reduce, as distances from the channel's first pixel of the run: a sum of large values would
    # round at their size.
    first_pixel = (run * tiles * BLOCK_S).to(tl.int64) * x_s
    inside = (channels < C)[None, :]
    origin = tl.load(columns + first_pixel, mask=inside, other=0.0).to(tl.float32)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tiles):
        pixels = (run * tiles + tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = (pixels < S)[:, None] & inside
        value = tl.load(columns + pixels.to(tl.int64)[:, None] * x_s, mask=mask, other=0.0)
        value = tl.where(mask, value.to(tl.float32) - origin, 0.0)
        added = tl.minimum(tl.maximum(S - (run * tiles + tile) * BLOCK_S, 0), BLOCK_S)
        added = tl.cast(added, tl.float32)
        total = tl.maximum(count + added, 1.0)
        tile_mean = tl.sum(value, 0) / tl.maximum(added, 1.0)
        centred = tl.where(mask, value - tile_mean[None, :], 0.0)
        delta = tl.where(added > 0, tile_mean - mean, 0.0)
        mean += delta * (added / total)
        m2 += tl.sum(centred * centred, 0) + delta * delta * (count * (added / total))
        count += added
    # Store
    offsets = (sample * tl.num_programs(0) + run) * C + channels
    group_first = tl.load(x + _first_offsets(sample, channels, C // G, x_b, x_c), mask=channels < C)
    mean += tl.sum(origin, 0) - group_first.to(tl.float32)
    tl.store(means + offsets, mean, mask=channels < C)
    tl.store(m2s + offsets, m2, mask=channels < C)


@triton.jit
def merge_kernel(
    means, m2s, group_mean, group_rstd, C, G, S, runs, run_pixels, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean as the runs hold it, 1/sqrt(var + eps)) of one group from its channels' runs."""
    # Indices
    width = C // G
    sample = tl.program_id(0) // G
    inner = tl.arange(0, BLOCK_C)
    channels = tl.program_id(0) % G * width + inner
    # Reduce: the mean first, from its distance to the group's first mean, since a sum of large
    # weighted means would round at their size; then every run's distance from it.
    origin = tl.load(means + (sample * runs).to(tl.int64) * C + tl.program_id(0) % G * width)
    weighted = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, runs, BLOCK_R):
        run = first + tl.arange(0, BLOCK_R)
        mask = (run < runs)[:, None] & (inner < width)[None, :]
        count = tl.minimum(run_pixels, S - run * run_pixels).to(tl.float32)[:, None]
        offsets = (sample * runs + run).to(tl.int64)[:, None] * C + channels[None, :]
        delta = tl.load(means + offsets, mask=mask, other=0.0) - origin
        weighted += delta * tl.where(mask, count / S, 0.0)
    mean = origin + tl.sum(tl.sum(weighted, 1), 0) / width
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, runs, BLOCK_R):
        run = first + tl.arange(0, BLOCK_R)
        mask = (run < runs)[:, None] & (inner < width)[None, :]
        count = tl.minimum(run_pixels, S - run * run_pixels).to(tl.float32)[:, None]
        offsets = (sample * runs + run).to(tl.int64)[:, None] * C + channels[None, :]
        delta = tl.load(means + offsets, mask=mask, other=0.0) - mean
        m2 = tl.load(m2s + offsets, mask=mask, other=0.0)
        total += tl.where(mask, (m2 + delta * delta * count) / S, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / width
    # Store
    tl.store(group_mean + tl.program_id(0), mean)
    tl.store(group_rstd + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def apply_kernel(
    x, weight, bias, group_mean, group_rstd, out, C, G, S, x_b, x_c, x_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # Indices
    sample = tl.program_id(2)
    pixels = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    mask = (pixels < S)[:, None] & inside[None, :]
    offsets = pixels.to(tl.int64)[:, None] * x_s + channels.to(tl.int64)[None, :] * x_c
    offsets += sample.to(tl.int64) * x_b
    # Load
    first = _first_offsets(sample.to(tl.int64), channels, C // G, x_b, x_c)
    first = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - first[None, :]
    groups = sample * G + channels // (C // G)
    mean = tl.load(group_mean + groups, mask=inside, other=0.0)[None, :]
    rstd = tl.load(group_rstd + groups, mask=inside, other=0.0)[None, :]
    # Store
    value = _scale(value, mean, rstd, channels, inside, weight, bias, SILU)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c.

    Args:
        x: [B, C, *spatial], C a multiple of groups; float32, float16 or bfloat16; contiguous or
            channels-last (other layouts are copied).
        groups: groups of consecutive channels.
        weight, bias: [C] or None.
        eps: added to the biased variance.

    Returns:
        x's shape, dtype and layout.

    Numerics: statistics and result in float32, one rounding at the end.
    """
    return _group_norm(x, groups, weight, bias, eps, SILU=False)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """silu(group_norm(x, groups, weight, bias, eps)); arguments and result as there."""
    return _group_norm(x, groups, weight, bias, eps, SILU=True)


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, SILU: bool
) -> Tensor:
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        x = x.contiguous()
    strides = strides_bcs(x)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    samples, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    sizes = (channels, groups, pixels)
    block_c = triton.next_power_of_2(channels // groups)
    block_s = triton.next_power_of_2(pixels)
    with on_device(x):
        if block_s * block_c <= MAX_GROUP:
            warps = min(16, max(1, block_s * block_c // 1024))
            one_pass_kernel[(samples * groups,)](
                x, weight, bias, out, *sizes, *strides, eps, block_s, block_c, SILU,
                num_warps=triton.next_power_of_2(warps),
            )  # fmt: skip
        else:
            _three_kernels(x, weight, bias, out, sizes, strides, eps, SILU)
    return out


def strides_bcs(x: Tensor) -> tuple[int, int, int]:
    """Strides of x, contiguous or channels-last, seen as [B, C, S]."""
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    if x.is_contiguous():
        return channels * pixels, pixels, 1
    return channels * pixels, 1, channels


def _three_kernels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, sizes: tuple[int, int, int],
    strides: tuple[int, int, int], eps: float, SILU: bool,
) -> None:  # fmt: skip
    channels, groups, pixels = sizes
    samples = x.shape[0]
    # A tile is wide along the contiguous dimension: 128 channels, or as many pixels as there are.
    if strides[1] == 1:
        block_c = min(128, triton.next_power_of_2(channels))
        block_s = TILE // block_c
    else:
        block_s = min(1024, triton.next_power_of_2(pixels))
        block_c = TILE // block_s
    blocks_s, blocks_c = triton.cdiv(pixels, block_s), triton.cdiv(channels, block_c)
    # A run is long where there are many tiles, to leave about 8 programs a multiprocessor.
    tiles = max(1, samples * blocks_s * blocks_c // (8 * device_of(x).multiprocessors))
    runs = triton.cdiv(blocks_s, tiles)
    options: dict[str, Any] = {"num_warps": 8}
    means, m2s = torch.empty(2, samples, runs, channels, device=x.device)
    mean, rstd = torch.empty(2, samples * groups, device=x.device)
    statistics_kernel[(runs, blocks_c, samples)](
        x, means, m2s, *sizes, *strides, tiles, block_s, block_c, **options
    )
    merge_c = triton.next_power_of_2(channels // groups)
    merge_r = max(1, min(triton.next_power_of_2(runs), 4096 // merge_c))
    merge_kernel[(samples * groups,)](
        means, m2s, mean, rstd, *sizes, runs, tiles * block_s, eps, merge_r, merge_c
    )
    apply_kernel[(blocks_s, blocks_c, samples)](
        x, weight, bias, mean, rstd, out, *sizes, *strides, block_s, block_c, SILU, **options
    )
