"""Floating-point instruction forms: f32, f64, f16, bf16 arithmetic and the approximations."""

from functools import partial

import numpy as np
from ptx_forms import Tolerance, scalar
from ptx_forms_oracle import arithmetic

MODES = ("rn", "rz", "rm", "rp")
REASON = "the maximum error that the manual states"


def add(x, y):
    return x + y


def sub(x, y):
    return x - y


def mul(x, y):
    return x * y


def fused(x, y, z):
    return x * y + z


SUMS = (("add", add), ("sub", sub), ("mul", mul))


def nearly_cancel(arrays, _rng):
    """Every third addend of an f32 fma nearly cancels the product."""
    a, b, c = arrays
    with np.errstate(all="ignore"):
        product = -(a.view(np.float32) * b.view(np.float32))
    return [a, b, np.where(np.arange(len(c)) % 3 == 0, product.view(np.uint32), c)]


def f32_arithmetic():
    form = partial(scalar, results=["f32"], group="f32_arithmetic")
    one, two, three = ({"sources": ["f32"] * n} for n in (1, 2, 3))
    for op, function in SUMS:
        for suffix in ("", *(f".{m}" for m in MODES), ".ftz", ".sat", ".rn.ftz", ".rz.ftz.sat"):
            mode = next((m for m in MODES if f".{m}" in suffix), "rn")
            oracle = arithmetic("f32", function, mode, ".ftz" in suffix, ".sat" in suffix)
            yield form(f"{op}{suffix}.f32", **two, oracle=oracle)
    for suffix in (".rn", ".rz", ".rm", ".rp", ".rn.ftz", ".rn.sat", ".rn.ftz.sat", ".rz.ftz"):
        oracle = arithmetic("f32", fused, suffix[1:3], ".ftz" in suffix, ".sat" in suffix)
        yield form(f"fma{suffix}.f32", **three, oracle=oracle, adjust=nearly_cancel)
    oracle = arithmetic("f32", fused)
    yield form("mad.rn.f32", **three, adjust=nearly_cancel, oracle=oracle)
    for mode in (*MODES, "rn.ftz"):
        yield form(f"div.{mode}.f32", **two)
        yield form(f"rcp.{mode}.f32", **one)
        yield form(f"sqrt.{mode}.f32", **one)
    for op in ("neg", "abs"):
        for suffix in ("", ".ftz"):
            yield form(f"{op}{suffix}.f32", **one)
    yield form("copysign.f32", **two)
    for op in ("min", "max"):
        for suffix in ("", ".ftz", ".NaN", ".ftz.NaN", ".NaN.ftz"):
            yield form(f"{op}{suffix}.f32", **two)
        for suffix in (".xorsign.abs", ".NaN.xorsign.abs"):
            yield form(f"{op}{suffix}.f32", **two, target="sm_86")


def spread(low, high):
    """Half of the inputs of a function get exponents spread over 2**low .. 2**high."""

    def adjust(arrays, rng):
        a = arrays[0]
        exponent = rng.integers(127 + low, 127 + high, len(a)).astype(np.uint32) << np.uint32(23)
        moved = (a & np.uint32(0x807FFFFF)) | exponent
        return [np.where(np.arange(len(a)) % 2 == 0, moved, a), *arrays[1:]]

    return adjust


def within_pi(arrays, rng):
    """Angles in [-pi, pi], where the manual bounds the error, and special values."""
    a = arrays[0]
    angle = (rng.random(len(a)) * 2 - 1).astype(np.float32) * np.float32(np.pi)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80400000], np.uint32)
    out = angle.view(np.uint32).copy()
    out[: len(special)] = special
    return [out]


# instruction: (relative, absolute) error, exponents of the inputs
APPROXIMATIONS = {
    "ex2": (2.0**-22, 0.0, (-20, 8)),
    "lg2": (2.0**-22, 2.0**-22, (-100, 100)),
    "rcp": (2.0**-23, 0.0, (-125, 125)),
    "rsqrt": (2.0**-22.9, 0.0, (-125, 125)),
    "sqrt": (2.0**-22, 0.0, (-125, 125)),
}


def f32_approximations():
    form = partial(scalar, results=["f32"], group="f32_approximations", n=1024)
    for op, (relative, absolute, exponents) in APPROXIMATIONS.items():
        tolerance = Tolerance("f32", relative, absolute, REASON)
        for suffix in ("", ".ftz"):
            name = f"{op}.approx{suffix}.f32"
            yield form(name, sources=["f32"], adjust=spread(*exponents), tolerance=tolerance)
    tolerance = Tolerance("f32", 0.0, 2.0**-20.5, REASON)
    for op in ("sin", "cos"):
        for suffix in ("", ".ftz"):
            name = f"{op}.approx{suffix}.f32"
            yield form(name, sources=["f32"], adjust=within_pi, tolerance=tolerance)
    tolerance = Tolerance("f32", 2.0**-11, 0.0, REASON)
    yield form("tanh.approx.f32", sources=["f32"], adjust=spread(-12, 4), tolerance=tolerance)
    # Two units in the last place, also of a subnormal quotient.
    tolerance = Tolerance("f32", 2.0**-22, 2.0**-148, REASON)
    for mode in ("full", "approx", "full.ftz", "approx.ftz"):
        yield form(f"div.{mode}.f32", sources=["f32"] * 2, tolerance=tolerance)


def f64_arithmetic():
    form = partial(scalar, results=["f64"], group="f64_arithmetic")
    one, two, three = ({"sources": ["f64"] * n} for n in (1, 2, 3))
    for op, function in SUMS:
        for mode in MODES:
            yield form(f"{op}.{mode}.f64", **two, oracle=arithmetic("f64", function, mode))
    for mode in MODES:
        yield form(f"fma.{mode}.f64", **three, oracle=arithmetic("f64", fused, mode))
        yield form(f"div.{mode}.f64", **two)
        yield form(f"rcp.{mode}.f64", **one)
        yield form(f"sqrt.{mode}.f64", **one)
    for op in ("neg", "abs"):
        yield form(f"{op}.f64", **one)
    for op in ("min", "max", "copysign"):
        yield form(f"{op}.f64", **two)
    for op in ("rcp", "rsqrt"):
        tolerance = Tolerance("f64", 2.0**-19, 0.0, "20 bits of mantissa are computed")
        yield form(f"{op}.approx.ftz.f64", **one, tolerance=tolerance)


def half_arithmetic(kind):
    half, f16, wide = kind.replace("x2", ""), kind[0] == "f", kind.endswith("x2")
    form = partial(scalar, results=[kind], group=f"{half}_arithmetic")
    newer = {"target": "sm_80" if f16 else "sm_90"}  # bf16 add, sub and mul came with sm_90
    one, two, three = ({"sources": [kind] * n} for n in (1, 2, 3))
    for op, function in SUMS:
        for suffix in (".rn", ".rn.ftz", ".rn.sat", ".rn.ftz.sat") if f16 else (".rn",):
            oracle = arithmetic(half, function, "rn", ".ftz" in suffix, ".sat" in suffix)
            yield form(f"{op}{suffix}.{kind}", **two, oracle=None if wide else oracle, **newer)
    for suffix in ("", ".ftz", ".sat", ".relu", ".ftz.relu") if f16 else ("", ".relu"):
        flags = (".ftz" in suffix, ".sat" in suffix, ".relu" in suffix)
        oracle = None if wide else arithmetic(half, fused, "rn", *flags)
        yield form(f"fma.rn{suffix}.{kind}", **three, oracle=oracle)
    for op in ("neg", "abs"):
        for suffix in ("", ".ftz") if f16 else ("",):
            yield form(f"{op}{suffix}.{kind}", **one)
    for op in ("min", "max"):
        for suffix in ("", ".NaN", *((".ftz",) if f16 else ())):
            yield form(f"{op}{suffix}.{kind}", **two)
        yield form(f"{op}.xorsign.abs.{kind}", **two, target="sm_86")
    yield from half_approximations(form, kind, half)


def half_approximations(form, kind, half):
    """ex2 and tanh, within two units in the last place (of a normal result)."""
    ulp, smallest = {"f16": (2.0**-10, 2.0**-23), "bf16": (2.0**-7, 0.0)}[half]
    options = {"sources": [kind], "target": "sm_90"}
    options["tolerance"] = Tolerance(half, 2 * ulp, smallest, REASON)
    yield form(f"ex2.approx{'.ftz' if half == 'bf16' else ''}.{kind}", **options)
    yield form(f"tanh.approx.{kind}", **options)


def forms():
    """Every floating-point form but comparisons and conversions."""
    yield from f32_arithmetic()
    yield from f32_approximations()
    yield from f64_arithmetic()
    for kind in ("f16", "f16x2", "bf16", "bf16x2"):
        yield from half_arithmetic(kind)
