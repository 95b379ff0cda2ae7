"""conv2d: out[b,o,p,q] = sum over c,r,s of x[b,c,p*stride+r-pad,q*stride+s-pad] weight[o,c,r,s]
+ bias[o] + channel_bias[b,o] + residual[b,o,p,q].

Algorithm: an implicit matrix product: B P Q output pixels by O channels, K = R S C deep, channels
    innermost. A step is one tap (r, s) and BLOCK_K channels, so each row of its left operand is a
    run of BLOCK_K channels of one input pixel: 128 contiguous bytes in the channels-last layout.
    Nothing is unfolded in memory; taps outside the image are masked. Bias, time embedding and
    residual are added in the epilogue. Where there are fewer tiles than multiprocessors, K is
    split and a second kernel adds the partial sums in a fixed order.
Layouts: any strides are right; x and weight are fast in channels-last order.
Bound by: the tensor cores, or the weight's bytes at 16 x 16 pixels and below.
Source: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning (2014), section 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels.triton import device_of, on_device
from mirage_hello.kernels.triton.tiles import Tiles, choose


@triton.jit
def _pixels(rows, P, Q, WIDE: tl.constexpr):
    """(sample, row, column) of output pixels counted through the batch."""
    if WIDE:
        rows = rows.to(tl.int64)
    pixels = rows // Q
    return pixels // P, pixels % P, rows % Q


@triton.jit
def _finish(
    acc, bias, channel_bias, residual, out, rows, columns, M, O, P, Q,
    channel_bias_stride, residual_b, residual_c, residual_h, residual_w,
    out_b, out_c, out_h, out_w, WIDE: tl.constexpr,
):  # fmt: skip
    """Epilogue: the additions, the one rounding and the store."""
    b, p, q = _pixels(rows, P, Q, WIDE)
    mask = (rows < M)[:, None] & (columns < O)[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    if channel_bias is not None:
        pointers = channel_bias + b[:, None] * channel_bias_stride + columns[None, :]
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        pixels = b * residual_b + p * residual_h + q * residual_w
        pointers = residual + pixels[:, None] + columns[None, :] * residual_c
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pixels = b * out_b + p * out_h + q * out_w
    pointers = out + pixels[:, None] + columns[None, :] * out_c
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv2d_kernel(
    x, weight, partial, bias, channel_bias, residual, out, M, O, C, H, W, P, Q,
    x_b, x_c, x_h, x_w, weight_o, weight_c, weight_r, weight_s,
    channel_bias_stride, residual_b, residual_c, residual_h, residual_w,
    out_b, out_c, out_h, out_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # Indices: neighbouring programs share a tile of pixels, whose taps overlap in L2.
    tiles_n = tl.cdiv(O, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b, p, q = _pixels(rows, P, Q, WIDE)
    h0 = p * STRIDE - PADDING
    w0 = q * STRIDE - PADDING
    # Offsets of a tile, 32-bit unless WIDE: half the registers of a tile of pointers. Channels
    # past the end read the last one again: a valid address whose sums are not stored.
    depth = tl.arange(0, BLOCK_K)
    x_offsets = (b * x_b + h0 * x_h + w0 * x_w)[:, None] + depth[None, :] * x_c
    outputs = tl.minimum(columns, O - 1)
    if WIDE:
        outputs = outputs.to(tl.int64)
    weight_offsets = outputs[:, None] * weight_o + depth[None, :] * weight_c
    blocks = tl.cdiv(C, BLOCK_K)
    steps = tl.cdiv(R * S * blocks, SPLIT_K)
    first = tl.program_id(1) * steps
    last = min(first + steps, R * S * blocks)

    # Compute
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(first, last):
        tap = step // blocks
        r = tap // S
        s = tap % S
        channel = (step - tap * blocks) * BLOCK_K
        h = h0 + r
        w = w0 + s
        image = (rows < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        inside = (depth < C - channel)[None, :]
        first_pixel = x + (r * x_h + s * x_w + channel * x_c)
        pixels = tl.load(first_pixel + x_offsets, mask=image[:, None] & inside, other=0.0)
        first_tap = weight + (r * weight_r + s * weight_s + channel * weight_c)
        taps = tl.load(first_tap + weight_offsets, mask=inside, other=0.0)
        acc = tl.dot(pixels, taps.T, acc, input_precision="ieee")

    # Store
    if SPLIT_K > 1:
        offsets = (tl.program_id(1).to(tl.int64) * M + rows)[:, None] * O + columns[None, :]
        tl.store(partial + offsets, acc, mask=(rows < M)[:, None] & (columns < O)[None, :])
    else:
        _finish(
            acc, bias, channel_bias, residual, out, rows, columns, M, O, P, Q,
            channel_bias_stride, residual_b, residual_c, residual_h, residual_w,
            out_b, out_c, out_h, out_w, WIDE,
        )  # fmt: skip


@triton.jit
def reduce_kernel(
    partial, bias, channel_bias, residual, out, M, O, P, Q,
    channel_bias_stride, residual_b, residual_c, residual_h, residual_w,
    out_b, out_c, out_h, out_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Indices
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < O)[None, :]
    offsets = rows.to(tl.int64)[:, None] * O + columns[None, :]
    # Reduce, in the order of K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(SPLIT_K):
        acc += tl.load(partial + offsets, mask=mask, other=0.0)
        partial += tl.cast(M, tl.int64) * O
    # Store
    _finish(
        acc, bias, channel_bias, residual, out, rows, columns, M, O, P, Q,
        channel_bias_stride, residual_b, residual_c, residual_h, residual_w,
        out_b, out_c, out_h, out_w, WIDE,
    )  # fmt: skip


def last_offset(t: Tensor) -> int:
    """Distance in elements from the first element to the last: 32-bit offsets reach 2^31 - 1."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Convolution + bias + channel_bias + residual.

    Args:
        x: [B, C, H, W]; float32, float16 or bfloat16; fast when channels-last.
        weight: [O, C, R, S], x's dtype; fast when channels-last.
        bias: [O] or None.
        stride, padding: the same for both axes.
        channel_bias: [B, O] or None.
        residual: [B, O, P, Q] or None, any strides.
        tiles: the tile to use; default from the shape and the device.

    Returns:
        [B, O, P, Q] with P = (H + 2 padding - R) // stride + 1; channels-last where x is, else
        contiguous.

    Numerics: accumulated in float32, every addition before the one rounding.
    """
    (batch, channels, height, width), (outputs, _, r, s) = x.shape, weight.shape
    p, q = ((n + 2 * padding - taps) // stride + 1 for n, taps in ((height, r), (width, s)))
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(batch, outputs, p, q, dtype=x.dtype, device=x.device, memory_format=layout)
    if out.numel() == 0:
        return out
    m = batch * p * q
    tiles = tiles or choose(m, outputs, channels, x.dtype, device_of(x), taps=r * s)
    split = tiles.split_k
    partial = torch.empty(split, m, outputs, device=x.device) if split > 1 else None
    if channel_bias is not None and channel_bias.stride(1) != 1:
        channel_bias = channel_bias.contiguous()
    epilogue = (
        0 if channel_bias is None else channel_bias.stride(0),
        *(residual.stride() if residual is not None else (0, 0, 0, 0)),
        *out.stride(),
    )
    tensors = [t for t in (x, weight, out, residual) if t is not None]
    wide = any(last_offset(t) >= 2**31 for t in tensors)
    with on_device(x):
        grid = (triton.cdiv(m, tiles.block_m) * triton.cdiv(outputs, tiles.block_n), split)
        conv2d_kernel[grid](
            x, weight, partial, bias, channel_bias, residual, out, m, outputs, channels, height,
            width, p, q, *x.stride(), *weight.stride(), *epilogue, r, s, stride, padding,
            tiles.block_m, tiles.block_n, tiles.block_k, split, wide,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if split > 1:
            grid = (triton.cdiv(m, 16), triton.cdiv(outputs, 64))
            reduce_kernel[grid](
                partial, bias, channel_bias, residual, out, m, outputs, p, q, *epilogue,
                16, 64, split, wide,
            )  # fmt: skip
    return out
