"""Weights made of weights: padded, folded, quantised. Kept with their module, and never stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class _Made:
    sources: tuple[Tensor, ...]
    make: Callable[[], tuple[Tensor, ...]]
    number: float
    state: list[Any]
    tensors: tuple[Tensor, ...]


def derived(
    module: nn.Module,
    sources: tuple[Tensor, ...],
    make: Callable[[], tuple[Tensor, ...]],
    number: float = 0.0,
) -> tuple[Tensor, ...]:
    """`make()`, kept with the module, and made again when a source or the number has changed.

    In the same memory where the shapes allow it, because a captured graph holds the addresses; a
    graph does not come by here, so `remake` follows a change of weights in place.
    """
    state = [number, *((t.data_ptr(), t._version) for t in sources)]
    made: _Made | None = module.__dict__.get("_derived")
    if made is None or made.state != state:
        tensors = make()
        if made is not None and _alike(made.tensors, tensors):
            for old, new in zip(made.tensors, tensors, strict=True):
                old.copy_(new)
            tensors = made.tensors
        made = module.__dict__["_derived"] = _Made(sources, make, number, state, tensors)
    return made.tensors


def remake(model: nn.Module) -> None:
    """Bring every derived weight of a model up to date."""
    for module in model.modules():
        made: _Made | None = module.__dict__.get("_derived")
        if made is not None:
            derived(module, made.sources, made.make, made.number)


def _alike(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> bool:
    return all(
        (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        for a, b in zip(old, new, strict=True)
    )
