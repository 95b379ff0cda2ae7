"""Table: bits, shifts, comparisons, selections and moves."""

import numpy as np

from mirage_hello.ptx.emulator import arith, bits, integer
from mirage_hello.ptx.emulator.formats import split2
from mirage_hello.ptx.emulator.instructions_arithmetic import elementwise, is_float
from mirage_hello.ptx.emulator.operands import (
    List,
    Slot,
    Special,
)
from mirage_hello.ptx.emulator.table import instruction, kind_bits


@instruction("and", "or", "xor")
def logic(op):
    kind = op.kind
    ufunc = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op.base]
    return elementwise(op, ufunc, (kind, kind), kind)


@instruction("not")
def invert(op):
    return elementwise(op, np.bitwise_not, (op.kind,), op.kind)


@instruction("cnot")
def cnot(op):
    kind = op.kind
    return elementwise(op, lambda a: integer.cnot(kind, a), (kind,), kind)


@instruction("shl", "shr")
def shift(op):
    kind, function = op.kind, integer.shl if op.base == "shl" else integer.shr
    return elementwise(op, lambda a, n: function(kind, a, n), (kind, "u32"), kind)


@instruction("shf")
def funnel(op):
    direction, mode = op.mods[0], op.mods[1]
    return elementwise(
        op, lambda a, b, n: integer.shf(direction, mode, a, b, n), ("b32",) * 3, "b32"
    )


@instruction("lop3")
def lop3(op):
    if op.has("or", "and") and len(op.operands) > 5:
        op.unsupported("with a predicate result is not supported; extend instructions_logic.py")
    table = int(op.operands[4].value)
    return elementwise(op, lambda a, b, c, _=None: bits.lop3(a, b, c, table), ("b32",) * 3, "b32")


@instruction("bfe")
def bfe(op):
    kind = op.kind
    return elementwise(op, lambda a, p, n: bits.bfe(kind, a, p, n), (kind, "u32", "u32"), kind)


@instruction("bfi")
def bfi(op):
    kind = op.kind
    return elementwise(
        op, lambda a, b, p, n: bits.bfi(kind, a, b, p, n), (kind, kind, "u32", "u32"), kind
    )


@instruction("brev")
def brev(op):
    kind = op.kind
    return elementwise(op, lambda a: bits.brev(kind, a), (kind,), kind)


@instruction("popc", "clz")
def count_bits(op):
    kind, function = op.kind, getattr(bits, op.base)
    return elementwise(op, lambda a: function(kind, a), (kind,), "u32")


@instruction("bfind")
def bfind(op):
    kind, shiftamt = op.kind, op.has("shiftamt")
    return elementwise(op, lambda a: bits.bfind(kind, a, shiftamt), (kind,), "u32")


@instruction("prmt")
def prmt(op):
    mode = next((m for m in op.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)
    return elementwise(op, lambda a, b, s: bits.prmt(a, b, s, mode), ("b32",) * 3, "b32")


@instruction("dp4a")
def dp4a(op):
    ka, kb = op.types[0], op.types[1]
    return elementwise(op, lambda a, b, c: bits.dp4a(ka, kb, a, b, c), (ka, kb, "u32"), "u32")


@instruction("dp2a")
def dp2a(op):
    half, ka, kb = op.mods[0], op.types[0], op.types[1]
    return elementwise(op, lambda a, b, c: bits.dp2a(half, ka, kb, a, b, c), (ka, kb, "u32"), "u32")


@instruction("sad")
def sad(op):
    kind = op.kind
    return elementwise(op, lambda a, b, c: bits.sad(kind, a, b, c), (kind,) * 3, kind)


# ---- comparisons -----------------------------------------------------------------------------
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparer(op):
    """function (a, b) -> bool array of the comparison named in the opcode."""
    name, kind, ftz = op.mods[0], op.kind, op.has("ftz")
    if is_float(kind):
        return lambda a, b: arith.compare(name, kind, a, b, ftz)
    ufunc = arith.COMPARISONS.get(_UNSIGNED.get(name, name))
    if ufunc is None:
        op.fail(f"has no integer comparison .{name}")
    if kind[0] == "s" and name not in ("eq", "ne"):
        signed = np.dtype(f"i{int(kind[1:]) // 8}")
        return lambda a, b: ufunc(_as(a, signed), _as(b, signed))
    return ufunc


def _as(values, dtype):
    return np.ascontiguousarray(values).view(dtype)


_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp")
def setp(op):
    kind = op.kind
    first, second = op.pair(0)
    if kind.endswith("x2"):
        return _setp_packed(op, first, second)
    compare, a, b = comparer(op), op.src(1, kind), op.src(2, kind)
    combine = next((_COMBINE[m] for m in op.mods if m in _COMBINE), None)
    with_ = op.src(3, "pred") if combine else None
    put = op.writer(first, "pred")
    put_other = op.writer(second, "pred") if second is not None else None
    if combine is None and put_other is None:
        return lambda lanes: put(lanes, compare(a(lanes), b(lanes)))

    def run(lanes):
        answer, other = compare(a(lanes), b(lanes)), None
        if combine:
            c = with_(lanes)
            answer, other = combine(answer, c), combine(~answer, c)
        put(lanes, answer)
        if put_other:
            put_other(lanes, ~answer if other is None else other)

    return run


def _setp_packed(op, first, second):
    half, name, ftz = op.kind[:-2], op.mods[0], op.has("ftz")
    a, b = op.src(1, op.kind), op.src(2, op.kind)
    puts = [op.writer(p, "pred") for p in (first, second)]

    def run(lanes):
        pairs = zip(split2(a(lanes), half), split2(b(lanes), half), strict=True)
        for put, (x, y) in zip(puts, pairs, strict=True):
            put(lanes, arith.compare(name, half, x, y, ftz))

    return run


@instruction("set")
def set_(op):
    dst, kind = op.types[-2], op.types[-1]
    if kind.endswith("x2"):
        op.unsupported("on packed types is not supported; extend instructions_logic.py")
    compare, a, b, put = comparer(op), op.src(1, kind), op.src(2, kind), op.dst(0, dst)
    one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}.get(dst, (1 << kind_bits(dst)) - 1)
    combine = next((_COMBINE[m] for m in op.mods if m in _COMBINE), None)
    with_ = op.src(3, "pred") if combine else None
    dtype = np.dtype(f"u{kind_bits(dst) // 8}")

    def run(lanes):
        answer = compare(a(lanes), b(lanes))
        if combine:
            answer = combine(answer, with_(lanes))
        put(lanes, np.where(answer, dtype.type(one), dtype.type(0)))

    return run


@instruction("selp")
def selp(op):
    a, b, p = op.src(1, op.kind), op.src(2, op.kind), op.src(3, "pred")
    put = op.dst(0, op.kind)
    return lambda lanes: put(lanes, np.where(p(lanes), a(lanes), b(lanes)))


@instruction("slct")
def slct(op):
    kind, by = op.types[-2], op.types[-1]
    a, b, c, put = op.src(1, kind), op.src(2, kind), op.src(3, by), op.dst(0, kind)
    view = np.float32 if by == "f32" else np.int32
    return lambda lanes: put(lanes, np.where(_as(c(lanes), view) >= 0, a(lanes), b(lanes)))


# ---- moves -----------------------------------------------------------------------------------
@instruction("mov")
def mov(op):
    kind = op.kind
    target, source = op.operands[0], op.operands[1]
    if isinstance(target, List):
        return _unpack(op, target.elements, kind)
    if isinstance(source, List):
        return _pack(op, source.elements, kind)
    if isinstance(source, Special) and kind_bits(kind) == 64:
        return elementwise(op, lambda a: a.astype(np.uint64), ("u64",), kind)
    if isinstance(source, Slot) and isinstance(target, Slot) and source.bits != target.bits:
        op.fail(
            f"moves between {source.name} ({source.bits} bits) and {target.name} ({target.bits})"
        )
    a, put = op.src(1, kind), op.dst(0, kind)
    return lambda lanes: put(lanes, a(lanes))


def _unpack(op, elements, kind):
    """mov.b64 {%lo, %hi}, %w"""
    part = kind_bits(kind) // len(elements)
    a = op.src(1, kind)
    puts = [op.writer(e, f"b{part}", widen=True) for e in elements]
    small, n = np.dtype(f"u{part // 8}"), len(elements)

    def run(lanes):
        parts = np.ascontiguousarray(lanes.full(a(lanes))).view(small).reshape(-1, n)
        parts = parts.copy()
        for i, put in enumerate(puts):
            put(lanes, parts[:, i])

    return run


def _pack(op, elements, kind):
    """mov.b64 %w, {%lo, %hi}"""
    n = len(elements)
    part = kind_bits(kind) // n
    sources = [op.reader(e, f"b{part}") for e in elements]
    put, wide = op.dst(0, kind), np.dtype(f"u{kind_bits(kind) // 8}")
    small = np.dtype(f"u{part // 8}")

    def run(lanes):
        table = np.empty((lanes.n, n), small)
        for i, source in enumerate(sources):
            table[:, i] = source(lanes)
        put(lanes, table.view(wide)[:, 0])

    return run
