"""Oracles of scalar instruction forms: exact rational arithmetic and Python's integers.

Nothing here uses the emulator.  An oracle takes the form's input arrays and returns its outputs.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from exact_rounding import round_to

NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def to_floats(kind, bits):
    """Python floats of raw bits."""
    if kind == "bf16":
        bits = bits.astype(np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore"):
        return [float(v) for v in bits.view(f"f{bits.dtype.itemsize}")]


def to_bits(kind, value):
    """Raw bits of a float that the format holds exactly."""
    if math.isnan(value):
        return NAN[kind]
    if kind == "bf16":
        return int(np.float32(value).view(np.uint32)) >> 16
    width = WIDTH[kind]
    return int(np.array(value, f"f{width // 8}").view(f"u{width // 8}"))


def flushed(kind, value, ftz):
    smallest = {"f32": 2.0**-126, "f16": 2.0**-14}.get(kind, 0.0)
    return math.copysign(0.0, value) if ftz and abs(value) < smallest else value


def rounded(kind, exact, approximate, mode, ftz, sat, relu):
    """Bits of a result: `exact` a Fraction, or None where only `approximate` (inf, nan) counts."""
    value = approximate
    if exact is not None and exact != 0:
        value = math.copysign(float(round_to(kind, exact, mode)), 1 if exact > 0 else -1)
    value = flushed(kind, value, ftz)
    if sat:
        value = 0.0 if math.isnan(value) or value <= 0 else min(value, 1.0)
    if relu and not math.isnan(value):
        value = value if value > 0 else 0.0
    return to_bits(kind, value)


def arithmetic(kind, function, mode="rn", ftz=False, sat=False, relu=False):
    """Oracle of a sum, product or fused product: `function` on floats and on Fractions alike."""

    def oracle(*raw):
        columns = [[flushed(kind, v, ftz) for v in to_floats(kind, r)] for r in raw]
        out = np.zeros(len(raw[0]), raw[0].dtype)
        for i, values in enumerate(zip(*columns, strict=True)):
            finite = all(math.isfinite(v) for v in values)
            exact = function(*(Fraction(v) for v in values)) if finite else None
            with np.errstate(all="ignore"):
                plain = float(function(*(np.float64(v) for v in values)))
            if len(values) == 3 and math.isinf(values[2]) and all(map(math.isfinite, values[:2])):
                plain = values[2]  # a finite product may overflow here, not on the GPU
            if exact == 0 and mode == "rm" and not _same_sign(function, values):
                plain = -0.0
            out[i] = rounded(kind, exact, plain, mode, ftz, sat, relu)
            if kind == "f64" and math.isnan(plain):
                out[i] = nan_of_f64([int(r[i]) for r in raw])
        return [out]

    return oracle


def nan_of_f64(operands):
    """f64 passes on a NaN operand, made quiet (b before a before c), or makes the default one."""
    *rest, last = operands if len(operands) < 3 else (operands[2], operands[0], operands[1])
    for bits in (last, *rest[::-1]):
        if bits & (1 << 63) - 1 > 0x7FF << 52:
            return bits | 1 << 51
    return 0xFFF8000000000000


def _same_sign(function, values):
    """Whether the terms of an exactly zero result agree in sign: it has that sign in every mode.

    The zeros of opposite signs add to -0 when rounding down; an exact zero of a product never does.
    """
    if len(values) == 3:
        return math.copysign(1, values[0] * values[1]) == math.copysign(1, values[2])
    x, y = values
    if function(2, 3) == 6:  # a product
        return True
    minus = function(2, 3) == -1  # a difference
    return (math.copysign(1, x) == math.copysign(1, y)) != minus


def integers(kind, bits):
    """Python integers of raw bits of an s or u (or b) type."""
    width = int(kind[1:])
    wrap = 1 << width if kind[0] == "s" else 0
    return [int(b) - (wrap if int(b) >> (width - 1) else 0) for b in bits]


def whole(result, kinds, function):
    """Oracle of an integer instruction: `function` on Python ints, wrapped to `result`."""

    def oracle(*raw):
        columns = [integers(k, r) for k, r in zip(kinds, raw, strict=True)]
        width = int(result[1:])
        out = np.zeros(len(raw[0]), f"u{width // 8}")
        for i, values in enumerate(zip(*columns, strict=True)):
            out[i] = function(*values) % (1 << width)
        return [out]

    return oracle


EMIN = {"bf16": -126, "f16": -14, "tf32": -126, "e4m3": -6, "e5m2": -14, "f32": -126}


def exponent(kind, x):
    return max(math.frexp(x)[1] - 1, EMIN[kind]) if x else -(10**6)


def truncate(exact, unit):
    """`exact` toward zero to a multiple of 2**unit."""
    steps = exact / Fraction(2) ** unit
    return Fraction(int(steps)) * Fraction(2) ** unit


def dot(a, b, c, kinds, fraction, keep):
    """sum(a * b) + c by the definition at the top of tensorcore.py, as an exact number.

    Args: a, b lists of floats, c float; kinds of a, b and c; fraction bits kept of each term below
    the largest, and `keep` of the sum below its leading bit (None: all), as f32 has them.
    """
    tops = [exponent(kinds[0], x) + exponent(kinds[1], y) for x, y in zip(a, b, strict=True)]
    top = max([*tops, exponent(kinds[2], c)])
    total = truncate(Fraction(c), top - fraction)
    for x, y in zip(a, b, strict=True):
        total += truncate(Fraction(x) * Fraction(y), top - fraction)
    if total == 0 or keep is None:
        return total
    lead = math.floor(math.log2(abs(total)))
    lead += (abs(total) >= Fraction(2) ** (lead + 1)) - (abs(total) < Fraction(2) ** lead)
    return truncate(total, max(lead, EMIN["f32"]) - keep)


def mma_tile(kinds):
    """Oracle of mma.sync.m16n8 with 4, 2 and 4 registers of a, b, c; bf16 or tf32 into f32."""
    kind = kinds[1]
    each = 2 if kind == "bf16" else 1  # elements in a register

    def element(registers, register, lane, part):
        bits = int(registers[register][lane])
        half = bits >> 16 * part << 16 if each == 2 else bits & ~0x1FFF
        return float(np.array(half & 0xFFFFFFFF, np.uint32).view(np.float32))

    def oracle(a, b, c):
        k, out = 8 * each, np.zeros((4, 32), np.uint32)
        rows, columns = np.zeros((16, k)), np.zeros((8, k))
        for lane in range(32):
            group, quad = divmod(lane, 4)
            for part in range(each):
                for r in range(4):
                    at = each * quad + part + r // 2 * 4 * each
                    rows[group + r % 2 * 8, at] = element(a, r, lane, part)
                for r in range(2):
                    columns[group, each * quad + part + r * 4 * each] = element(b, r, lane, part)
        for r in range(4):
            for lane in range(32):
                row, column = lane // 4 + r // 2 * 8, lane % 4 * 2 + r % 2
                start = float(c[r].view(np.float32)[lane])
                x, y = rows[row].tolist(), columns[column].tolist()
                total = dot(x, y, start, (kind, kind, "f32"), 25, 23)
                if abs(total) >= 2**128:
                    total = math.copysign(math.inf, total)
                out[r, lane] = np.float32(float(total)).view(np.uint32)
        return [out]

    return oracle


def wgmma_tile(n, b_offset):
    """Oracle of one wgmma.m64nNk32 on e4m3 with 128-byte swizzle, both operands K-major.

    For small multiples of 1/4, whose sums are exact in the fp8 accumulator too.
    """

    def operand(image, rows):
        row, k = np.arange(rows)[:, None], np.arange(32)
        raw = image[row * 128 + (k ^ (row % 8) << 4)]
        return torch.from_numpy(raw.copy()).view(torch.float8_e4m3fn).double().numpy()

    def oracle(image, _, d):
        image = image.reshape(-1).view(np.uint8)
        product = operand(image, 64) @ operand(image[b_offset:], n).T
        register, thread = np.arange(n // 2)[:, None], np.arange(128)
        row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
        column = register // 4 * 8 + thread % 4 * 2 + register % 2
        total = d.view(np.float32) + product[row, column]
        return [total.astype(np.float32).view(np.uint32)]

    return oracle
