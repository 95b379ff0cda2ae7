"""Deliberately wrong kernels: the parity rule must refuse each of them."""

import torch
from torch import Tensor

from mirage_hello import reference


def zeros(x: Tensor) -> Tensor:
    """Writes zeros."""
    return torch.zeros_like(x)


def copy(x: Tensor) -> Tensor:
    """Copies its input."""
    return x.clone()


def skip_last_tile(x: Tensor) -> Tensor:
    """Leaves the last 128 elements as they were."""
    out = torch.zeros_like(x)
    out.view(-1)[:-128] = reference.silu(x).view(-1)[:-128]
    return out


def skip_last_element(x: Tensor) -> Tensor:
    """Leaves out the tail of one element."""
    out = reference.silu(x)
    out.view(-1)[-1] = 0
    return out


def short_arithmetic(x: Tensor) -> Tensor:
    """Computes a float32 result in bfloat16, a bfloat16 one with three bits less."""
    if x.dtype == torch.float32:
        return reference.silu(x.bfloat16()).to(x.dtype)
    return (reference.silu(x.float()) * 8).to(torch.float8_e4m3fn).to(x.dtype) / 8


def unwritten(x: Tensor) -> Tensor:
    """Leaves one element at whatever the memory held: here a NaN."""
    out = reference.silu(x)
    out.view(-1)[x.numel() // 2] = float("nan")
    return out


def offset_by_one(x: Tensor) -> Tensor:
    """Reads its neighbour."""
    return reference.silu(x.roll(1))


def wrong_shape(x: Tensor) -> Tensor:
    return reference.silu(x).view(-1)


def wrong_dtype(x: Tensor) -> Tensor:
    return reference.silu(x).double()


ALL = [
    zeros,
    copy,
    skip_last_tile,
    skip_last_element,
    short_arithmetic,
    unwritten,
    offset_by_one,
    wrong_shape,
    wrong_dtype,
]


def conv2d_short_accumulator(x: Tensor, weight: Tensor, **options: int) -> Tensor:
    """conv2d with an accumulator of the input type: rounded after every 18 products, as a matrix
    unit would after each of its steps of 16."""
    total = None
    for c in range(0, x.shape[1], 2):
        part = reference.conv2d(x[:, c : c + 2].float(), weight[:, c : c + 2].float(), **options)
        total = part.to(x.dtype) if total is None else (total.float() + part).to(x.dtype)
    return total
