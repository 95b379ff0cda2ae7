"""layer_norm: (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

Algorithm: one program holds ROWS whole rows in registers, so that x is read once. All is measured
    from the row's first element, whose difference from its neighbours is exact or nearly so: a
    constant row has mean 0 and variance 0, whatever the constant. The variance is the mean of
    (x - mean)^2, which has no cancellation.
Bound by: memory, one read and one write of x.
Source: Ba, Kiros and Hinton, Layer Normalization (2016).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels.triton import on_device
from mirage_hello.kernels.triton.linear import rows_of

# 16384 float32 values over 16 warps are 32 registers a thread.
MAX_ROW = 16384


@triton.jit
def layer_norm_kernel(
    x, weight, bias, out, M, K, x_stride, eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    # Indices
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    mask = (rows < M)[:, None] & inside[None, :]
    # Load
    rows = rows.to(tl.int64)[:, None]
    value = tl.load(x + rows * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    first = tl.load(x + rows * x_stride, mask=rows < M, other=0.0).to(tl.float32)
    # Reduce; then what rounding left of the mean is taken off, too
    value = tl.where(inside[None, :], value - first, 0.0)
    centred = tl.where(inside[None, :], value - (tl.sum(value, 1) / K)[:, None], 0.0)
    centred = tl.where(inside[None, :], centred - (tl.sum(centred, 1) / K)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / K
    # Compute
    value = centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    if weight is not None:
        value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    # Store
    tl.store(out + rows * K + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Args:
        x: [..., K], K <= 16384; float32, float16 or bfloat16.
        weight, bias: [K] or None.
        eps: added to the biased variance.

    Returns:
        [..., K], contiguous, x's dtype.

    Numerics: two passes over registers in float32, one rounding at the end.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = rows_of(x)
    m, k = x.shape
    block_k = triton.next_power_of_2(k)
    # Up to 4096 values a program, 8 to 32 a thread: several short rows share one.
    rows = max(1, min(2048 // block_k, 16))
    warps = min(16, max(4, block_k // 1024))
    with on_device(x):
        layer_norm_kernel[(triton.cdiv(m, rows),)](
            x, weight, bias, out, m, k, x.stride(0), eps, rows, block_k, num_warps=warps
        )
    return out
