"""Memory order: what elementwise kernels need to treat tensors as flat arrays."""

import torch
from torch import Tensor


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory order of `like` (same shape): itself where it has that order, else a copy."""
    pairs = zip(x.shape, x.stride(), like.stride(), strict=True)
    if all(size == 1 or stride == wanted for size, stride, wanted in pairs):
        return x
    return torch.empty_like(like).copy_(x)


def flat(x: Tensor) -> Tensor:
    """A view [numel] of a dense tensor, whatever its layout: its elements in memory order."""
    return x.detach().as_strided((x.numel(),), (1,))
