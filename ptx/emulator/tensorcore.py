"""The arithmetic of the tensor core, bit for bit as an H200 does it: d = a @ b + c.

One instruction adds its K products and the accumulator in fixed point:

    e = max over the K products and c of their exponents   (of a product: exponent(a) + exponent(b),
                                                             so its significand lies in [1, 4))
    each term is truncated toward zero to a multiple of 2**(e - F), the terms are added exactly,
    the sum is truncated to P fraction bits (f32) or rounded to nearest (f16); from 2**128 on, an
    f32 sum is infinity: truncation does not stop at the largest finite value.

    F = 25, P = 23   f16, bf16, tf32 operands (mma.sync and wgmma; K = 4, 8 or 16 in one group)
    F = 13, P = 13   e4m3, e5m2 operands of wgmma: the short accumulator of fp8 (K = 32)
    mma.sync on fp8  is emulated by ptxas: f16 products with k % 4 < 2, then those with k % 4 >= 2,
                     accumulated from zero, then one f32 addition of c

Integer operands add exactly and wrap (or saturate).  The constants were fitted on 46 random cases
of one H200 (tests/ptx_forms_matrix.py, ptx_forms_wgmma.py; styles "random" and "wide", chains of 8
instructions).  They hold for 16 cases whose operands are any bits (overflow, infinities, NaN) and 6
at the ends of f32 (subnormal operands, accumulators and sums; sums around 2**128): every bit of
every result agrees.  Non-finite operands follow IEEE rules, with one NaN: 0x7fffffff in f32,
0x7fff in f16.
"""

import numpy as np

from mirage_hello.ptx.emulator import arith
from mirage_hello.ptx.emulator.cvt import integer_values
from mirage_hello.ptx.emulator.formats import FORMATS, decode, encode

_ZERO = np.int32(-20000)  # exponent of a zero: below that of any product
_COLUMNS = 64  # columns of the result at a time: 64 x 64 x 32 products are 1 MB


def exponents(kind, values):
    """floor(log2 |x|), not below the smallest normal exponent of the format; very small for 0."""
    exponent = np.frexp(values)[1] - 1
    return np.where(values == 0, _ZERO, np.maximum(exponent, FORMATS[kind].emin)).astype(np.int32)


def _fixed_point(a, b, a_exponent, b_exponent, c, c_exponent, fraction):
    """Aligned and truncated sum of the products a[..., M, K] * b[..., N, K] and c[..., M, N]."""
    largest = (a_exponent[..., :, None, :] + b_exponent[..., None, :, :]).max(-1)
    largest = np.maximum(largest, c_exponent)
    unit = np.clip(largest - fraction, -1000, 1000)
    scale = np.ldexp(1.0, -unit)
    terms = a[..., :, None, :] * b[..., None, :, :]
    # Products and c are below 2**(largest + 2): terms * scale stays far inside float64.
    terms *= scale[..., None]
    np.trunc(terms, out=terms)
    return np.ldexp(terms.sum(-1) + np.trunc(c * scale), unit)


def _keep(values, fraction):
    """Truncate to `fraction` bits after the leading one."""
    unit = np.ldexp(1.0, np.frexp(values)[1] - 1 - fraction)
    return np.trunc(values / unit) * unit


def _float(a, b, c, kind, a_kind, b_kind, short):
    """The fixed-point sum of one instruction on float64 values; raw bits of `kind`."""
    b = np.swapaxes(b, -1, -2)
    fraction = 13 if short else 25
    with np.errstate(all="ignore"):
        # Only to see where the result is not finite; float64 has room for every finite product.
        plain = a @ np.swapaxes(b, -1, -2) + c
        special = ~np.isfinite(plain)
        a, b, c = (np.where(np.isfinite(v), v, 0.0) for v in (a, b, c))
        ea, eb, ec = exponents(a_kind, a), exponents(b_kind, b), exponents(kind, c)
        parts = [
            _fixed_point(a, b[..., n, :], ea, eb[..., n, :], c[..., n], ec[..., n], fraction)
            for n in (slice(i, i + _COLUMNS) for i in range(0, c.shape[-1], _COLUMNS))
        ]
        total = np.concatenate(parts, axis=-1)
        if short and kind == "f32":
            total = np.where(total == 0, total, _keep(total, 13))
        if kind == "f32":
            total = np.where(np.abs(total) < 2.0**128, total, np.copysign(np.inf, total))
    out = encode(kind, total, "rz" if kind == "f32" else "rn")
    return np.where(special, encode(kind, plain), out) if special.any() else out


def accumulate(a, b, c, kind, a_kind, b_kind, short=False, satfinite=False):
    """d = a @ b + c of one tensor-core instruction.

    Args: a [..., M, K], b [..., K, N] values (float64, or int64 for integer types); c raw bits
    [..., M, N] of the accumulator type, or None for zero; kind "f32", "f16" or "s32"; a_kind,
    b_kind element types; short the 13-bit accumulation of fp8 wgmma; satfinite clamps s32.
    Returns: raw bits [..., M, N].
    """
    if kind == "s32":
        total = a @ b + (0 if c is None else integer_values("s32", c))
        if satfinite:
            total = np.clip(total, -(1 << 31), (1 << 31) - 1)
        return (total & 0xFFFFFFFF).astype(np.uint32)
    shape = (*a.shape[:-1], b.shape[-1])
    values = np.zeros(shape) if c is None else decode(kind, c)
    return _float(a, b, values, kind, a_kind, b_kind, short)


def accumulate_fp8_mma(a, b, c):
    """mma.sync.m16n8k32 on fp8 as ptxas emulates it on sm_90, in f16; c raw f32 bits."""
    low = np.arange(a.shape[-1]) % 4 < 2
    half = accumulate(a[..., low], b[..., low, :], None, "f32", "f16", "f16")
    both = accumulate(a[..., ~low], b[..., ~low, :], half, "f32", "f16", "f16")
    return arith.add("f32", c, both)
