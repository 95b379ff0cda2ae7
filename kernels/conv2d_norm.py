"""The norm that conv2d.sm90a applies while it reads, and what ptx/normalise.j2 is told of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mirage_hello.ptx import loader

# A block merges the sums of a group with 4 threads, 8 loads in flight each. More rounds than these
# take longer than a kernel of their own (some 700 clocks a round; not measured).
MERGED_AT_ONCE, MERGE_ROUNDS = 32, 6


@dataclass(frozen=True)
class Norm:
    """GroupNorm(+SiLU) of a convolution's input, by the sums that the input's producer left.

    Args:
        sums: of x, float32 [B, S, C / unit, 4].
        groups: of cat([x, skip]); a group is a whole number of units.
        weight, bias: [C + C'] in the dtype of x.
        skip_sums: of the skip, float32 [B, S', C' / unit, 4], where there is one.
        eps: added to the variance.
        silu: whether SiLU follows.
    """

    sums: Tensor
    groups: int
    weight: Tensor
    bias: Tensor
    skip_sums: Tensor | None = None
    eps: float = 1e-5
    silu: bool = True


def merge_sums(sums: Tensor) -> Tensor:
    """sums [B, S, U, 4] merged over their parts: [B, 1, U, 4]."""
    batch, parts, units, _ = sums.shape
    out = torch.empty((batch, 1, units, 4), device=sums.device)
    merge = loader.program("merge_sums")
    merge.launch("merge_sums", grid=(units, batch), block=(128,), args=(sums, out, parts))
    return out


def merged_early(norm: Norm, x: Tensor) -> Norm:
    """A norm with few enough parts that every block can merge them itself."""
    group_units = norm.weight.numel() // norm.groups * norm.sums.shape[2] // x.shape[1]
    most = MERGE_ROUNDS * MERGED_AT_ONCE // group_units

    def few(sums: Tensor) -> Tensor:
        return sums if sums.shape[1] <= max(most, 1) else merge_sums(sums)

    of_skip = None if norm.skip_sums is None else few(norm.skip_sums)
    return replace(norm, sums=few(norm.sums), skip_sums=of_skip)


def norm_args(norm: Norm, x: Tensor, skip: Tensor | None, images: int) -> tuple[Any, ...]:
    """What ptx/normalise.j2 reads: the sums and how a group's entries follow each other."""
    _, parts, units, _ = norm.sums.shape
    most = parts
    of_skip: tuple[Any, ...] = ()
    if skip is not None:
        assert norm.skip_sums is not None
        _, skip_parts, skip_units, _ = norm.skip_sums.shape
        of_skip = norm.skip_sums, skip_parts, skip_units, skip.shape[1]
        most = max(parts, skip_parts)
    width = norm.weight.numel() // norm.groups
    group_units = width * units // x.shape[1]
    rounds = -(-most * group_units // MERGED_AT_ONCE)
    magic = -(-(2**32) // width)
    return (
        norm.sums, parts, units, *of_skip, norm.weight, norm.bias, norm.groups, group_units,
        magic, 4 // group_units, 4 % group_units, rounds, images, norm.eps,
    )  # fmt: skip
