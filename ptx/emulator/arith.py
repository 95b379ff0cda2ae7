"""Floating-point arithmetic on raw bits: add, sub, mul, fma, div, rcp, sqrt, min, max, setp.

Kinds: "f32", "f64", "f16", "bf16" and the packed "f16x2", "bf16x2" (element by element).
Every result is the infinitely precise one rounded once, in any of rn, rz, rm, rp; see formats.py
for how (float64 rounded to odd), exact64.py for f64.

Source: PTX ISA 8.x, "Floating Point Instructions", "Half Precision Floating Point Instructions".
"""

import functools
import inspect

import numpy as np

from mirage_hello.ptx.emulator import exact64, formats
from mirage_hello.ptx.emulator.formats import FORMATS, as_register, decode, encode


def _elementwise(function):
    """Lift a function of one element per register to the packed kinds."""
    count = sum(name in ("a", "b", "c") for name in inspect.signature(function).parameters)

    @functools.wraps(function)
    def lifted(kind, *arguments, **options):
        if not kind.endswith("x2"):
            return function(kind, *arguments, **options)
        half = kind[:-2]
        pairs = [formats.split2(as_register(o, kind), half) for o in arguments[:count]]
        low, high = (
            function(half, *(p[i] for p in pairs), *arguments[count:], **options) for i in (0, 1)
        )
        return formats.pack2(low, high, half)

    return lifted


def _finish(kind, bits, ftz, sat, relu=False):
    if ftz:
        bits = formats.flush(kind, bits)
    if sat:
        bits = formats.saturate(kind, bits)
    if relu:
        bits = encode(kind, decode(kind, bits), relu=True)
    return bits


def _finish64(values, *operands):
    """float64 results to bits: the last NaN of `operands`, made quiet, or the default NaN."""
    out = formats.as_register(values.view(np.uint64), "f64")
    nan = np.isnan(values)
    if not nan.any():
        return out
    result = np.full(out.shape, DEFAULT_NAN_F64)
    for operand in operands:
        result = np.where(np.isnan(decode("f64", operand)), operand | QUIET_F64, result)
    return np.where(nan, result, out)


def _inputs(kind, operands, ftz):
    return [formats.flush(kind, o) if ftz else as_register(o, kind) for o in operands]


def _zero_sign(result, a, b, rounding):
    """A sum that is exactly zero from operands of opposite sign is -0 when rounding down."""
    if rounding != "rm":
        return result
    cancelled = (result == 0) & (np.signbit(a) != np.signbit(b))
    return np.where(cancelled, -0.0, result)


# f64 keeps the payload of a NaN operand; an invalid operation gives the negative quiet NaN.
DEFAULT_NAN_F64 = np.uint64(0xFFF8000000000000)
QUIET_F64 = np.uint64(1 << 51)


@_elementwise
def add(kind, a, b, rounding="rn", ftz=False, sat=False):
    """add{.rnd}{.ftz}{.sat}.kind: a + b rounded once."""
    a, b = _inputs(kind, (a, b), ftz)
    if kind == "f32" and rounding == "rn":
        return _finish(kind, _native(np.add, a, b), ftz, sat)
    x, y = decode(kind, a), decode(kind, b)
    if kind == "f64":
        return _finish64(exact64.add(x, y, rounding), a, b)
    total = _zero_sign(formats.odd_sum(x, y), x, y, rounding)
    return _finish(kind, encode(kind, total, rounding), ftz, sat)


def add_in_global_memory(kind, a, b):
    """atom.add and red.add in global memory, where the L2 cache adds.

    f32 flushes subnormal operands and results; f64 passes a NaN operand on without making it
    quiet (both seen on an H200); the other types are `add`.
    """
    if kind == "f32":
        return add(kind, a, b, ftz=True)
    out = add(kind, a, b)
    if kind == "f64":
        for operand in (b, a):
            out = np.where(np.isnan(decode(kind, operand)), operand, out)
    return out


@_elementwise
def sub(kind, a, b, rounding="rn", ftz=False, sat=False):
    """sub{.rnd}{.ftz}{.sat}.kind: a - b rounded once."""
    if kind == "f64":  # a NaN operand keeps its sign
        a, b = _inputs(kind, (a, b), ftz)
        return _finish64(exact64.add(decode(kind, a), -decode(kind, b), rounding), a, b)
    return add(kind, a, _flip(kind, b), rounding, ftz, sat)


@_elementwise
def mul(kind, a, b, rounding="rn", ftz=False, sat=False):
    """mul{.rnd}{.ftz}{.sat}.kind: a * b rounded once."""
    a, b = _inputs(kind, (a, b), ftz)
    if kind == "f32" and rounding == "rn":
        return _finish(kind, _native(np.multiply, a, b), ftz, sat)
    x, y = decode(kind, a), decode(kind, b)
    if kind == "f64":
        zero = np.where(np.signbit(x) != np.signbit(y), -0.0, 0.0)
        return _finish64(exact64.fma(x, y, zero, rounding), a, b)
    with np.errstate(all="ignore"):
        product = x * y  # exact: at most 48 significand bits, exponent within float64
    return _finish(kind, encode(kind, product, rounding), ftz, sat)


@_elementwise
def fma(kind, a, b, c, rounding="rn", ftz=False, sat=False, relu=False):
    """fma.rnd{.ftz}{.sat}{.relu}.kind: a * b + c rounded once.

    f32 rn: the product is exact in float64, so rounding the float64 sum to f32 can only be wrong
    where that sum lies exactly on a midpoint of two f32 values or is subnormal; those elements,
    and only those, take the round-to-odd path.
    """
    a, b, c = _inputs(kind, (a, b, c), ftz)
    x, y, z = (decode(kind, o) for o in (a, b, c))
    if kind == "f64":
        return _finish64(exact64.fma(x, y, z, rounding), c, a, b)
    with np.errstate(all="ignore"):
        product = x * y
        total = product + z
    if kind == "f32" and rounding == "rn":
        low = np.ascontiguousarray(total).view(np.uint64) & np.uint64(0x1FFFFFFF)
        near = np.abs(total) < 2.0**-126
        if not (near | (low == np.uint64(0x10000000))).any():
            return _finish(kind, _canonical(total.astype(np.float32)), ftz, sat, relu)
    total = _zero_sign(formats.odd_sum(product, z), product, z, rounding)
    return _finish(kind, encode(kind, total, rounding), ftz, sat, relu)


@_elementwise
def div(kind, a, b, rounding="rn", ftz=False):
    """div.rnd{.ftz}.kind (IEEE 754 quotient rounded once; f32, f64)."""
    a, b = _inputs(kind, (a, b), ftz)
    x, y = decode(kind, a), decode(kind, b)
    if kind == "f64":
        return _finish64(exact64.quotient(x, y, rounding), a, b)
    # If q = x / y is not an f32 value or midpoint m, then |x - m*y| >= 1 in units of the product's
    # last place, so |q - m| / q >= 2**-49: rounding to float64 first (2**-53) cannot cross m.
    with np.errstate(all="ignore"):
        quotient = x / y
    return _finish(kind, encode(kind, quotient, rounding), ftz, False)


@_elementwise
def rcp(kind, a, rounding="rn", ftz=False):
    """rcp.rnd{.ftz}.kind: 1 / a rounded once."""
    one = encode(kind, np.ones(np.shape(a)))
    return div(kind, one, a, rounding, ftz)


@_elementwise
def sqrt(kind, a, rounding="rn", ftz=False):
    """sqrt.rnd{.ftz}.kind rounded once; negative arguments give NaN, -0 gives -0."""
    (a,) = _inputs(kind, (a,), ftz)
    x = decode(kind, a)
    if kind == "f64":
        return _finish64(exact64.root(x, rounding), a)
    with np.errstate(all="ignore"):
        root = np.sqrt(x)  # by the argument of `div`, float64 separates it from every f32 midpoint
    return _finish(kind, encode(kind, root, rounding), ftz, False)


@_elementwise
def minimum(kind, a, b, ftz=False, nan=False, xorsign=False):
    """min{.ftz}{.NaN}{.xorsign.abs}.kind: -0 < +0; a NaN operand is ignored unless `nan`."""
    return _select(kind, a, b, ftz, nan, xorsign, smaller=True)


@_elementwise
def maximum(kind, a, b, ftz=False, nan=False, xorsign=False):
    """max{.ftz}{.NaN}{.xorsign.abs}.kind: -0 < +0; a NaN operand is ignored unless `nan`."""
    return _select(kind, a, b, ftz, nan, xorsign, smaller=False)


def _select(kind, a, b, ftz, nan, xorsign, smaller):
    a, b = _inputs(kind, (a, b), ftz)
    fmt = FORMATS[kind]
    rest = fmt.dtype.type((1 << (fmt.bits - 1)) - 1)
    product_sign = (a ^ b) & ~rest
    if xorsign:
        a, b = a & rest, b & rest
    # Flipping the magnitude bits of negative numbers makes the codes ordered integers: -0 < +0.
    x, y = (np.ascontiguousarray(v).view(f"i{v.dtype.itemsize}").reshape(v.shape) for v in (a, b))
    x, y = (v ^ ((v >> (fmt.bits - 1)) & v.dtype.type(rest)) for v in (x, y))
    out = np.where(x < y if smaller else x > y, a, b)
    a_nan, b_nan = (a & rest) > fmt.infinity, (b & rest) > fmt.infinity
    if a_nan.any() or b_nan.any():
        out = np.where(b_nan, a, np.where(a_nan, b, out))
    if xorsign:
        out = out | product_sign
    not_a_number = a | QUIET_F64 if kind == "f64" else fmt.dtype.type(fmt.nan)
    return np.where(a_nan | b_nan if nan else a_nan & b_nan, not_a_number, out)


@_elementwise
def _flip(kind, a):
    a = as_register(a, kind)
    return a ^ a.dtype.type(1 << (FORMATS[kind].bits - 1))


@_elementwise
def neg(kind, a, ftz=False):
    """neg{.ftz}.kind: the sign bit flipped; a NaN becomes canonical (f64: quiet, its sign kept)."""
    (a,) = _inputs(kind, (a,), ftz)
    return _keep_nan(kind, a, _flip(kind, a))


@_elementwise
def absolute(kind, a, ftz=False):
    """abs{.ftz}.kind: the sign bit cleared; a NaN becomes canonical (f64: quiet, its sign kept)."""
    (a,) = _inputs(kind, (a,), ftz)
    return _keep_nan(kind, a, a & a.dtype.type((1 << (FORMATS[kind].bits - 1)) - 1))


def _keep_nan(kind, a, out):
    fmt = FORMATS[kind]
    nan = (a & a.dtype.type((1 << (fmt.bits - 1)) - 1)) > a.dtype.type(fmt.infinity)
    return np.where(nan, a | QUIET_F64 if kind == "f64" else a.dtype.type(fmt.nan), out)


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compare(operator, kind, a, b, ftz=False):
    """setp.<operator>{.ftz}.kind on one-element kinds -> bool array.

    eq ne lt le gt ge are ordered (false with NaN); equ neu ltu leu gtu geu are true with NaN;
    num / nan test whether both / any operands are numbers / NaN.
    """
    a, b = _inputs(kind, (a, b), ftz)
    x, y = decode(kind, a), decode(kind, b)
    unordered = np.isnan(x) | np.isnan(y)
    if operator in ("num", "nan"):
        return unordered if operator == "nan" else ~unordered
    if operator in COMPARISONS:
        return COMPARISONS[operator](x, y) & ~unordered
    if operator.endswith("u") and operator[:-1] in COMPARISONS:
        return COMPARISONS[operator[:-1]](x, y) | unordered
    known = ", ".join([*COMPARISONS, *(f"{o}u" for o in COMPARISONS), "num", "nan"])
    raise ValueError(f"setp.{operator}.{kind}: unknown comparison; expected one of {known}")


def _canonical(values):
    """f32 values to bits with the hardware's one NaN, 0x7FFFFFFF."""
    nan, out = np.isnan(values), values.view(np.uint32)
    return np.where(nan, np.uint32(0x7FFFFFFF), out) if nan.any() else out


def _native(operation, a, b):
    with np.errstate(all="ignore"):
        out = operation(
            np.ascontiguousarray(a).view(np.float32), np.ascontiguousarray(b).view(np.float32)
        )
    return _canonical(np.asarray(out))
