"""One small call of a kernel, what it must come to, and how inputs are drawn and moved."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

BF16 = torch.bfloat16
# Error of a result against float64, relative in the norm: two roundings, and what fp8 costs.
ALLOWED = {torch.float32: 2e-6, torch.float16: 2e-3, BF16: 1e-2, torch.uint8: 2e-3}
ALLOWED_FP8 = 0.04  # as test_attention_fp8.py derives


@dataclass(frozen=True)
class SanitizedCall:
    """`run(*args)` on a GPU, held against `truth(*args)` of the same inputs in float64."""

    name: str
    run: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    args: tuple
    allowed: float = ALLOWED[BF16]

    def error(self, device: torch.device) -> float:
        """Relative error of a run on `device`, which is synchronised before this returns."""
        out = self.run(*(moved(a, device) for a in self.args)).cpu()
        truth = self.truth(*(wide(a) for a in self.args)).double()
        return ((out.double() - truth).norm() / truth.norm()).item()


def moved(value: Any, device: torch.device) -> Any:
    """On the device with the same strides: a slice of a fused projection stays a slice."""
    if is_dataclass(value):
        return replace(value, **{k: moved(v, device) for k, v in vars(value).items()})
    if not isinstance(value, Tensor):
        return value
    if value._base is None:
        return value.to(device)
    there = value._base.to(device)
    return there.as_strided(value.shape, value.stride(), value.storage_offset())


def wide(value: Any) -> Any:
    if is_dataclass(value):
        return replace(value, **{k: wide(v) for k, v in vars(value).items()})
    if isinstance(value, torch.dtype):
        return torch.float64
    is_float = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16, BF16)
    return value.double() if is_float else value


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    values = (scale * torch.randn(shape)).to(BF16)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values
