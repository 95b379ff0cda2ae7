"""Number formats of PTX: value = decode(format, bits), bits = encode(format, value, rounding).

The one convention of the emulator's functional units: **a register is an unsigned NumPy integer
array holding raw bits** (uint8, uint16, uint32 or uint64, one element per thread).  A value exists
only inside a function, as float64, which holds every f16, bf16, tf32, e4m3, e5m2 and f32 exactly.

Exactness.  Arithmetic is done in float64 *rounded to odd*: if the float64 result is inexact, the
neighbour with the odd last bit is taken.  Rounding that to any format with at most 51 significand
bits, in any rounding mode, gives the same answer as rounding the infinitely precise result once
(Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

NaN.  Every instruction here that produces a floating-point NaN produces the format's canonical
one, listed in `Format.nan`, as the hardware does for f16, bf16, tf32, fp8 and f32.

Source: PTX ISA 8.x, "Fundamental types", "Alternate floating-point data formats"; OCP FP8 (e4m3
has no infinity: S.1111.111 is NaN and the largest value is 448).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """Layout of one binary floating-point format.

    `shift` is the number of unused low bits in the register (tf32 is the upper 19 bits of 32).
    `top` is the magnitude code of the largest finite value, `infinity` that of infinity or None.
    """

    name: str
    bits: int
    mantissa: int
    emin: int
    top: int
    infinity: int | None
    nan: int
    shift: int = 0

    @property
    def dtype(self):
        return np.dtype(f"u{self.bits // 8}")


FORMATS = {
    f.name: f
    for f in (
        Format("e4m3", 8, 3, -6, 0x7E, None, 0x7F),
        Format("e5m2", 8, 2, -14, 0x7B, 0x7C, 0x7F),
        Format("f16", 16, 10, -14, 0x7BFF, 0x7C00, 0x7FFF),
        Format("bf16", 16, 7, -126, 0x7F7F, 0x7F80, 0x7FFF),
        Format("tf32", 32, 10, -126, 0x3FBFF, 0x3FC00, 0x7FFFFFFF, shift=13),
        Format("f32", 32, 23, -126, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF),
        Format("f64", 64, 52, -1022, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF),
    )
}

ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


def register_dtype(kind):
    """Unsigned dtype of a register of PTX type `kind` ("f32", "s64", "bf16x2", "b16", "e4m3x2")."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in FORMATS:
        return FORMATS[kind].dtype
    if kind.endswith("x2"):
        return np.dtype(f"u{FORMATS[kind[:-2]].bits // 4}")
    if kind[:1] in "bsuf" and kind[1:] in ("8", "16", "32", "64"):
        return np.dtype(f"u{int(kind[1:]) // 8}")
    known = ", ".join([*FORMATS, "b8..b64", "s8..s64", "u8..u64", "pred"])
    raise ValueError(
        f"register_dtype: unknown PTX type {kind!r}; expected one of {known} or an x2 form"
    )


def as_register(bits, kind):
    """`bits` as an unsigned array of the register type of `kind`; wider input loses high bits."""
    bits = np.asarray(bits)
    dtype = register_dtype(kind)
    if bits.dtype == dtype:
        return bits
    if bits.dtype.itemsize == dtype.itemsize and bits.dtype != bool:
        return np.ascontiguousarray(bits).view(dtype)
    return bits.astype(np.int64 if bits.dtype.kind == "i" else bits.dtype).astype(dtype)


def _table(fmt):
    """All 256 values of an 8-bit format, from sign * 2**exponent * significand."""
    code = np.arange(256)
    magnitude, sign = code & 0x7F, np.where(code & 0x80, -1.0, 1.0)
    field, fraction = magnitude >> fmt.mantissa, magnitude & ((1 << fmt.mantissa) - 1)
    significand = np.where(field > 0, 1 << fmt.mantissa, 0) + fraction
    value = sign * np.ldexp(
        significand.astype(float), np.maximum(field, 1) - 1 + fmt.emin - fmt.mantissa
    )
    if fmt.infinity is None:
        return np.where(magnitude == 0x7F, np.nan, value)
    return np.where(
        magnitude < fmt.infinity, value, np.where(magnitude == fmt.infinity, sign * np.inf, np.nan)
    )


_TABLES = {name: _table(FORMATS[name]) for name in ("e4m3", "e5m2")}


def decode(kind, bits, dtype=np.float64):
    """Values of raw register bits.

    Args: kind "e4m3", "e5m2", "f16", "bf16", "tf32", "f32" or "f64"; bits unsigned array; dtype
    float64 (default) or float32 (exact for every kind but f64).
    Returns: array of `dtype`.  tf32 ignores the low 13 bits, as the tensor core does.
    """
    bits = as_register(bits, kind)
    if kind in _TABLES:
        return _TABLES[kind].astype(dtype)[bits]
    if kind == "bf16":
        with np.errstate(invalid="ignore"):
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(dtype, copy=False)
    if kind == "tf32":
        with np.errstate(invalid="ignore"):
            return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(dtype, copy=False)
    with np.errstate(invalid="ignore"):
        return (
            np.ascontiguousarray(bits).view(f"f{FORMATS[kind].bits // 8}").astype(dtype, copy=False)
        )


def _round_integer(x, rounding, negative):
    """Round non-negative magnitudes to integers; `negative` is the sign of each value."""
    if rounding == "rn":
        return np.rint(x)
    if rounding == "rz":
        return np.floor(x)
    if rounding == "rna":
        down = np.floor(x)
        return down + (x - down >= 0.5)
    if rounding not in ("rm", "rp"):
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)} (got {rounding!r})")
    return np.where(negative == (rounding == "rm"), np.ceil(x), np.floor(x))


def _encode_generic(fmt, x, rounding):
    """Finite values to (code, sign), rounded once; overflow by the mode's rule, not saturated."""
    negative = np.signbit(x)
    magnitude = np.abs(x)
    exponent = np.where(x == 0, fmt.emin, np.maximum(np.frexp(magnitude)[1] - 1, fmt.emin))
    scaled = np.ldexp(magnitude, fmt.mantissa - exponent)
    significand = _round_integer(scaled, rounding, negative).astype(np.int64)
    # A significand of 2**(mantissa+1) carries into the exponent field by plain addition.
    code = ((exponent - fmt.emin).astype(np.int64) << fmt.mantissa) + significand
    to_top = np.zeros_like(negative)
    if rounding == "rz":
        to_top |= True
    elif rounding in ("rm", "rp"):
        to_top = negative == (rounding == "rp")
    beyond = fmt.infinity if fmt.infinity is not None else fmt.nan
    code = np.where(code > fmt.top, np.where(to_top, fmt.top, beyond), code)
    return code, negative


def _encode_f32(x, rounding):
    """float64 -> f32 bits through the CPU's own conversion, then one step for directed modes."""
    near = x.astype(np.float32)
    if rounding != "rn":
        wide = near.astype(np.float64)
        toward = {"rz": np.float32(0), "rm": np.float32(-np.inf), "rp": np.float32(np.inf)}[
            rounding
        ]
        wrong = {
            "rz": np.abs(wide) > np.abs(x),
            "rm": wide > x,
            "rp": wide < x,
        }[rounding]
        near = np.where(wrong, np.nextafter(near, toward), near)
    return near.view(np.uint32)


def encode(kind, x, rounding="rn", satfinite=False, relu=False):
    """Raw bits of the values `x` rounded once to `kind`.

    Args: x float64 (or narrower) array, any values; rounding "rn" (to nearest even), "rz" (toward
    zero), "rm" (down), "rp" (up) or "rna" (to nearest, ties away from zero); satfinite: overflow
    and infinities become the largest finite value; relu: negative values (and -0) become +0.
    Returns: unsigned array of the format's register type; NaN becomes the canonical NaN.
    """
    fmt = FORMATS[kind]
    x = np.asarray(x, dtype=np.float64)
    shape, x = x.shape, np.atleast_1d(x)
    nan = np.isnan(x)
    if relu:
        x = np.where(nan | (x > 0), x, 0.0)
    with np.errstate(all="ignore"):
        if kind == "f64":
            out = x.view(np.uint64).copy()
        elif kind == "f32" and rounding != "rna":
            out = _encode_f32(x, rounding)
        elif kind == "f16" and rounding == "rn":
            out = x.astype(np.float16).view(np.uint16)
        else:
            finite = np.isfinite(x)
            code, negative = _encode_generic(fmt, np.where(finite, x, 0.0), rounding)
            if fmt.infinity is not None:
                code = np.where(finite, code, fmt.infinity)
                negative = np.where(finite, negative, x < 0)
            else:
                code = np.where(finite, code, fmt.nan)
            out = ((code << fmt.shift) | (negative.astype(np.int64) << (fmt.bits - 1))).astype(
                fmt.dtype
            )
    if satfinite:
        sign_bit = fmt.dtype.type(1 << (fmt.bits - 1))
        limit = fmt.dtype.type(fmt.top << fmt.shift)
        out = np.where((out & ~sign_bit) > limit, (out & sign_bit) | limit, out)
        if fmt.infinity is None:
            out = np.where(np.isinf(x), np.where(x < 0, sign_bit | limit, limit), out)
    out = np.where(nan, fmt.dtype.type(fmt.nan), out)
    return out.reshape(shape)


def flush(kind, bits):
    """.ftz: subnormal bits become zero of the same sign (f16, bf16, f32)."""
    fmt = FORMATS[kind]
    bits = as_register(bits, kind)
    sign = fmt.dtype.type(1 << (fmt.bits - 1))
    subnormal = (bits & ~sign) < fmt.dtype.type(1 << fmt.mantissa)
    return np.where(subnormal, bits & sign, bits)


def saturate(kind, bits):
    """.sat: clamp to [+0.0, 1.0]; NaN becomes +0.0."""
    x = decode(kind, bits)
    with np.errstate(invalid="ignore"):
        clamped = np.where(x > 0, np.minimum(x, 1.0), 0.0)
    return np.where((x > 0) & (x <= 1), as_register(bits, kind), encode(kind, clamped))


def two_sum(a, b):
    """Knuth's TwoSum: s = RN(a + b) and its exact error e, s + e == a + b (no overflow)."""
    with np.errstate(all="ignore"):
        s = a + b
        t = s - a
        return s, (a - (s - t)) + (b - t)


def odd_sum(a, b):
    """a + b rounded to odd in float64: of an inexact sum's two neighbours, the odd one."""
    s, e = two_sum(a, b)
    with np.errstate(all="ignore"):
        move = (e != 0) & np.isfinite(s) & np.isfinite(e)
    if not move.any():
        return s
    even = (np.ascontiguousarray(s).view(np.uint64) & np.uint64(1)) == 0
    toward = np.where(e > 0, np.inf, -np.inf)
    return np.where(move & even, np.nextafter(s, toward), s)


def split2(packed, kind):
    """The (low, high) halves of a packed pair, e.g. kind "bf16" of a uint32 bf16x2 register."""
    half = FORMATS[kind].bits
    packed = np.asarray(packed)
    low = register_dtype(kind)
    return packed.astype(low), (packed >> packed.dtype.type(half)).astype(low)


def pack2(low, high, kind):
    """A packed register from its low and high element, the inverse of `split2`."""
    wide = register_dtype(kind + "x2")
    return low.astype(wide) | (high.astype(wide) << wide.type(FORMATS[kind].bits))
