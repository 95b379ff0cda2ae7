"""The sentences of the contracts' checks: what failed, got, expected, what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_hello.kernels.call import TensorSpec


def one_floating_dtype(op: str, tensors: Mapping[str, TensorSpec | None]) -> None:
    """TypeError unless all the tensors share one floating dtype."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given))
    dtype = given[first].dtype
    if not dtype.is_floating_point:
        raise TypeError(
            f"{op}: {first} must be floating (got {dtype}); convert it with .to(torch.float32)"
        )
    for name, t in given.items():
        if t.dtype != dtype:
            raise TypeError(
                f"{op}: {name} must have {first}'s dtype (got {t.dtype}, expected {dtype}); "
                f"convert it with .to({dtype})"
            )


def dimensions(op: str, name: str, t: TensorSpec, letters: str) -> None:
    """ValueError unless t has as many dimensions as `letters` names: "B, C, H, W"."""
    if t.dim != len(letters.split(", ")):
        raise ValueError(
            f"{op}: {name} must be [{letters}] (got {tuple(t.shape)}); reshape or unsqueeze it"
        )


def shape(
    op: str, name: str, t: TensorSpec | None, expected: Sequence[int], letters: str, advice: str
) -> None:
    """ValueError unless t is None or has the expected shape, which `letters` spells out."""
    if t is not None and tuple(t.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} must be [{letters}] = {tuple(expected)} (got {tuple(t.shape)}); {advice}"
        )


def whole_number(op: str, name: str, value: Any, at_least: int) -> None:
    """TypeError unless an int, ValueError below `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{op}: {name} must be an int (got {value!r}); the op takes one for both axes"
        )
    if value < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least} (got {value})")
