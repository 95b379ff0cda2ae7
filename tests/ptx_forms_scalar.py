"""Scalar instruction forms: floating-point and integer arithmetic, comparisons, bits, cvt."""

import numpy as np
from ptx_forms import Tolerance, scalar
from ptx_forms_oracle import arithmetic, whole

MODES = ("rn", "rz", "rm", "rp")


def approximate(kind, relative, absolute=0.0, reason="the manual's maximum error"):
    return Tolerance(kind, relative, absolute, reason)


def add(x, y):
    return x + y


def sub(x, y):
    return x - y


def fused(x, y, z):
    return x * y + z


def nearly_cancel(arrays, _rng):
    """Every third addend of an f32 fma nearly cancels the product."""
    a, b, c = arrays
    with np.errstate(all="ignore"):
        product = -(a.view(np.float32) * b.view(np.float32))
    return [a, b, np.where(np.arange(len(c)) % 3 == 0, product.view(np.uint32), c)]


def f32_arithmetic():
    group = "f32_arithmetic"
    product = lambda x, y: x * y  # noqa: E731
    for op, function in (("add", add), ("sub", sub), ("mul", product)):
        for suffix in ("", *(f".{m}" for m in MODES), ".ftz", ".sat", ".rn.ftz", ".rz.ftz.sat"):
            mode = next((m for m in MODES if f".{m}" in suffix), "rn")
            oracle = arithmetic("f32", function, mode, ".ftz" in suffix, ".sat" in suffix)
            yield scalar(f"{op}{suffix}.f32", ["f32"], ["f32"] * 2, group=group, oracle=oracle)
    for suffix in (".rn", ".rz", ".rm", ".rp", ".rn.ftz", ".rn.sat", ".rn.ftz.sat", ".rz.ftz"):
        oracle = arithmetic("f32", fused, suffix[1:3], ".ftz" in suffix, ".sat" in suffix)
        yield scalar(f"fma{suffix}.f32", ["f32"], ["f32"] * 3, group=group, oracle=oracle,
                     adjust=nearly_cancel)  # fmt: skip
    yield scalar("mad.rn.f32", ["f32"], ["f32"] * 3, group=group, adjust=nearly_cancel,
                 oracle=arithmetic("f32", fused))  # fmt: skip
    for mode in (*MODES, "rn.ftz"):
        yield scalar(f"div.{mode}.f32", ["f32"], ["f32"] * 2, group=group)
        yield scalar(f"rcp.{mode}.f32", ["f32"], ["f32"], group=group)
        yield scalar(f"sqrt.{mode}.f32", ["f32"], ["f32"], group=group)
    for op in ("neg", "abs"):
        for suffix in ("", ".ftz"):
            yield scalar(f"{op}{suffix}.f32", ["f32"], ["f32"], group=group)
    yield scalar("copysign.f32", ["f32"], ["f32"] * 2, group=group)
    for op in ("min", "max"):
        for suffix in (
            "",
            ".ftz",
            ".NaN",
            ".ftz.NaN",
            ".NaN.ftz",
            ".xorsign.abs",
            ".NaN.xorsign.abs",
        ):
            target = "sm_86" if "xorsign" in suffix else "sm_80"
            yield scalar(f"{op}{suffix}.f32", ["f32"], ["f32"] * 2, group=group, target=target)


def sorted_exponents(low, high):
    """Inputs of an approximate function: half of them spread over 2**low .. 2**high."""

    def adjust(arrays, rng):
        a = arrays[0]
        exponent = rng.integers(127 + low, 127 + high, len(a)).astype(np.uint32) << np.uint32(23)
        spread = (a & np.uint32(0x807FFFFF)) | exponent
        return [np.where(np.arange(len(a)) % 2 == 0, spread, a), *arrays[1:]]

    return adjust


def f32_approximations():
    group = "f32_approximations"
    table = {
        "ex2": (approximate("f32", 2.0**-22), -20, 8),
        "lg2": (approximate("f32", 2.0**-22, 2.0**-22), -100, 100),
        "rcp": (approximate("f32", 2.0**-23), -125, 125),
        "rsqrt": (approximate("f32", 2.0**-22.9), -125, 125),
        "sqrt": (approximate("f32", 2.0**-22), -125, 125),
    }
    for op, (tolerance, low, high) in table.items():
        for suffix in ("", ".ftz"):
            yield scalar(f"{op}.approx{suffix}.f32", ["f32"], ["f32"], group=group, n=1024,
                         adjust=sorted_exponents(low, high), tolerance=tolerance)  # fmt: skip
    for op in ("sin", "cos"):
        for suffix in ("", ".ftz"):
            yield scalar(f"{op}.approx{suffix}.f32", ["f32"], ["f32"], group=group, n=1024,
                         adjust=within_pi, tolerance=approximate("f32", 0.0, 2.0**-20.5))  # fmt: skip
    yield scalar("tanh.approx.f32", ["f32"], ["f32"], group=group, n=1024,
                 adjust=sorted_exponents(-12, 4), tolerance=approximate("f32", 2.0**-11))  # fmt: skip
    for mode in ("full", "approx", "full.ftz", "approx.ftz"):
        yield scalar(f"div.{mode}.f32", ["f32"], ["f32"] * 2, group=group, n=1024,
                     tolerance=approximate("f32", 2.0**-22))  # fmt: skip


def within_pi(arrays, rng):
    """Angles in [-pi, pi], where the manual bounds the error, and special values."""
    a = arrays[0]
    angle = (rng.random(len(a)) * 2 - 1).astype(np.float32) * np.float32(np.pi)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80400000], np.uint32)
    out = angle.view(np.uint32).copy()
    out[: len(special)] = special
    return [out]


def f64_arithmetic():
    group = "f64_arithmetic"
    for op, function in (("add", add), ("sub", sub), ("mul", lambda x, y: x * y)):
        for mode in MODES:
            oracle = arithmetic("f64", function, mode)
            yield scalar(f"{op}.{mode}.f64", ["f64"], ["f64"] * 2, group=group, oracle=oracle)
    for mode in MODES:
        yield scalar(f"fma.{mode}.f64", ["f64"], ["f64"] * 3, group=group,
                     oracle=arithmetic("f64", fused, mode))  # fmt: skip
        yield scalar(f"div.{mode}.f64", ["f64"], ["f64"] * 2, group=group)
        yield scalar(f"rcp.{mode}.f64", ["f64"], ["f64"], group=group)
        yield scalar(f"sqrt.{mode}.f64", ["f64"], ["f64"], group=group)
    for op in ("neg", "abs"):
        yield scalar(f"{op}.f64", ["f64"], ["f64"], group=group)
    for op in ("min", "max", "copysign"):
        yield scalar(f"{op}.f64", ["f64"], ["f64"] * 2, group=group)
    for op in ("rcp", "rsqrt"):
        yield scalar(f"{op}.approx.ftz.f64", ["f64"], ["f64"], group=group,
                     tolerance=approximate("f64", 2.0**-19))  # fmt: skip


def half_arithmetic():
    for kind in ("f16", "f16x2", "bf16", "bf16x2"):
        half, f16 = kind.replace("x2", ""), kind[0] == "f"
        options = {"group": f"{half}_arithmetic", "target": "sm_80" if f16 else "sm_90"}
        wide = kind.endswith("x2")
        for op, function in (("add", add), ("sub", sub), ("mul", lambda x, y: x * y)):
            # The manual rounds bf16 add, sub and mul to nearest only under an explicit .rn.
            for suffix in (".rn", ".rn.ftz", ".rn.sat", ".rn.ftz.sat") if f16 else (".rn",):
                oracle = arithmetic(half, function, "rn", ".ftz" in suffix, ".sat" in suffix)
                yield scalar(f"{op}{suffix}.{kind}", [kind], [kind] * 2,
                             oracle=None if wide else oracle, **options)  # fmt: skip
        suffixes = ("", ".ftz", ".sat", ".relu", ".ftz.relu") if f16 else ("", ".relu")
        for suffix in suffixes:
            flags = (".ftz" in suffix, ".sat" in suffix, ".relu" in suffix)
            yield scalar(f"fma.rn{suffix}.{kind}", [kind], [kind] * 3,
                         oracle=None if wide else arithmetic(half, fused, "rn", *flags),
                         **{**options, "target": "sm_80"})  # fmt: skip
        for op in ("neg", "abs"):
            for suffix in ("", ".ftz") if f16 else ("",):
                yield scalar(
                    f"{op}{suffix}.{kind}", [kind], [kind], **{**options, "target": "sm_80"}
                )
        for op in ("min", "max"):
            for suffix in ("", ".NaN", ".xorsign.abs", *((".ftz",) if f16 else ())):
                target = "sm_86" if "xorsign" in suffix else "sm_80"
                yield scalar(
                    f"{op}{suffix}.{kind}", [kind], [kind] * 2, **{**options, "target": target}
                )
        yield from half_approximations(kind, half, options)


def half_approximations(kind, half, options):
    ulp = {"f16": 2.0**-10, "bf16": 2.0**-7}[half]
    options = {**options, "target": "sm_90"}
    middle = "approx.ftz" if half == "bf16" else "approx"
    smallest = 2.0**-23 if half == "f16" else 0.0
    yield scalar(f"ex2.{middle}.{kind}", [kind], [kind], **options,
                 tolerance=approximate(half, 2 * ulp, smallest))  # fmt: skip
    yield scalar(f"tanh.approx.{kind}", [kind], [kind], **options,
                 tolerance=approximate(half, 2 * ulp, smallest))  # fmt: skip


COMPARISONS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
)


def comparisons():
    group = "comparisons"
    for op in COMPARISONS:
        yield scalar(f"setp.{op}.f32", ["pred"], ["f32"] * 2, group=group)
    for op in ("lt", "geu", "eq"):
        yield scalar(f"setp.{op}.ftz.f32", ["pred"], ["f32"] * 2, group=group)
        yield scalar(f"setp.{op}.f64", ["pred"], ["f64"] * 2, group=group)
        yield scalar(f"setp.{op}.f16", ["pred"], ["f16"] * 2, group=group)
        yield scalar(f"setp.{op}.bf16", ["pred"], ["bf16"] * 2, group=group, target="sm_90")
        for kind in ("f16x2", "bf16x2"):
            name = f"setp.{op}.{kind}"
            yield scalar(name, ["pred", "pred"], [kind] * 2, f"{name} %d0|%d1, %a0, %a1;",
                         group=group, target="sm_90")  # fmt: skip
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64", "b32"):
        for op in ("eq", "ne") if kind[0] == "b" else ("eq", "ne", "lt", "le", "gt", "ge"):
            yield scalar(f"setp.{op}.{kind}", ["pred"], [kind] * 2, group=group)
    for op in ("lo", "ls", "hi", "hs"):
        yield scalar(f"setp.{op}.u32", ["pred"], ["u32"] * 2, group=group)
    for join in ("and", "or", "xor"):
        text = f"setp.ne.u32 %p0, %a2, 0; setp.lt.{join}.s32 %d0|%d1, %a0, %a1, %p0;"
        yield scalar(f"setp.lt.{join}.s32", ["pred"] * 2, ["s32", "s32", "u16"],
                     text.replace("%a2, 0", "%t6, 0").replace("setp.ne", "cvt.u32.u16 %t6, %a2; setp.ne"),
                     group=group)  # fmt: skip
    for op, kind in (
        ("eq.and", "u32"),
        ("gt.and", "u32"),
        ("ne.or", "u32"),
        ("ge.or", "u64"),
        ("geu.or", "f32"),
    ):
        yield scalar(
            f"setp.{op}.{kind}",
            ["pred"],
            [kind, kind, "u32"],
            group=group,
            instructions=(f"setp.gt.u32 %p0, %a2, 999; setp.{op}.{kind} %d0, %a0, %a1, %p0;"),
        )
    yield scalar("setp.lt.and.u32 negated", ["pred"], ["u32"] * 2, group=group,
                 instructions="setp.gt.u32 %p0, %a0, 77; setp.lt.and.u32 %d0, %a0, %a1, !%p0;")  # fmt: skip
    for op in ("and", "or", "xor"):
        yield scalar(f"{op}.pred", ["pred"], ["u32"] * 2, group=group, instructions=(
            f"setp.gt.u32 %p0, %a0, 77; setp.lt.u32 %p1, %a0, %a1; {op}.pred %d0, %p0, %p1;"))  # fmt: skip
    yield scalar(
        "not.pred", ["pred"], ["u32"], "setp.gt.u32 %p0, %a0, 77; not.pred %d0, %p0;", group=group
    )
    for kind in ("u32", "f32"):
        yield scalar(f"set.lt.{kind}.f32", [kind], ["f32"] * 2, group=group)
    yield scalar("set.ge.u32.s32", ["u32"], ["s32"] * 2, group=group)
    for kind in ("b16", "b32", "b64", "f32", "f64", "u32"):
        yield scalar(f"selp.{kind}", [kind], [kind, kind, "u32"], group=group,
                     instructions=f"setp.gt.u32 %p0, %a2, 999; selp.{kind} %d0, %a0, %a1, %p0;")  # fmt: skip
    yield scalar("slct.u32.s32", ["u32"], ["u32", "u32", "s32"], group=group)
    yield scalar("slct.f32.f32", ["f32"], ["f32"] * 3, group=group)
    for test in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
        yield scalar(f"testp.{test}.f32", ["pred"], ["f32"], group=group)


def truncated(x, y):
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


def nonzero_divisors(arrays, _rng):
    """Division by zero is undefined."""
    return [arrays[0], np.where(arrays[1] == 0, arrays[1].dtype.type(7), arrays[1])]


INTEGER_BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda x, y: x - y * truncated(x, y),
}


def integer_arithmetic():
    group = "integer_arithmetic"
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        width = int(kind[1:])
        for op, function in INTEGER_BINARY.items():
            yield scalar(f"{op}.{kind}", [kind], [kind] * 2, group=group,
                         oracle=whole(kind, [kind] * 2, function),
                         adjust=nonzero_divisors if op in ("div", "rem") else None)  # fmt: skip
        high = lambda x, y, w=width: x * y >> w  # noqa: E731
        yield scalar(
            f"mul.hi.{kind}", [kind], [kind] * 2, group=group, oracle=whole(kind, [kind] * 2, high)
        )
        yield scalar(f"mad.lo.{kind}", [kind], [kind] * 3, group=group,
                     oracle=whole(kind, [kind] * 3, lambda x, y, z: x * y + z))  # fmt: skip
        yield scalar(f"mad.hi.{kind}", [kind], [kind] * 3, group=group,
                     oracle=whole(kind, [kind] * 3, lambda x, y, z, w=width: (x * y >> w) + z))  # fmt: skip
        yield scalar(f"sad.{kind}", [kind], [kind] * 3, group=group,
                     oracle=whole(kind, [kind] * 3, lambda x, y, z: z + abs(x - y)))  # fmt: skip
        if width < 64:
            wide = f"{kind[0]}{2 * width}"
            yield scalar(f"mul.wide.{kind}", [wide], [kind] * 2, group=group,
                         oracle=whole(wide, [kind] * 2, lambda x, y: x * y))  # fmt: skip
            yield scalar(f"mad.wide.{kind}", [wide], [kind, kind, wide], group=group,
                         oracle=whole(wide, [kind, kind, wide], fused))  # fmt: skip
        if kind[0] == "s":
            yield scalar(
                f"neg.{kind}", [kind], [kind], group=group, oracle=whole(kind, [kind], lambda x: -x)
            )
            yield scalar(
                f"abs.{kind}", [kind], [kind], group=group, oracle=whole(kind, [kind], abs)
            )
    clamp = lambda v: min(max(v, -(1 << 31)), (1 << 31) - 1)  # noqa: E731
    for op, function in (("add", add), ("sub", sub)):
        saturated = lambda x, y, f=function: clamp(f(x, y))  # noqa: E731
        yield scalar(
            f"{op}.sat.s32",
            ["s32"],
            ["s32"] * 2,
            group=group,
            oracle=whole("s32", ["s32"] * 2, saturated),
        )
    yield scalar("mad.hi.sat.s32", ["s32"], ["s32"] * 3, group=group,
                 oracle=whole("s32", ["s32"] * 3, lambda x, y, z: clamp((x * y >> 32) + z)))  # fmt: skip
    for kind in ("s32", "u32"):
        yield scalar(f"mul24.lo.{kind}", [kind], [kind] * 2, group=group)
        yield scalar(f"dp4a.{kind}.{kind}", [kind], [kind] * 3, group=group)
        yield scalar(f"dp2a.lo.{kind}.{kind}", [kind], [kind] * 3, group=group)
        yield scalar(f"dp2a.hi.{kind}.{kind}", [kind], [kind] * 3, group=group)
    for name, text in (
        ("add.u32 immediate", "add.u32 %d0, %a0, 4294967295;"),
        ("mul.wide.u32 immediate", None),
        ("mad.lo.u32 immediate", "mad.lo.u32 %d0, %a0, 8, %a0;"),
    ):
        if text:
            yield scalar(name, ["u32"], ["u32"], text, group=group)
    yield scalar(
        "mul.wide.u32 immediate",
        ["u64"],
        ["u32"],
        "mul.wide.u32 %d0, %a0, 0xD2511F53;",
        group=group,
    )


def small_counts(limit):
    """The last operand becomes a shift amount or field position near `limit`."""

    def adjust(arrays, rng):
        return [*arrays[:-1], rng.integers(0, limit, len(arrays[-1])).astype(np.uint32)]

    return adjust


def bit_instructions():
    group = "bits"
    for width in (16, 32, 64):
        kind = f"b{width}"
        for op in ("and", "or", "xor"):
            yield scalar(f"{op}.{kind}", [kind], [kind] * 2, group=group)
        for op in ("not", "cnot"):
            yield scalar(f"{op}.{kind}", [kind], [kind], group=group)
        for op in (f"shl.b{width}", f"shr.b{width}", f"shr.u{width}", f"shr.s{width}"):
            yield scalar(op, [kind], [kind, "u32"], group=group, adjust=small_counts(width + 8))
    for kind in ("b32", "b64"):
        for op in ("popc", "clz"):
            yield scalar(f"{op}.{kind}", ["u32"], [kind], group=group)
        yield scalar(f"brev.{kind}", [kind], [kind], group=group)
        yield scalar(f"bfi.{kind}", [kind], [kind, kind, "u32", "u32"], group=group, adjust=fields)
    for kind in ("u32", "s32", "u64", "s64"):
        yield scalar(f"bfe.{kind}", [kind], [kind, "u32", "u32"], group=group, adjust=fields)
        yield scalar(f"bfind.{kind}", ["u32"], [kind], group=group)
        yield scalar(f"bfind.shiftamt.{kind}", ["u32"], [kind], group=group)
    for op in ("shf.l.wrap.b32", "shf.l.clamp.b32", "shf.r.wrap.b32", "shf.r.clamp.b32"):
        yield scalar(op, ["b32"], ["b32", "b32", "u32"], group=group, adjust=small_counts(40))
    for table in (0x96, 0xE8, 0xCA, 0x1D, 0x00, 0xFF):
        yield scalar(f"lop3.b32 {table:#x}", ["b32"], ["b32"] * 3, group=group,
                     instructions=f"lop3.b32 %d0, %a0, %a1, %a2, {table:#x};")  # fmt: skip
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        yield scalar(f"prmt.b32{mode}", ["b32"], ["b32"] * 3, group=group)
    yield scalar(
        "prmt.b32 immediate", ["b32"], ["b32"] * 2, "prmt.b32 %d0, %a0, %a1, 0x5410;", group=group
    )
    yield scalar("mov.b64 unpack", ["b32", "b32"], ["b64"], "mov.b64 {%d0, %d1}, %a0;", group=group)
    yield scalar("mov.b64 pack", ["b64"], ["b32", "b32"], "mov.b64 %d0, {%a0, %a1};", group=group)
    yield scalar("mov.b32 unpack", ["b16", "b16"], ["b32"], "mov.b32 {%d0, %d1}, %a0;", group=group)
    yield scalar("mov.b32 pack", ["b32"], ["b16", "b16"], "mov.b32 %d0, {%a0, %a1};", group=group)
    yield scalar("mov.f32 immediate", ["f32"], ["f32"], "mov.f32 %d0, 0fBF800001; add.f32 %d0, %d0, 0f00000000;",
                 group=group)  # fmt: skip


def fields(arrays, rng):
    """Positions and lengths of a bit field, up to past the register's end."""
    limit = arrays[0].dtype.itemsize * 8 + 12
    *values, position, length = arrays
    return [
        *values,
        *(rng.integers(0, limit, len(p)).astype(np.uint32) for p in (position, length)),
    ]


def forms():
    """Every scalar form but the conversions, which have their own file."""
    from ptx_forms_cvt import conversions

    yield from f32_arithmetic()
    yield from f32_approximations()
    yield from f64_arithmetic()
    yield from half_arithmetic()
    yield from comparisons()
    yield from integer_arithmetic()
    yield from bit_instructions()
    yield from conversions()
