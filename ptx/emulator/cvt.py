"""cvt: every conversion between the integer and floating-point types of PTX.

    d = convert("bf16x2", "f32", (a, b), "rn")        cvt.rn.bf16x2.f32 d, a, b;
    d = convert("s32", "f32", (a,), "rzi", sat=True)   cvt.rzi.sat.s32.f32 d, a;

All operands and results are raw register bits (see formats.py).  Each conversion rounds once.
Source: PTX ISA 8.x, "Data Movement and Conversion Instructions: cvt".
"""

import numpy as np

from mirage_hello.ptx.emulator import formats
from mirage_hello.ptx.emulator.formats import FORMATS, as_register, decode, encode, register_dtype

_SPLIT32 = np.uint64(32)
_LOW32 = np.uint64(0xFFFFFFFF)


def is_integer(kind):
    """True for s8..s64 and u8..u64."""
    return kind[:1] in "su" and kind[1:].isdigit()


def integer_range(kind):
    """(minimum, maximum) of an integer type as Python ints."""
    bits = int(kind[1:])
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def integer_values(kind, bits):
    """Register bits of an integer type as int64 (uint64 for u64), sign-extended for s types."""
    register = as_register(bits, kind)
    if kind[0] == "s":
        return np.ascontiguousarray(register).view(f"i{register.dtype.itemsize}").astype(np.int64)
    return register if kind == "u64" else register.astype(np.int64)


def integer_to_integer(dst, src, bits, sat=False):
    """cvt.s/u.s/u: sign- or zero-extend, truncate; .sat clamps to the destination's range."""
    value = integer_values(src, bits)
    if sat:
        low, high = integer_range(dst)
        src_low, src_high = integer_range(src)
        low, high = max(low, src_low), min(high, src_high)
        value = np.clip(value, value.dtype.type(low), value.dtype.type(high))
    return value.astype(np.uint64).astype(register_dtype(dst))


def pack(dst, a, b, c=None):
    """cvt.pack.sat.<dst>.s32{.b32} d, a, b{, c}: b saturated in the low bits, a above it.

    Args: dst "s8", "u8", "s16" or "u16"; a, b s32; c whose low half moves to the upper half of d
    (8-bit destinations; absent for 16-bit ones).
    Returns: uint32.
    """
    width = int(dst[1:])
    low, high = (integer_to_integer(dst, "s32", v, sat=True).astype(np.uint32) for v in (b, a))
    out = low | high << np.uint32(width)
    return out if c is None else out | as_register(c, "b32") << np.uint32(2 * width)


def _exact_integer(kind, bits):
    """An integer as float64 rounded to odd (exact below 2**53)."""
    value = integer_values(kind, bits)
    if kind[1:] != "64":
        return value.astype(np.float64)
    negative = np.zeros(value.shape, bool) if kind == "u64" else value < 0
    magnitude = value.astype(np.uint64)
    magnitude = np.where(negative, ~magnitude + np.uint64(1), magnitude)
    high = (magnitude >> _SPLIT32).astype(np.float64) * 4294967296.0
    total = formats.odd_sum(high, (magnitude & _LOW32).astype(np.float64))
    return np.where(negative, -total, total)


def integer_to_float(dst, src, bits, rounding="rn"):
    """cvt.{rn,rz,rm,rp}.f.s/u, rounded once from the exact integer."""
    if dst != "f64" or src[1:] != "64":
        return encode(dst, _exact_integer(src, bits), rounding)
    value = integer_values(src, bits)
    negative = np.zeros(value.shape, bool) if src == "u64" else value < 0
    magnitude = value.astype(np.uint64)
    magnitude = np.where(negative, ~magnitude + np.uint64(1), magnitude)
    high = (magnitude >> _SPLIT32).astype(np.float64) * 4294967296.0
    total = directed_sum(high, (magnitude & _LOW32).astype(np.float64), _mirror(rounding, negative))
    return np.where(negative, -total, total).view(np.uint64)


def _mirror(rounding, negative):
    """Rounding of a magnitude as a per-element direction: -1 down, 0 nearest, +1 up."""
    step = {"rn": 0, "rz": -1, "rm": -1, "rp": 1}[rounding]
    return np.where(negative & (rounding in ("rm", "rp")), -step, step)


def directed_sum(a, b, direction):
    """a + b in float64 rounded to nearest (direction 0), down (-1) or up (+1), per element."""
    s, e = formats.two_sum(a, b)
    with np.errstate(all="ignore"):
        s = np.where((direction > 0) & (e > 0), np.nextafter(s, np.inf), s)
        return np.where((direction < 0) & (e < 0), np.nextafter(s, -np.inf), s)


def _round_to_integer(x, rounding):
    if rounding not in ("rni", "rzi", "rmi", "rpi"):
        raise ValueError(f"cvt: float to integer needs rni, rzi, rmi or rpi (got {rounding!r})")
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x)


def float_to_integer(dst, src, bits, rounding):
    """cvt.{rni,rzi,rmi,rpi}.s/u.f: round, then saturate to the destination's range.

    NaN gives 0, but 1 << (width - 1) when the source is f64 or the destination has 64 bits.
    """
    with np.errstate(invalid="ignore"):
        x = _round_to_integer(decode(src, bits), rounding)
        low, high = integer_range(dst)
        width = int(dst[1:])
        clamped = np.where(np.isnan(x), 0.0, np.clip(x, float(low), float(high)))
        if width == 64:
            # float(high) is 2**63 or 2**64, one too many to cast: cast below it, set the top after.
            below = clamped < float(high)
            safe = np.where(below, clamped, 0.0)
            as_int = (
                safe.astype(np.uint64) if dst == "u64" else safe.astype(np.int64).astype(np.uint64)
            )
            out = np.where(below, as_int, np.uint64(high))
        else:
            out = clamped.astype(np.int64).astype(np.uint64)
    at_nan = 1 << (width - 1) if src == "f64" or width == 64 else 0
    return np.where(np.isnan(x), np.uint64(at_nan), out).astype(register_dtype(dst))


def float_to_float(
    dst, src, bits, rounding=None, ftz=False, sat=False, satfinite=False, relu=False
):
    """cvt between floating-point formats; `rni`..`rpi` round to an integral value of the format."""
    bits = as_register(bits, src)
    if ftz and src == "f32":
        bits = formats.flush("f32", bits)
        bits = np.where(np.isnan(decode(src, bits)), np.uint32(FORMATS["f32"].nan), bits)
    x = decode(src, bits)
    integral = rounding in ("rni", "rzi", "rmi", "rpi")
    if integral:
        with np.errstate(invalid="ignore"):
            x = _round_to_integer(x, rounding)
    out = encode(dst, x, rounding if rounding and not integral else "rn", satfinite, relu)
    nan = np.isnan(x)
    if nan.any() and not sat:
        out = np.where(nan, _nan(dst, src, bits, rounding), out)
    if ftz and dst == "f32":
        out = formats.flush("f32", out)
    return formats.saturate(dst, out) if sat else out


def _nan(dst, src, bits, rounding):
    """What a NaN operand becomes, as an H200 does it.

    Conversions that touch f64 keep the sign and the upper bits of the payload, made quiet;
    bf16 -> f32 is a shift; tf32 keeps 19 bits (rna) or gives 0x7FFFE000; all others give the
    canonical NaN of the destination.
    """
    to, of = FORMATS[dst], FORMATS[src]
    if "f64" in (dst, src):
        payload = bits & bits.dtype.type((1 << of.mantissa) - 1)
        sign = (bits >> bits.dtype.type(of.bits - 1)).astype(to.dtype) << to.dtype.type(to.bits - 1)
        if to.mantissa >= of.mantissa:
            moved = payload.astype(to.dtype) << to.dtype.type(to.mantissa - of.mantissa)
        else:
            moved = (payload >> bits.dtype.type(of.mantissa - to.mantissa)).astype(to.dtype)
        return sign | moved | to.dtype.type(to.infinity | 1 << (to.mantissa - 1))
    if (dst, src) == ("f32", "bf16"):
        return bits.astype(np.uint32) << np.uint32(16)
    if dst == "tf32":
        return bits & np.uint32(0xFFFFE000) if rounding == "rna" else np.uint32(0x7FFFE000)
    return to.dtype.type(to.nan)


def _fast_bf16(bits):
    """cvt.rn.bf16.f32 in integer arithmetic, the commonest conversion of the kernels."""
    bits = as_register(bits, "f32")
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint16(0x7FFF), rounded)


def _convert_one(dst, src, bits, rounding, ftz, sat, satfinite, relu):
    if is_integer(src):
        if is_integer(dst):
            return integer_to_integer(dst, src, bits, sat)
        out = integer_to_float(dst, src, bits, rounding or "rn")
        return formats.saturate(dst, out) if sat else out
    if is_integer(dst):
        if ftz and src == "f32":
            bits = formats.flush("f32", bits)
        return float_to_integer(dst, src, bits, rounding)
    if (
        dst == "bf16"
        and src == "f32"
        and rounding == "rn"
        and not (ftz or sat or satfinite or relu)
    ):
        return _fast_bf16(bits)
    return float_to_float(dst, src, bits, rounding, ftz, sat, satfinite, relu)


def convert(
    dst, src, operands, rounding=None, *, ftz=False, sat=False, satfinite=False, relu=False
):
    """cvt.<rounding>{.satfinite}{.relu}{.ftz}{.sat}.<dst>.<src> on raw bits.

    Args: dst, src PTX type names, also packed ("f16x2", "bf16x2", "e4m3x2", "e5m2x2"); operands a
    tuple of one array, or two (high, low) when `dst` is packed and `src` is not (the first source
    goes to the upper half); rounding without its dot, or None.
    Returns: array of the destination's register type.
    Raises: ValueError for a pair of types that cvt does not have.
    """
    flags = (rounding, ftz, sat, satfinite, relu)
    if dst.endswith("x2"):
        half = dst[:-2]
        if src.endswith("x2"):
            low, high = formats.split2(as_register(operands[0], src), src[:-2])
            src = src[:-2]
        else:
            high, low = operands
        return formats.pack2(
            _convert_one(half, src, low, *flags), _convert_one(half, src, high, *flags), half
        )
    return _convert_one(dst, src, operands[0], *flags)
