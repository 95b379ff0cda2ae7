"""attention: softmax(scale * q @ k^T) @ v, one pass over the keys with a running maximum.

Algorithm: one program per BLOCK_M queries of a head; the keys stream past BLOCK_N at a time:
    s = q @ k^T;  m' = max(m, scale max(s));  p = exp2(scale s - m')
    l = l 2^(m-m') + sum(p);  o = o 2^(m-m') + p @ v
    with log2(e) folded into scale: the exponential is one FMA and one ex2. Only the last block of
    keys is masked.
Head dimension: padded to a power of two, as Triton's tiles are: 40 to 64, 80 to 128, 160 to 256.
    Two chunks (40 -> 32+16) would waste less, are right in the interpreter, and give wrong results
    or illegal addresses on an H200 with Triton 3.6. The ptx kernel has no padding.
Bound by: the tensor cores from D = 64 up; below that the exponential unit, 16 a clock per
    multiprocessor.
Source: Dao, FlashAttention-2 (2023), algorithm 1; Milakov and Gimelshein, Online normalizer
    calculation for softmax (2018).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels.triton import Device, device_of, on_device

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M queries by BLOCK_N keys on `warps` warps, with `stages` blocks of keys in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@triton.jit
def _load(base, rows, stride, limit, D, WIDTH: tl.constexpr, TAIL):
    """WIDTH columns of a tile; zero past D and, in a TAIL, from row `limit` on."""
    columns = tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if TAIL:
        mask = (rows < limit)[:, None] & (columns < D)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if WIDTH > D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend(
    state, q, k, v, k_stride, v_stride, keys_left, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Fold one block of keys into the running output, maximum and sum."""
    acc, row_max, row_sum = state
    keys = tl.arange(0, BLOCK_N)
    # Scores
    key_tile = _load(k, keys, k_stride, keys_left, D, WIDTH, TAIL)
    scores = tl.dot(q, key_tile.T, input_precision="ieee")
    if TAIL:
        scores = tl.where((keys < keys_left)[None, :], scores, -float("inf"))
    # Softmax
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    p = tl.exp2(tl.fma(scores, scale, -new_max[:, None]))
    if TAIL:  # -inf * scale is NaN where scale is 0
        p = tl.where((keys < keys_left)[None, :], p, 0.0)
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(p, 1)
    # Output
    p = p.to(v.dtype.element_ty)
    value_tile = _load(v, keys, v_stride, keys_left, D, WIDTH, TAIL)
    acc = tl.dot(p, value_tile, acc * correction[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _store(out, acc, row_sum, rows, stride, limit, D, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = (rows < limit)[:, None] & (columns < D)[None, :]
    value = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * stride + columns[None, :], value, mask=mask)


@triton.jit
def attention_kernel(
    q, k, v, out, N, M, H, scale, q_stride_b, q_stride_n, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Indices: scalars in 64 bits, as a tensor may exceed 2^31 elements; 32 bits inside a tile.
    tiles = tl.cdiv(N, BLOCK_M)
    first_query = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    head = (tl.program_id(0) // tiles % H).to(tl.int64)
    q += batch * q_stride_b + head * q_stride_h + first_query * q_stride_n
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    out += ((batch * N + first_query) * H + head) * D
    rows = tl.arange(0, BLOCK_M)
    rows_left = (N - first_query).to(tl.int32)

    # Load
    q_tile = _load(q, rows, q_stride_n, rows_left, D, WIDTH, True)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    # A finite first maximum: after -inf, a block of scores that are all -inf would give
    # exp2(-inf + inf) = NaN in a row whose other keys are finite.
    row_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    state = (acc, row_max, tl.zeros([BLOCK_M], tl.float32))

    # Compute
    full_blocks = M // BLOCK_N
    for _ in range(full_blocks):
        state = _attend(
            state, q_tile, k, v, k_stride_n, v_stride_n, BLOCK_N, scale, D, WIDTH, BLOCK_N, False
        )
        k += tl.cast(k_stride_n, tl.int64) * BLOCK_N
        v += tl.cast(v_stride_n, tl.int64) * BLOCK_N
    keys_left = M - full_blocks * BLOCK_N
    if keys_left > 0:
        state = _attend(
            state, q_tile, k, v, k_stride_n, v_stride_n, keys_left, scale, D, WIDTH, BLOCK_N, True
        )

    # Store
    acc, row_max, row_sum = state
    _store(out, acc, row_sum, rows, H * D, rows_left, D, WIDTH)


def padded_width(head_dim: int) -> int:
    """The power of two, at least 16, that holds head_dim."""
    return max(16, triton.next_power_of_2(head_dim))


def tiles_for(queries: int, keys: int, heads: int, q: Tensor, device: Device) -> Tiles:
    """The tile for `queries` x `keys` scores of each of `heads` (batch included) heads."""
    head_dim = q.shape[-1]
    if q.dtype == torch.float32:
        # FMA units: Triton keeps whole rows of both operands in registers and spills from D = 128
        # on. Exact, not fast.
        return Tiles(16, 32, 4, 1) if head_dim > 64 else Tiles(32, 32, 4, 2)
    padded = padded_width(head_dim)
    # 64 rows are one warpgroup's wgmma; two warpgroups share each block of keys where there are
    # enough queries to fill every multiprocessor that way.
    full = triton.cdiv(queries, 128) * heads >= device.multiprocessors
    block_m, warps = (128, 8) if full and device.capability >= 90 else (64, 4)
    block_n = 128 if padded <= 64 else 64
    if device.capability < 90:
        block_n = 64 if padded <= 128 else 32
    if keys <= 64:
        block_n = max(16, min(block_n, triton.next_power_of_2(keys)))
    stages = 3
    while stages > 1 and 2 * padded * (block_m + 2 * stages * block_n) > device.smem_bytes:
        stages -= 1
    return Tiles(block_m, block_n, warps, stages)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, tiles: Tiles | None = None
) -> Tensor:
    """softmax(scale * q @ k^T) @ v for each head, not causal.

    Args:
        q: [B, N, H, D], any strides with D contiguous; float32, float16 or bfloat16; D <= 256.
        k, v: [B, M, H, D], likewise; M >= 1.
        scale: multiplies the scores; default D**-0.5.
        tiles: the tile to use; default from the shape and the device.

    Returns:
        [B, N, H, D], contiguous, q's dtype.

    Numerics: scores, softmax and sums in float32; the weights p are rounded to the dtype of v
        before p @ v, as in every flash attention.
    """
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or keys == 0:
        return out.zero_()  # an empty sum
    scale = head_dim**-0.5 if scale is None else float(scale)
    if scale < 0:  # the running maximum assumes that scaling keeps the order of the scores
        q, scale = -q, -scale
    tiles = tiles or tiles_for(queries, keys, batch * heads, q, device_of(q))
    grid = (triton.cdiv(queries, tiles.block_m) * batch * heads,)
    with on_device(q):
        attention_kernel[grid](
            q, k, v, out, queries, keys, heads, scale * LOG2E, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], head_dim, padded_width(head_dim), tiles.block_m, tiles.block_n,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out
