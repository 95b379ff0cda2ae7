"""The parameter list of a kernel: types from its PTX, offsets from its cubin."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mirage_hello.ptx.cubin import Param
from mirage_hello.ptx.tensor_map import TensorMap

_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+[\w$]+\s*(?:\[(\d+)\])?")
# PTX type -> struct code, as PyCUDA's `prepare` reads it.
_CODES = {"f32": "f", "f64": "d"}
_CODES |= {f"{kind}{8 * size}": "BHIQ"[i] for i, size in enumerate((1, 2, 4, 8)) for kind in "usb"}


def parameter_codes(text: str, entry: str) -> tuple[str, ...]:
    """Struct codes of the parameters of `entry`: "Q", "I", "f", ..., "128s" for byte arrays.

    Raises:
        KeyError: the text has no such entry; the message lists those it has.
    """
    text = re.sub(r"//[^\n]*", "", text)
    found = re.search(rf"\.entry\s+{re.escape(entry)}\b\s*(?:\(([^)]*)\))?", text)
    if found is None:
        known = ", ".join(re.findall(r"\.entry\s+([\w$]+)", text))
        raise KeyError(f"no kernel {entry} in the module (it has {known})")
    listed = _PARAM.findall(found.group(1) or "")
    return tuple(f"{count}s" if count else _CODES[kind] for kind, count in listed)


def launch_format(layout: Sequence[Param], codes: Sequence[str]) -> list[str]:
    """The argument buffer as PyCUDA's `prepare` wants it, every gap spelled out.

    PyCUDA passes one flat buffer, so each value must stand at the offset that the assembler chose
    (see cubin.params). Scalars have natural alignment in both; bytes have none, hence the pads.
    """
    formats, at = [], 0
    for param, code in zip(layout, codes, strict=True):
        if param.offset > at:
            formats.append(f"{param.offset - at}x")
        formats.append(code)
        at = param.offset + param.size
    return formats


def converters(codes: Sequence[str]) -> tuple[Callable[[Any], Any], ...]:
    """One function per parameter that turns an argument into what the format takes."""
    widths = {"B": 8, "H": 16, "I": 32, "Q": 64}
    return tuple(
        _to_float if c in "fd" else _to_bytes if c.endswith("s") else _to_integer(widths[c])
        for c in codes
    )


def _to_float(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"must be a number (got {type(value).__name__})")
    return float(value)


def _to_bytes(value: Any) -> bytes:
    if not isinstance(value, TensorMap):
        raise TypeError(f"must be a TensorMap (got {type(value).__name__})")
    return value.encode()


def _to_integer(bits: int) -> Callable[[Any], int]:
    mask = (1 << bits) - 1

    def convert(value: Any) -> int:
        if isinstance(value, Tensor) and bits == 64:
            return value.data_ptr()
        if isinstance(value, int):
            return value & mask  # negative numbers as two's complement
        if value is None and bits == 64:
            return 0
        what = "a tensor, None or an int" if bits == 64 else "an int"
        raise TypeError(f"must be {what} (got {type(value).__name__})")

    return convert
