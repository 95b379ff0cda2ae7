"""Table: cvt between types, cvta between address spaces."""

import numpy as np

from mirage_hello.ptx.emulator import cvt
from mirage_hello.ptx.emulator.instructions_arithmetic import elementwise
from mirage_hello.ptx.emulator.operands import TAG_LOCAL, TAG_PARAM, TAG_SHARED, TAG_SHIFT
from mirage_hello.ptx.emulator.table import instruction


@instruction("cvt")
def convert(op):
    if op.has("pack"):
        return _convert_pack(op)
    dst, src = op.types[-2], op.types[-1]
    rounding = op.rounding(None)
    flags = {
        "ftz": op.has("ftz"),
        "sat": op.has("sat"),
        "satfinite": op.has("satfinite"),
        "relu": op.has("relu"),
    }
    sources = [op.src(1 + i, src) for i in range(len(op.operands) - 1)]
    put = op.dst(0, dst, widen=True)
    if dst == src and rounding is None and not any(flags.values()):
        return lambda lanes: put(lanes, sources[0](lanes))

    def run(lanes):
        put(lanes, cvt.convert(dst, src, tuple(s(lanes) for s in sources), rounding, **flags))

    return run


def _convert_pack(op):
    """cvt.pack.sat.<dst>.<src>{.b32} d, a, b{, c}: {c, a, b} from high to low bits."""
    dst, src = op.types[0], op.types[1]
    n = int(dst[1:])
    kinds = [src, src] + (["b32"] if len(op.operands) > 3 else [])
    low = np.uint32((1 << n) - 1)

    def run(a, b, c=None):
        ta, tb = (cvt.convert(dst, src, (v,), sat=True).astype(np.uint32) & low for v in (a, b))
        packed = (ta << np.uint32(n)) | tb
        return packed if c is None else packed | (c << np.uint32(2 * n))

    return elementwise(op, run, kinds, "b32")


_WINDOWS = {"shared": TAG_SHARED, "local": TAG_LOCAL, "param": TAG_PARAM}


@instruction("cvta")
def cvta(op):
    """Generic address <-> address in a space; global and const addresses are the same in both."""
    kind = op.kind
    spaces = (m.split("::")[0] for m in op.mods)
    tag = next((_WINDOWS[space] for space in spaces if space in _WINDOWS), None)
    if tag is None:
        return elementwise(op, lambda a: a, (kind,), kind)
    base, mask = np.uint64(tag << TAG_SHIFT), np.uint64((1 << TAG_SHIFT) - 1)
    if op.has("to"):
        return elementwise(op, lambda a: a & mask, (kind,), kind)
    return elementwise(op, lambda a: (a & mask) | base, (kind,), kind)


@instruction("isspacep")
def isspacep(op):
    space = op.mods[0].split("::")[0]
    a, put = op.src(1, "u64"), op.dst(0, "pred")
    tag = _WINDOWS.get(space)

    def run(lanes):
        tags = (a(lanes) >> np.uint64(TAG_SHIFT)).astype(np.int64)
        put(lanes, (tags == tag) if tag else (tags > 0) & (tags < TAG_SHARED))

    return run
