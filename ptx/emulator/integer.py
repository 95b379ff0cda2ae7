"""Integer and bit instructions on raw register bits.

Kinds are PTX types: "s8".."s64", "u8".."u64", "b8".."b64".  Every function takes unsigned arrays
(see formats.py) and returns unsigned arrays; arithmetic wraps modulo 2**width unless `sat`.
Source: PTX ISA 8.x, "Integer Arithmetic Instructions", "Logic and Shift Instructions".
"""

import numpy as np

from mirage_hello.ptx.emulator.formats import as_register, register_dtype


def width(kind):
    """Bits of an integer PTX type."""
    return int(kind[1:])


def signed(kind, bits):
    """`bits` viewed as the signed or unsigned NumPy type of `kind` (same width)."""
    register = np.ascontiguousarray(as_register(bits, kind))
    return register.view(f"i{register.dtype.itemsize}") if kind[0] == "s" else register


def _store(kind, values):
    """NumPy integers (any width, wrapped) back to the register type."""
    values = np.asarray(values)
    return values.astype(register_dtype(kind))


def _binary(operation):
    def run(kind, a, b):
        with np.errstate(over="ignore"):
            return operation(as_register(a, kind), as_register(b, kind))

    return run


add = _binary(np.add)
sub = _binary(np.subtract)
mul_lo = _binary(np.multiply)
and_ = _binary(np.bitwise_and)
or_ = _binary(np.bitwise_or)
xor = _binary(np.bitwise_xor)


def add_sat(kind, a, b):
    """add.sat.s32: clamp to the signed range."""
    return _clamp32(signed(kind, a).astype(np.int64) + signed(kind, b).astype(np.int64))


def sub_sat(kind, a, b):
    """sub.sat.s32: clamp to the signed range."""
    return _clamp32(signed(kind, a).astype(np.int64) - signed(kind, b).astype(np.int64))


def _clamp32(values):
    return np.clip(values, -(1 << 31), (1 << 31) - 1).astype(np.int32).view(np.uint32)


def neg(kind, a):
    """neg.sN: two's complement negation."""
    return _binary(np.subtract)(kind, np.zeros_like(as_register(a, kind)), a)


def absolute(kind, a):
    """abs.sN; the minimum stays itself."""
    a = as_register(a, kind)
    return np.where(signed("s" + kind[1:], a) < 0, neg(kind, a), a)


def not_(kind, a):
    """not.bN."""
    return ~as_register(a, kind)


def cnot(kind, a):
    """cnot.bN: 1 if a == 0, else 0."""
    a = as_register(a, kind)
    return (a == 0).astype(a.dtype)


def minimum(kind, a, b):
    """min.{s,u}N."""
    return _store(kind, np.minimum(signed(kind, a), signed(kind, b)))


def maximum(kind, a, b):
    """max.{s,u}N."""
    return _store(kind, np.maximum(signed(kind, a), signed(kind, b)))


def mul_wide(kind, a, b):
    """mul.wide.{s,u}{16,32}: the full product, twice as wide."""
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width(kind) // 4}")
    product = signed(kind, a).astype(wide) * signed(kind, b).astype(wide)
    return np.asarray(product).view(f"u{wide.itemsize}")


def mul_hi(kind, a, b):
    """mul.hi.{s,u}N: the upper half of the full product."""
    n = width(kind)
    if n <= 32:
        return (mul_wide(kind, a, b) >> np.dtype(f"u{n // 4}").type(n)).astype(register_dtype(kind))
    a, b = as_register(a, kind), as_register(b, kind)
    low, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> s, b & low, b >> s
    middle = a1 * b0 + ((a0 * b0) >> s)
    middle2 = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> s) + (middle2 >> s)
    if kind[0] == "s":
        # signed(a) = a - 2**64 [a < 0]: subtract the other operand from the upper half.
        zero = np.uint64(0)
        high = high - np.where(a >> np.uint64(63) != 0, b, zero)
        high = high - np.where(b >> np.uint64(63) != 0, a, zero)
    return high


def mad_lo(kind, a, b, c):
    """mad.lo.{s,u}N: low half of a*b, plus c."""
    return add(kind, mul_lo(kind, a, b), c)


def mad_hi(kind, a, b, c, sat=False):
    """mad.hi{.sat}.{s,u}N: high half of a*b, plus c (sat: s32 only)."""
    return (add_sat if sat else add)(kind, mul_hi(kind, a, b), c)


def mad_wide(kind, a, b, c):
    """mad.wide.{s,u}{16,32}: full product plus a c of twice the width."""
    wide = f"u{2 * width(kind)}"
    return add(wide, mul_wide(kind, a, b), c)


def mul24_lo(kind, a, b):
    """mul24.lo.{s,u}32: low 32 bits of the product of the low 24 bits."""
    return mul_lo(kind, _low24(kind, a), _low24(kind, b))


def _low24(kind, a):
    a = as_register(a, kind) << np.uint32(8)
    return signed(kind, a) >> 8 if kind[0] == "s" else a >> np.uint32(8)


def div(kind, a, b):
    """div.{s,u}N, truncated toward zero; division by zero gives all ones (as the hardware does)."""
    a, b = signed(kind, a), signed(kind, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    with np.errstate(all="ignore"):
        quotient = _truncated(a, safe)
    return np.where(b == 0, ~np.zeros_like(as_register(a, kind)), _store(kind, quotient))


def rem(kind, a, b):
    """rem.{s,u}N: a - b * trunc(a / b), the sign of a; remainder by zero gives a."""
    a, b = signed(kind, a), signed(kind, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    with np.errstate(all="ignore"):
        remainder = a - safe * _truncated(a, safe)
    return np.where(b == 0, as_register(a, kind), _store(kind, remainder))


def _truncated(a, b):
    quotient = a // b
    if a.dtype.kind == "i":
        inexact = quotient * b != a
        quotient = quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient


def shl(kind, a, count):
    """shl.bN: amounts of at least N give 0."""
    a, count = as_register(a, kind), as_register(count, "u32")
    n = width(kind)
    safe = np.minimum(count, np.uint32(n - 1)).astype(a.dtype)
    return np.where(count >= n, a.dtype.type(0), a << safe)


def shr(kind, a, count):
    """shr.{b,u,s}N: amounts of at least N give 0, or the sign for s types."""
    count = as_register(count, "u32")
    value, n = signed(kind, a), width(kind)
    safe = np.minimum(count, np.uint32(n - 1)).astype(value.dtype)
    shifted = value >> safe
    if kind[0] != "s":
        shifted = np.where(count >= n, value.dtype.type(0), shifted)
    return np.asarray(shifted).view(register_dtype(kind))


def shf(direction, mode, a, b, count):
    """shf.{l,r}.{clamp,wrap}.b32 d, a, b, c: funnel shift of {b,a} (b is the upper word).

    l gives the upper word of the pair shifted left, r the lower word of it shifted right.
    """
    count = as_register(count, "u32")
    n = np.minimum(count, np.uint32(32)) if mode == "clamp" else count & np.uint32(31)
    n = n.astype(np.uint64)
    pair = (as_register(b, "u32").astype(np.uint64) << np.uint64(32)) | as_register(a, "u32")
    if direction == "l":
        return ((pair << n) >> np.uint64(32)).astype(np.uint32)
    return (pair >> n).astype(np.uint32)
