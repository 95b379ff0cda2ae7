"""float64 arithmetic rounded once in any IEEE mode: add, fma, quotient, root.

NumPy rounds to nearest and has no fused multiply-add.  Directed modes step the nearest result by
the sign of its error.  fma uses Dekker's exact product and the sum of Boldo and Melquiond
("Emulation of FMA and correctly rounded sums", 2008); elements whose product could overflow or lose
bits to underflow, and the rare directed quotients and roots, use exact rational arithmetic.
"""

import math
from fractions import Fraction

import numpy as np

from mirage_hello.ptx.emulator.formats import odd_sum, two_sum


def step(value, error_sign, rounding):
    """`value` moved one float64 toward the exact result in a directed mode.

    Args: value float64 nearest result; error_sign sign of (exact - value); rounding rn, rz, rm, rp.
    """
    if rounding == "rn":
        return value
    with np.errstate(all="ignore"):
        if rounding == "rz":
            return np.where(error_sign * np.sign(value) < 0, np.nextafter(value, 0.0), value)
        sign, limit = (-1, -np.inf) if rounding == "rm" else (1, np.inf)
        return np.where(error_sign * sign > 0, np.nextafter(value, limit), value)


def _error_sign(value, error, finite):
    """Sign of the error; a result that overflowed to infinity is too large in magnitude."""
    overflow = finite & np.isinf(value)
    with np.errstate(invalid="ignore"):
        return np.where(
            overflow, -np.sign(value), np.where(np.isfinite(error), np.sign(error), 0.0)
        )


def add(x, y, rounding="rn"):
    """x + y rounded once (float64 arrays)."""
    s, e = two_sum(x, y)
    if rounding == "rn":
        return s
    out = step(s, _error_sign(s, e, np.isfinite(x) & np.isfinite(y)), rounding)
    if rounding == "rm":
        out = np.where((s == 0) & (np.signbit(x) != np.signbit(y)), -0.0, out)
    return out


def _split(x):
    """Veltkamp: x = high + low, each with at most 26 significand bits."""
    t = x * 134217729.0  # 2**27 + 1
    high = t - (t - x)
    return high, x - high


def two_product(x, y):
    """Dekker: p = RN(x * y) and the exact error e (no overflow or underflow)."""
    p = x * y
    (xh, xl), (yh, yl) = _split(x), _split(y)
    return p, xl * yl - (((p - xh * yh) - xl * yh) - xh * yl)


def _fma_rational(x, y, z, rounding):
    """One element of fma in exact rational arithmetic (finite operands, x * y != 0)."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return -0.0 if rounding == "rm" else 0.0
    return _round_rational(exact, rounding)


def _round_rational(exact, rounding):
    try:
        value = exact.numerator / exact.denominator
    except OverflowError:
        value = math.inf if exact > 0 else -math.inf
    if math.isinf(value):
        sign = -1.0 if value > 0 else 1.0
    else:
        difference = exact - Fraction(value)
        sign = (difference > 0) - (difference < 0)
    if value == 0.0 and rounding == "rz":
        return value
    return float(step(np.float64(value), np.float64(sign), rounding))


def fma(x, y, z, rounding="rn"):
    """x * y + z rounded once (float64 arrays of one shape)."""
    x, y, z = np.broadcast_arrays(np.float64(x), np.float64(y), np.float64(z))
    with np.errstate(all="ignore"):
        plain = x * y + z
        # An infinite addend decides, though a finite product may overflow here.
        plain = np.where(np.isinf(z) & np.isfinite(x) & np.isfinite(y), z, plain)
        ordinary = np.isfinite(x) & np.isfinite(y) & np.isfinite(z) & (x != 0) & (y != 0)
        size = [np.frexp(v)[1] for v in (x, y, z)]
        product = size[0] + size[1]
        safe = ordinary & (np.abs(size[0]) < 900) & (np.abs(size[1]) < 900) & (product < 1000)
        safe &= (product > -900) & (size[2] < 1000) & ((z == 0) | (size[2] > -900))
        uh, ul = two_product(np.where(safe, x, 1.0), np.where(safe, y, 1.0))
        th, tl = two_sum(np.where(safe, z, 0.0), ul)
        vh, vl = two_sum(uh, th)
        out = np.where(safe, add(vh, odd_sum(tl, vl), rounding), plain)
    if rounding == "rm":
        # An exact zero from operands of opposite sign is -0 when rounding down.
        both_zero = ~ordinary & (plain == 0)
        negative = np.signbit(x) != np.signbit(y)
        out = np.where(both_zero & (negative != np.signbit(z)), -0.0, out)
    rest = ordinary & ~safe
    if rest.any():
        out = np.array(out)
        for index in zip(*np.nonzero(np.atleast_1d(rest)), strict=True):
            at = index if rest.ndim else ()
            out[at] = _fma_rational(float(x[at]), float(y[at]), float(z[at]), rounding)
    return out


def _apply(function, fallback, arguments, mask):
    out = np.array(fallback)
    for index in np.ndindex(out.shape):
        if mask[index]:
            out[index] = function(*(float(a[index]) for a in arguments))
    return out


def quotient(x, y, rounding="rn"):
    """x / y rounded once."""
    x, y = np.broadcast_arrays(np.float64(x), np.float64(y))
    with np.errstate(all="ignore"):
        plain = x / y
    if rounding == "rn":
        return plain
    ordinary = np.isfinite(x) & np.isfinite(y) & (x != 0) & (y != 0)
    return _apply(
        lambda a, b: _round_rational(Fraction(a) / Fraction(b), rounding), plain, (x, y), ordinary
    )


def root(x, rounding="rn"):
    """sqrt(x) rounded once; negative arguments give NaN."""
    x = np.asarray(x, dtype=np.float64)
    with np.errstate(all="ignore"):
        plain = np.sqrt(x)
    if rounding == "rn":
        return plain

    def one(a):
        value = math.sqrt(a)
        difference = Fraction(a) - Fraction(value) ** 2
        return float(
            step(np.float64(value), np.float64((difference > 0) - (difference < 0)), rounding)
        )

    return _apply(one, plain, (x,), np.isfinite(x) & (x > 0))
