"""A case: one op at one shape, with the work it must do and the peers it is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PEERS = ("torch-eager", "torch-compile", "cudnn", "flash", "cublas", "bf16", "copy")


class Draw:
    """Random inputs of one device, dtype and seed.

    Never zeros: a matrix product of zeros draws less power and runs about 13 % faster on an H200.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values of standard deviation `scale`, contiguous."""
        values = torch.randn(
            shape, generator=self.generator, device=self.device, dtype=torch.float32
        )
        return values.mul_(scale).to(self.dtype)

    def image(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values [B, C, H, W] (or a filter [O, C, R, S]) stored channels last."""
        return self.normal(*shape, scale=scale).contiguous(memory_format=torch.channels_last)

    def frames(self, *shape: int) -> Tensor:
        """uint8 values over the whole range, contiguous."""
        return torch.randint(
            0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8
        )


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: the registry's name.
        name: the case string of the results, unique within the op.
        make: draws the op's arguments, in the op's own order.
        flops: useful floating-point operations (a multiply-add counts two).
        elements: elements of the op's dtype that must move: each input once, each output once.
        fixed_bytes: bytes that must move whatever the dtype (uint8 frames).
        dtypes: dtypes measured when none is asked for.
        peers: what it is timed against in the same run.
        weights: positions of the arguments that come from device memory in a model; they are the
            ones rotated for the `cold-weights` timing.
        quick: kept by `--quick`.
        layout: how images are stored: "nhwc", "nchw" or "" where it means nothing.
    """

    op: str
    name: str
    make: Callable[[Draw], tuple]
    flops: int
    elements: int
    fixed_bytes: int = 0
    dtypes: tuple[str, ...] = ("bfloat16",)
    peers: tuple[str, ...] = ("torch-eager",)
    weights: tuple[int, ...] = ()
    quick: bool = False
    layout: str = ""

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """elements * itemsize + fixed_bytes: the least that any kernel moves."""
        return self.elements * dtype.itemsize + self.fixed_bytes

    def flops_in(self, dtype: torch.dtype) -> int:
        """`flops`: by default the same in every dtype."""
        return self.flops
