"""Integer and bit instruction forms."""

from functools import partial

import numpy as np
from ptx_forms import scalar
from ptx_forms_oracle import whole

KINDS = ("s16", "u16", "s32", "u32", "s64", "u64")


def truncated(x, y):
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


def clamp(value):
    return min(max(value, -(1 << 31)), (1 << 31) - 1)


def nonzero_divisors(arrays, _rng):
    """Division by zero is undefined."""
    return [arrays[0], np.where(arrays[1] == 0, arrays[1].dtype.type(7), arrays[1])]


BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda x, y: x - y * truncated(x, y),
}
TERNARY = {
    "mad.lo": lambda x, y, z: x * y + z,
    "sad": lambda x, y, z: z + abs(x - y),
}
SATURATED = {
    "add.sat.s32": (2, lambda x, y: clamp(x + y)),
    "sub.sat.s32": (2, lambda x, y: clamp(x - y)),
    "mad.hi.sat.s32": (3, lambda x, y, z: clamp((x * y >> 32) + z)),
}


def arithmetic(kind):
    form = partial(scalar, results=[kind], group="integer_arithmetic")
    width, two, three = int(kind[1:]), [kind] * 2, [kind] * 3
    for op, function in BINARY.items():
        adjust = nonzero_divisors if op in ("div", "rem") else None
        oracle = whole(kind, two, function)
        yield form(f"{op}.{kind}", sources=two, oracle=oracle, adjust=adjust)
    for op, function in TERNARY.items():
        yield form(f"{op}.{kind}", sources=three, oracle=whole(kind, three, function))
    oracle = whole(kind, two, lambda x, y: x * y >> width)
    yield form(f"mul.hi.{kind}", sources=two, oracle=oracle)
    oracle = whole(kind, three, lambda x, y, z: (x * y >> width) + z)
    yield form(f"mad.hi.{kind}", sources=three, oracle=oracle)
    if kind[0] == "s":
        yield form(f"neg.{kind}", sources=[kind], oracle=whole(kind, [kind], lambda x: -x))
        yield form(f"abs.{kind}", sources=[kind], oracle=whole(kind, [kind], abs))
    if width < 64:
        wide = f"{kind[0]}{2 * width}"
        form = partial(scalar, results=[wide], group="integer_arithmetic")
        oracle = whole(wide, two, lambda x, y: x * y)
        yield form(f"mul.wide.{kind}", sources=two, oracle=oracle)
        oracle = whole(wide, [*two, wide], lambda x, y, z: x * y + z)
        yield form(f"mad.wide.{kind}", sources=[*two, wide], oracle=oracle)


def special_arithmetic():
    group = "integer_arithmetic"
    for name, (count, function) in SATURATED.items():
        sources = ["s32"] * count
        oracle = whole("s32", sources, function)
        yield scalar(name, ["s32"], sources, group=group, oracle=oracle)
    oracle = whole("s32", ["s32"] * 2, lambda x, y: max(min(x, y), 0))
    relu = {"group": "integer_arithmetic", "target": "sm_90", "oracle": oracle}
    yield scalar("min.relu.s32", ["s32"], ["s32"] * 2, **relu)
    for kind in ("s32", "u32"):
        yield scalar(f"mul24.lo.{kind}", [kind], [kind] * 2, group=group)
        for op in ("dp4a", "dp2a.lo", "dp2a.hi"):
            yield scalar(f"{op}.{kind}.{kind}", [kind], [kind] * 3, group=group)
    text = "add.u32 %d0, %a0, 4294967295;"
    yield scalar("add.u32 immediate", ["u32"], ["u32"], text, group=group)
    text = "mad.lo.u32 %d0, %a0, 8, %a0;"
    yield scalar("mad.lo.u32 immediate", ["u32"], ["u32"], text, group=group)
    text = "mul.wide.u32 %d0, %a0, 0xD2511F53;"
    yield scalar("mul.wide.u32 immediate", ["u64"], ["u32"], text, group=group)


def small_counts(limit):
    """The last operand becomes a shift amount below `limit`."""

    def adjust(arrays, rng):
        return [*arrays[:-1], rng.integers(0, limit, len(arrays[-1])).astype(np.uint32)]

    return adjust


def fields(arrays, rng):
    """Positions and lengths of a bit field, up to past the register's end."""
    limit = arrays[0].dtype.itemsize * 8 + 12
    *values, position, length = arrays
    moved = (rng.integers(0, limit, len(p)).astype(np.uint32) for p in (position, length))
    return [*values, *moved]


def logic(kind):
    form = partial(scalar, results=[kind], group="bits")
    width = int(kind[1:])
    for op in ("and", "or", "xor"):
        yield form(f"{op}.{kind}", sources=[kind] * 2)
    for op in ("not", "cnot"):
        yield form(f"{op}.{kind}", sources=[kind])
    for op in (f"shl.b{width}", f"shr.b{width}", f"shr.u{width}", f"shr.s{width}"):
        yield form(op, sources=[kind, "u32"], adjust=small_counts(width + 8))


def bit_fields():
    form = partial(scalar, group="bits")
    for kind in ("b32", "b64"):
        for op in ("popc", "clz"):
            yield form(f"{op}.{kind}", ["u32"], [kind])
        yield form(f"brev.{kind}", [kind], [kind])
        yield form(f"bfi.{kind}", [kind], [kind, kind, "u32", "u32"], adjust=fields)
    for kind in ("u32", "s32", "u64", "s64"):
        yield form(f"bfe.{kind}", [kind], [kind, "u32", "u32"], adjust=fields)
        yield form(f"bfind.{kind}", ["u32"], [kind])
        yield form(f"bfind.shiftamt.{kind}", ["u32"], [kind])


def words():
    form, three = partial(scalar, group="bits"), ["b32"] * 3
    for op in ("shf.l.wrap.b32", "shf.l.clamp.b32", "shf.r.wrap.b32", "shf.r.clamp.b32"):
        yield form(op, ["b32"], ["b32", "b32", "u32"], adjust=small_counts(40))
    for table in (0x96, 0xE8, 0xCA, 0x1D, 0x00, 0xFF):
        text = f"lop3.b32 %d0, %a0, %a1, %a2, {table:#x};"
        yield form(f"lop3.b32 {table:#x}", ["b32"], three, text)
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        yield form(f"prmt.b32{mode}", ["b32"], three)
    text = "prmt.b32 %d0, %a0, %a1, 0x5410;"
    yield form("prmt.b32 immediate", ["b32"], ["b32"] * 2, text)
    yield form("mov.b64 unpack", ["b32", "b32"], ["b64"], "mov.b64 {%d0, %d1}, %a0;")
    yield form("mov.b64 pack", ["b64"], ["b32", "b32"], "mov.b64 %d0, {%a0, %a1};")
    yield form("mov.b32 unpack", ["b16", "b16"], ["b32"], "mov.b32 {%d0, %d1}, %a0;")
    yield form("mov.b32 pack", ["b32"], ["b16", "b16"], "mov.b32 %d0, {%a0, %a1};")
    text = "mov.f32 %d0, 0fBF800001; add.f32 %d0, %d0, 0f00000000;"
    yield form("mov.f32 immediate", ["f32"], ["f32"], text)


def forms():
    """Every integer and bit form."""
    for kind in KINDS:
        yield from arithmetic(kind)
    yield from special_arithmetic()
    for kind in ("b16", "b32", "b64"):
        yield from logic(kind)
    yield from bit_fields()
    yield from words()
