"""What a cubin says about its kernels: where each parameter stands in the launch buffer."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SIZED_VALUE = 4  # EIFMT_SVAL: the 16-bit value is the length of what follows
_KPARAM_INFO = 0x17  # EIATTR_KPARAM_INFO
_FRAME_SIZE = 0x11  # EIATTR_FRAME_SIZE: (symbol, bytes)
_REGCOUNT = 0x2F  # EIATTR_REGCOUNT: (symbol, registers)


@dataclass(frozen=True)
class Param:
    offset: int
    size: int


def entries(cubin: bytes) -> list[str]:
    """Names of the kernels in an ELF cubin."""
    prefix = ".nv.info."
    return [n.removeprefix(prefix) for n, _ in _sections(cubin) if n.startswith(prefix)]


def params(cubin: bytes, entry: str) -> tuple[Param, ...]:
    """Offset and size of each parameter of `entry`, in order.

    A kernel with an over-aligned parameter (a tensor map) does not start at offset 0: parameters
    live at constant-bank address 0x210 on sm_90, which is not a multiple of 64, so the assembler
    moves the whole list (to 48 for .align 64, 112 for .align 128).

    Raises:
        KeyError: no such entry; the text lists the entries.
    """
    info = dict(_sections(cubin)).get(f".nv.info.{entry}")
    if info is None:
        raise KeyError(f"no kernel {entry} in the module (it has {', '.join(entries(cubin))})")
    found = {}
    for attribute, value in _values(info):
        if attribute == _KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", value)
            found[ordinal] = Param(offset, flags >> 18)  # bits 18..31 hold the size in bytes
    return tuple(found[i] for i in range(len(found)))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills, arrays) of a thread; the largest over all kernels."""
    most = {_REGCOUNT: 0, _FRAME_SIZE: 0}
    for attribute, value in _values(dict(_sections(cubin))[".nv.info"]):
        if attribute in most:
            most[attribute] = max(most[attribute], struct.unpack("<II", value)[1])
    return most[_REGCOUNT], most[_FRAME_SIZE]


def _values(info: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, value) of the sized entries of an .nv.info section."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED_VALUE:
            yield attribute, info[at : at + size]
            at += size


def _sections(cubin: bytes) -> list[tuple[str, bytes]]:
    if cubin[:4] != b"\x7fELF":
        raise ValueError(f"not a cubin: expected an ELF file (got {cubin[:4]!r}...)")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    stride, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * stride) for i in range(count)]
    names = headers[names_at][4]
    found = []
    for name, kind, _, _, offset, size in headers:
        start = names + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        body = b"" if kind == 8 else cubin[offset : offset + size]  # 8: SHT_NOBITS
        found.append((text, body))
    return found
