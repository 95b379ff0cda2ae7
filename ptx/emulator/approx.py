"""The .approx instructions: ex2, lg2, rcp, rsqrt, sqrt, tanh, sin, cos, div.approx, div.full.

Model: the exact function of the (flushed) operand in float64, rounded once to the result format,
with the special values of the PTX ISA tables.  The hardware's answer differs from it by at most

| instruction                | bound on |hardware - model|                                       |
| ex2.approx.f32             | 2**-22 relative                                                   |
| lg2.approx.f32             | 2**-22 absolute for x in [0.5, 2], else 2**-22 relative           |
| rcp.approx.f32             | 1 ulp (2**-23 relative)                                           |
| rsqrt.approx.f32           | 2**-22.9 relative                                                 |
| sqrt.approx.f32            | 2**-23 relative plus the final rounding                           |
| sin, cos.approx.f32        | 2**-20.5 absolute in [-pi, pi], growing like |x| * 2**-22 outside |
| tanh.approx.f32            | 2**-11 relative                                                   |
| tanh, ex2.approx.f16/bf16  | 2**-10.987 / 2**-8 (tanh), 2**-9.9 / 2**-7 (ex2) relative         |
| div.approx, div.full f32   | 2 ulp                                                             |

so results of approximate instructions are compared within `BOUNDS`, never bit for bit.
Source: PTX ISA 8.x, "Floating Point Instructions", the tables of each instruction.
"""

import numpy as np

from mirage_hello.ptx.emulator import formats
from mirage_hello.ptx.emulator.formats import as_register, decode, encode

# Documented maximum errors: (relative, absolute) of the f32 instructions.
BOUNDS = {
    "ex2": (2.0**-22, 0.0),
    "lg2": (2.0**-22, 2.0**-22),
    "rcp": (2.0**-23, 0.0),
    "rsqrt": (2.0**-22.9, 0.0),
    "sqrt": (2.0**-22, 0.0),
    "tanh": (2.0**-11, 0.0),
    "sin": (0.0, 2.0**-20.5),
    "cos": (0.0, 2.0**-20.5),
    "div": (2.0**-22, 0.0),
}

_UNARY = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def unary(name, kind, a, ftz=False):
    """<name>.approx{.ftz}.kind on raw bits.

    Args: name one of ex2, lg2, rcp, rsqrt, sqrt, tanh, sin, cos; kind "f32", "f16", "bf16", the
    packed "f16x2" and "bf16x2", or "f64" (rcp, rsqrt: only the upper 32 bits are computed).
    Returns: raw bits.
    Numerics: the exact function rounded once; see the table above for the hardware's distance.
    """
    if name not in _UNARY:
        raise ValueError(f"{name}.approx: unknown function; expected one of {', '.join(_UNARY)}")
    if kind.endswith("x2"):
        half = kind[:-2]
        low, high = formats.split2(as_register(a, kind), half)
        return formats.pack2(unary(name, half, low, ftz), unary(name, half, high, ftz), half)
    a = as_register(a, kind)
    if kind == "f64":
        return _upper_half_f64(name, a)
    x = decode(kind, formats.flush(kind, a) if ftz else a)
    with np.errstate(all="ignore"):
        out = encode(kind, _UNARY[name](x))
    return formats.flush(kind, out) if ftz else out


def _upper_half_f64(name, a):
    """rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64: 20 mantissa bits, subnormals flushed."""
    upper = a & np.uint64(0xFFFFFFFF00000000)
    exponent = (upper >> np.uint64(52)) & np.uint64(0x7FF)
    upper = np.where(exponent == 0, upper & np.uint64(1 << 63), upper)
    with np.errstate(all="ignore"):
        out = encode("f64", _UNARY[name](decode("f64", upper)))
    tiny = ((out >> np.uint64(52)) & np.uint64(0x7FF)) == 0
    out = np.where(tiny, out & np.uint64(1 << 63), out)
    return out & np.uint64(0xFFFFFFFF00000000)


def div(mode, a, b, ftz=False):
    """div.approx{.ftz}.f32 and div.full{.ftz}.f32.

    div.approx multiplies by a reciprocal that underflows for 2**126 < |b| < 2**128: the quotient
    is then 0 (NaN for an infinite a).  div.full scales its operands and is right there.
    """
    a, b = as_register(a, "f32"), as_register(b, "f32")
    if ftz:
        a, b = formats.flush("f32", a), formats.flush("f32", b)
    x, y = decode("f32", a), decode("f32", b)
    with np.errstate(all="ignore"):
        quotient = x / y
        if mode == "approx":
            lost = np.isfinite(y) & (np.abs(y) > 2.0**126)
            quotient = np.where(lost, x * np.copysign(0.0, y), quotient)
    out = encode("f32", quotient)
    return formats.flush("f32", out) if ftz else out
