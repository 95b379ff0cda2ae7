"""linear: x @ weight^T + bias + residual.
geglu: h * gelu(gate), where (h, gate) are the halves of x @ weight^T + bias.

Algorithm: one program per BLOCK_M x BLOCK_N tile of the result, in an order that keeps GROUP_M
    rows of tiles together in L2, K streamed BLOCK_K at a time through a software pipeline. GEGLU
    keeps two accumulators, its rows n and N + n of the weight, so that the gate never leaves the
    registers. Where there are fewer tiles than multiprocessors K is split; the partial sums are
    added in a fixed order by a second kernel, so that a result never changes from run to run.
Bound by: the tensor cores for large M, the weight's bytes for small.
Source: Shazeer, GLU Variants Improve Transformer (2020), for GEGLU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels.triton import device_of, on_device
from mirage_hello.kernels.triton.tiles import Tiles, choose

GROUP_M = 8


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's tile: GROUP_M tiles down before one step right, for reuse in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    tile_m = first_m + tile % (GROUP_M * tiles_n) % height
    tile_n = tile % (GROUP_M * tiles_n) // height
    return tile_m, tile_n


@triton.jit
def _operand(base, first, limit, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(pointer to row `first`, offsets of the ROWS x BLOCK_K tile from there).

    A 64-bit scalar and 32-bit offsets cost half the registers of a tile of pointers, which at
    128 x 256 spills. Rows past the end read the last one again: a valid address, and what it
    gives is not stored.
    """
    rows = tl.minimum(tl.arange(0, ROWS), limit - 1 - first)
    offsets = rows[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
    return base + tl.cast(first, tl.int64) * stride, offsets


@triton.jit
def _add_epilogue(acc, bias, residual, rows, columns, M, N, residual_stride):
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        pointers = residual + rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def linear_kernel(
    x, weight, bias, residual, out, partial, M, N, K, x_stride, weight_stride, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    # Indices
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x, x_offsets = _operand(x, tile_m * BLOCK_M, M, x_stride, BLOCK_M, BLOCK_K)
    weight, weight_offsets = _operand(weight, tile_n * BLOCK_N, N, weight_stride, BLOCK_N, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = tl.program_id(1) * steps
    last = min(first + steps, tl.cdiv(K, BLOCK_K))

    # Compute
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K
        inside = (depth < K - k)[None, :]
        a = tl.load(x + k + x_offsets, mask=inside, other=0.0)
        b = tl.load(weight + k + weight_offsets, mask=inside, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")

    # Store
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SPLIT_K > 1:
        tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + offsets, acc, mask=mask)
    else:
        acc = _add_epilogue(acc, bias, residual, rows, columns, M, N, residual_stride)
        tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    partial, bias, residual, out, M, N, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    # Indices
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    # Reduce, in the order of K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(SPLIT_K):
        acc += tl.load(partial + offsets, mask=mask, other=0.0)
        partial += tl.cast(M, tl.int64) * N
    # Store
    acc = _add_epilogue(acc, bias, residual, rows, columns, M, N, residual_stride)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def geglu_kernel(
    x, weight, bias, out, M, N, K, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Indices
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x, x_offsets = _operand(x, tile_m * BLOCK_M, M, x_stride, BLOCK_M, BLOCK_K)
    weight, weight_offsets = _operand(weight, tile_n * BLOCK_N, N, weight_stride, BLOCK_N, BLOCK_K)
    gate_weight = weight + tl.cast(weight_stride, tl.int64) * N

    # Compute
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        inside = (depth < K - k)[None, :]
        a = tl.load(x + k + x_offsets, mask=inside, other=0.0)
        b = tl.load(weight + k + weight_offsets, mask=inside, other=0.0)
        h = tl.dot(a, b.T, h, input_precision="ieee")
        b = tl.load(gate_weight + k + weight_offsets, mask=inside, other=0.0)
        gate = tl.dot(a, b.T, gate, input_precision="ieee")
    if bias is not None:
        h += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    # gelu(g) = g/2 (1 + erf(g / sqrt 2))
    value = h * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))

    # Store
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with K contiguous: a view where the strides allow it, else a copy."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x @ weight^T + bias + residual.

    Args:
        x: [..., K]; float32, float16 or bfloat16.
        weight: [N, K], x's dtype.
        bias: [N] or None.
        residual: [..., N] or None.
        tiles: the tile to use; default from the shape and the device.

    Returns:
        [..., N], contiguous.

    Numerics: accumulated in float32, bias and residual added before the one rounding.
    """
    n, k = weight.shape
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = rows_of(x), rows_of(weight)
    m = x.shape[0]
    if residual is not None:
        residual = rows_of(residual)
    residual_stride = 0 if residual is None else residual.stride(0)
    tiles = tiles or choose(m, n, k, x.dtype, device_of(x))
    split = tiles.split_k
    partial = torch.empty(split, m, n, device=x.device) if split > 1 else None
    with on_device(x):
        grid = (triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n), split)
        linear_kernel[grid](
            x, weight, bias, residual, out, partial, m, n, k, x.stride(0), weight.stride(0),
            residual_stride, tiles.block_m, tiles.block_n, tiles.block_k, GROUP_M, split,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if split > 1:
            grid = (triton.cdiv(m, 16), triton.cdiv(n, 64))
            reduce_kernel[grid](partial, bias, residual, out, m, n, residual_stride, 16, 64, split)
    return out


def geglu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """h * gelu(gate) with (h, gate) the halves of x @ weight^T + bias; gelu(g) = g Phi(g), by erf.

    Args:
        x: [..., K]; float32, float16 or bfloat16.
        weight: [2N, K]: rows 0 .. N-1 give h, the others the gate.
        bias: [2N] or None.
        tiles: the tile to use; default from the shape and the device.

    Returns:
        [..., N], contiguous.

    Numerics: accumulated in float32; nothing is rounded before the product of h and gelu(gate).
    """
    n, k = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = rows_of(x), rows_of(weight)
    m = x.shape[0]
    tiles = tiles or choose(m, n, k, x.dtype, device_of(x), weights=2, splits=False)
    grid = (triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n),)
    with on_device(x):
        geglu_kernel[grid](
            x, weight, bias, out, m, n, k, x.stride(0), weight.stride(0),
            tiles.block_m, tiles.block_n, tiles.block_k, GROUP_M,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out
