"""silu: x / (1 + exp(-x)).  axpby: a x + b y.  frame_to_model, model_to_frame: uint8 <-> [-1, 1].

Algorithm: the tensors are dense, so their layout does not matter: each program takes BLOCK
    consecutive elements of memory. uint8 [B, H, W, 3] and channels-last [B, 3, H, W] are the same
    order in memory, so that the frame conversions are flat too.
Bound by: memory, every element read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels.layout import in_order_of
from mirage_hello.kernels.triton import on_device

# 8 float32 values (two 16-byte accesses) a thread of 4 warps.
BLOCK = 1024
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits


@triton.jit
def silu_kernel(x, out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def axpby_kernel(
    a, x, b, y, out, sample_numel,
    A_PER_SAMPLE: tl.constexpr, B_PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Indices: a program stays inside one sample, so that its coefficients are scalars.
    blocks = tl.cdiv(sample_numel, BLOCK)
    sample = tl.program_id(0) // blocks
    inner = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inner < sample_numel
    offsets = sample.to(tl.int64) * sample_numel + inner
    # Load
    a_value = tl.load(a + sample) if A_PER_SAMPLE else a
    b_value = tl.load(b + sample) if B_PER_SAMPLE else b
    x_value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    y_value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    # Store
    value = a_value * x_value + b_value * y_value
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def frame_to_model_kernel(frames, out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    level = tl.load(frames + offsets, mask=mask, other=0).to(tl.float32)
    # x / 127.5 - 1 = (x - 127.5) / 127.5, whose difference is exact and whose ends are -1 and 1.
    value = tl.div_rn(level - 127.5, tl.full([BLOCK], 127.5, tl.float32))
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def model_to_frame_kernel(x, out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    level = (tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + 1.0) * 127.5
    level = tl.where(level == level, level, 0.0)
    level = tl.minimum(tl.maximum(level, 0.0), 255.0)
    level = (level + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    tl.store(out + offsets, level.to(tl.int32).to(tl.uint8), mask=mask)


def _grid(numel: int) -> tuple[int]:
    return (triton.cdiv(numel, BLOCK),)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)).

    Args:
        x: any shape, dense; float32, float16 or bfloat16.

    Returns:
        x's shape, dtype and layout.
    """
    out = torch.empty_like(x)
    x = in_order_of(x, out)
    if x.numel():
        with on_device(x):
            silu_kernel[_grid(x.numel())](x, out, x.numel(), BLOCK)
    return out


def axpby(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a x + b y.

    Args:
        a, b: a float, or float32 [B], one value for each sample of x.
        x, y: [B, ...], one shape and dtype, dense with the batch outermost; float32, float16 or
            bfloat16.

    Returns:
        x's shape, dtype and layout.

    Numerics: one FMA and one product in float32, one rounding.
    """
    out = torch.empty_like(x)
    x, y = in_order_of(x, out), in_order_of(y, out)
    if x.numel() == 0:
        return out
    per_sample = [isinstance(c, Tensor) for c in (a, b)]
    a, b = (c.contiguous() if isinstance(c, Tensor) else float(c) for c in (a, b))
    samples = x.shape[0] if any(per_sample) else 1
    sample_numel = x.numel() // samples
    with on_device(x):
        axpby_kernel[(samples * triton.cdiv(sample_numel, BLOCK),)](
            a, x, b, y, out, sample_numel, *per_sample, BLOCK
        )
    return out


def frame_to_model(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / 127.5 - 1.

    Args:
        frames: uint8 [B, H, W, 3].
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [B, 3, H, W], channels-last, in [-1, 1].
    """
    frames = frames.contiguous()
    out = torch.empty(frames.shape, dtype=dtype, device=frames.device)
    if frames.numel():
        with on_device(frames):
            frame_to_model_kernel[_grid(frames.numel())](frames, out, frames.numel(), BLOCK)
    return out.permute(0, 3, 1, 2)


def model_to_frame(x: Tensor) -> Tensor:
    """clamp(round((x + 1) * 127.5), 0, 255), halves to the even neighbour; NaN gives 0.

    Args:
        x: [B, 3, H, W], read fastest when channels-last; float32, float16 or bfloat16.

    Returns:
        uint8 [B, H, W, 3], contiguous.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if x.numel():
        with on_device(x):
            model_to_frame_kernel[_grid(x.numel())](x, out, x.numel(), BLOCK)
    return out
