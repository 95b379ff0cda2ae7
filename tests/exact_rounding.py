"""Floating-point rounding by definition, in exact rational arithmetic: the oracle of unit tests.

Independent of ptx/emulator: values are Fractions, formats are three numbers, one element at a time.
"""

import math
from fractions import Fraction

import numpy as np

# name: significand bits after the leading one, smallest normal exponent, largest finite value
PARAMETERS = {
    "e4m3": (3, -6, Fraction(448)),
    "e5m2": (2, -14, Fraction(57344)),
    "f16": (10, -14, Fraction(65504)),
    "bf16": (7, -126, (2 - Fraction(1, 2**7)) * 2**127),
    "tf32": (10, -126, (2 - Fraction(1, 2**10)) * 2**127),
    "f32": (23, -126, (2 - Fraction(1, 2**23)) * 2**127),
    "f64": (52, -1022, (2 - Fraction(1, 2**52)) * 2**1023),
}


def exponent_of(q):
    """floor(log2(q)) of a positive Fraction."""
    e = q.numerator.bit_length() - q.denominator.bit_length()
    return e if Fraction(2) ** e <= q else e - 1


def round_to(kind, exact, mode="rn"):
    """The Fraction `exact` rounded to a format; +-math.inf when it overflows."""
    mantissa, emin, top = PARAMETERS[kind]
    if exact == 0:
        return exact
    magnitude = abs(exact)
    quantum = Fraction(2) ** (max(exponent_of(magnitude), emin) - mantissa)
    steps = magnitude / quantum
    down = steps.numerator // steps.denominator
    rest = steps - down
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and exact < 0,
        "rp": rest > 0 and exact > 0,
    }[mode]
    value = (down + up) * quantum
    if value > top:
        toward_zero = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        value = top if toward_zero else math.inf
    return value if exact > 0 else -value


def random_bits(rng, dtype, n):
    """Register bits that exercise rounding: uniform bits, clustered exponents, special values."""
    bits = np.dtype(dtype).itemsize * 8
    anything = rng.integers(0, 1 << bits, n, dtype=np.uint64).astype(dtype)
    mantissa = {16: 10, 32: 23, 64: 52}[bits]
    bias = {16: 15, 32: 127, 64: 1023}[bits]
    near_one = rng.integers(0, 1 << mantissa, n, dtype=np.uint64)
    exponents = rng.integers(bias - 12, bias + 12, n).astype(np.uint64) << np.uint64(mantissa)
    sign = rng.integers(0, 2, n).astype(np.uint64) << np.uint64(bits - 1)
    # Half of the significands keep only their top or bottom bits, so that ties are common.
    short = rng.integers(0, mantissa, n).astype(np.uint64)
    near_one = np.where(rng.random(n) < 0.5, near_one >> short << short, near_one)
    ordinary = (sign | exponents | near_one).astype(dtype)
    infinity = ((1 << (bits - 1 - mantissa)) - 1) << mantissa
    special = [0, 1, 2, 3, (1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity, infinity + 1]
    special = np.array([*special, *(s | 1 << (bits - 1) for s in special)], dtype=dtype)
    kind = rng.integers(0, 4, n)
    return np.where(
        kind == 0,
        special[rng.integers(0, len(special), n)],
        np.where(kind == 1, anything, ordinary),
    )
