"""`noise.hashed` of up to four keys as one Triton kernel: torch's 11 launches a key become one.

Hashes were 60 % of the bytes that a rendered frame moved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.model.data.raycast_triton import mixed

BLOCK = 1024
KEYS = 4


@triton.jit
def key_at(pointer, number, row, column, row_stride, column_stride, inside, kind: tl.constexpr):
    """One key: a number (kind 1) or an element of a tensor (kind 2)."""
    if kind == 1:
        return number + tl.zeros_like(column)
    return tl.load(pointer + row * row_stride + column * column_stride, inside, 0)


NUMBERS = [f"{kind}{i}" for kind in "nrc" for i in range(KEYS)]


@triton.jit(do_not_specialize=NUMBERS)  # else each mixture of strides is compiled anew
def hash_kernel(
    out, p0, p1, p2, p3, n0, n1, n2, n3, r0, r1, r2, r3, c0, c1, c2, c3, columns,
    k0: tl.constexpr, k1: tl.constexpr, k2: tl.constexpr, k3: tl.constexpr,
    as_uniform: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out [rows, columns]; p, n, r, c: each key's tensor, number, row and column stride."""
    row = tl.program_id(1)
    column = tl.program_id(0) * block + tl.arange(0, block)
    inside = column < columns
    h = mixed(tl.zeros_like(column), key_at(p0, n0, row, column, r0, c0, inside, k0))
    if k1 > 0:
        h = mixed(h, key_at(p1, n1, row, column, r1, c1, inside, k1))
    if k2 > 0:
        h = mixed(h, key_at(p2, n2, row, column, r2, c2, inside, k2))
    if k3 > 0:
        h = mixed(h, key_at(p3, n3, row, column, r3, c3, inside, k3))
    place = out + row * columns + column
    if as_uniform:
        tl.store(place, (h & 0xFFFFFF).to(tl.float32) * (1.0 / 16777216.0), inside)
    else:
        tl.store(place, h, inside)


def fits(keys: tuple) -> bool:
    """Whether the kernel takes these keys: tensors of at most two dimensions on a CUDA device."""
    tensors = [k for k in keys if isinstance(k, Tensor)]
    return (
        len(keys) <= KEYS
        and all(t.is_cuda and t.dim() <= 2 for t in tensors)
        and max(t.numel() for t in tensors) > BLOCK
    )


def hashed(keys: tuple, as_uniform: bool) -> Tensor:
    """`noise.hashed(*keys)`, or `noise.uniform(*keys)`."""
    tensors = [k.to(torch.int32) for k in keys if isinstance(k, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    rows, columns = (1, *shape)[-2:]
    dtype = torch.float32 if as_uniform else torch.int32
    out = torch.empty(shape, dtype=dtype, device=tensors[0].device)
    pointers, numbers, strides, kinds = [], [], [], []
    rest = iter(tensors)
    for key in keys:
        if isinstance(key, Tensor):
            wide = next(rest).expand(shape)
            pointers.append(wide)
            numbers.append(0)
            strides.append((0, *wide.stride())[-2:])
            kinds.append(2)
        else:
            pointers.append(tensors[0])
            numbers.append(key)
            strides.append((0, 0))
            kinds.append(1)
    for _ in range(KEYS - len(keys)):
        pointers.append(tensors[0])
        numbers.append(0)
        strides.append((0, 0))
        kinds.append(0)
    grid = (triton.cdiv(columns, BLOCK), rows)
    hash_kernel[grid](
        out, *pointers, *numbers, *(s[0] for s in strides), *(s[1] for s in strides), columns,
        *kinds, as_uniform, BLOCK,
    )  # fmt: skip
    return out
