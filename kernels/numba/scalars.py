"""The arithmetic of one element, in Python that Numba compiles for both targets.

Numba has no bfloat16, and no float16 on a CPU. Both travel as uint16 and are converted by their
bits: exactly to float32, and back rounded to nearest, ties to even. The same lines run as plain
Python in Numba's CUDA simulator.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

u16, u32, f32 = np.uint16, np.uint32, np.float32
ZERO, ONE, HALF_RANGE, TOP_LEVEL = f32(0), f32(1), f32(127.5), f32(255)
TWO_112 = f32(2.0**112)  # exponent biases: 127 of float32, 15 of float16
ROUND_TO_INTEGER = f32(12582912)  # 1.5 * 2^23: adding it leaves no fraction bits


def same(value):
    return f32(value)


def from_bfloat16(bits):
    return u32(u32(bits) << u32(16)).view(f32)


def to_bfloat16(value):
    if value != value:
        return u16(0x7FC0)
    bits = f32(value).view(u32)
    # Half a unit of the result, less one where the result would be even: ties go to even.
    return u16(u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16))


def from_float16(bits):
    magnitude = u32(u32(u32(bits) & u32(0x7FFF)) << u32(13))
    # The exponent is 112 too small, of denormals too; the product is exact.
    value = magnitude.view(f32) * TWO_112
    if u32(u32(bits) & u32(0x7C00)) == u32(0x7C00):  # infinity, NaN
        value = u32(magnitude | u32(0x7F800000)).view(f32)
    sign = u32(u32(u32(bits) & u32(0x8000)) << u32(16))
    return u32(f32(value).view(u32) | sign).view(f32)


def to_float16(value):
    bits = f32(value).view(u32)
    sign = u32(u32(bits >> u32(16)) & u32(0x8000))
    magnitude = u32(bits & u32(0x7FFFFFFF))
    if magnitude > u32(0x7F800000):
        return u16(0x7E00)
    if magnitude >= u32(0x477FF000):  # 65520, the tie between 65504 and infinity
        return u16(u32(sign | u32(0x7C00)))
    if magnitude < u32(0x38800000):  # below 2^-14: a float16 denormal, a multiple of 2^-24
        # 0.5 has units of 2^-24 in float32: the addition rounds, its low bits are the result.
        rounded = f32(magnitude.view(f32) + f32(0.5)).view(u32)
        return u16(u32(sign | u32(rounded - u32(0x3F000000))))
    # 13 bits go. Half of that, less one where the result would be even: ties go to even.
    odd = u32(u32(magnitude >> u32(13)) & u32(1))
    rounded = u32(magnitude + u32(0xFFF) + odd)
    return u16(u32(sign | u32(u32(rounded - u32(0x38000000)) >> u32(13))))


def silu(value):
    # exp of a negative number cannot overflow.
    e = f32(math.exp(-abs(value)))
    return f32(value / (ONE + e)) if value >= ZERO else f32(value * e / (ONE + e))


def level_to_model(level):
    # x / 127.5 - 1 = (x - 127.5) / 127.5, whose difference is exact and whose ends are -1 and 1.
    return f32((level - HALF_RANGE) / HALF_RANGE)


def model_to_level(value):
    level = f32((value + ONE) * HALF_RANGE)
    if not level > ZERO:  # NaN too
        return ZERO
    return f32(f32(min(level, TOP_LEVEL) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER)


def to_uint8(level):
    return np.uint8(level)


def value_of(coefficient, sample):
    return f32(coefficient)


def element_of(coefficients, sample):
    return f32(coefficients[sample])


# dtype -> (storage -> float32, float32 -> storage)
CONVERSIONS: dict[torch.dtype, tuple[Callable, Callable]] = {
    torch.float32: (same, same),
    torch.float16: (from_float16, to_float16),
    torch.bfloat16: (from_bfloat16, to_bfloat16),
    torch.uint8: (same, to_uint8),
}
OPS = {"silu": silu, "frame_to_model": level_to_model, "model_to_frame": model_to_level}


def unary(jit: Callable, op: str, source: torch.dtype, target: torch.dtype) -> Callable:
    """jit-compiled: one stored element of `source` -> one of `target`."""
    decode, compute = jit(CONVERSIONS[source][0]), jit(OPS[op])
    encode = jit(CONVERSIONS[target][1])

    def element(x):
        return encode(compute(decode(x)))

    return jit(element)


def combination(jit: Callable, dtype: torch.dtype, a_per_sample: bool, b_per_sample: bool):
    """jit-compiled: (a, x, b, y, sample) -> a x + b y; x, y and the result stored as `dtype`."""
    decode, encode = (jit(convert) for convert in CONVERSIONS[dtype])
    a_of = jit(element_of if a_per_sample else value_of)
    b_of = jit(element_of if b_per_sample else value_of)

    def element(a, x, b, y, sample):
        return encode(f32(a_of(a, sample) * decode(x) + b_of(b, sample) * decode(y)))

    return jit(element)
