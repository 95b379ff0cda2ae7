"""Bit-field, byte and packed integer instructions on raw register bits.

bfe, bfi, brev, popc, clz, bfind, prmt, lop3, dp4a, dp2a, sad.
Source: PTX ISA 8.x, "Integer Arithmetic Instructions", "Logic and Shift Instructions", "prmt".
"""

import numpy as np

from mirage_hello.ptx.emulator.formats import as_register
from mirage_hello.ptx.emulator.integer import signed, width


def bfe(kind, a, position, length):
    """bfe.{s,u}{32,64}: `length` bits from `position`; past the top, zeros or the sign bit."""
    a = as_register(a, kind)
    n, kind_of = width(kind), a.dtype.type
    start = as_register(position, "u32") & np.uint32(0xFF)
    count = as_register(length, "u32") & np.uint32(0xFF)
    top = np.minimum(start + count, np.uint32(n))
    used = np.where(start < top, top - np.minimum(start, top), 0).astype(a.dtype)
    shifted = np.where(start < n, a >> np.minimum(start, n - 1).astype(a.dtype), kind_of(0))
    mask = _mask(used, n, a.dtype)
    out = shifted & mask
    if kind[0] != "s":
        return out
    last = np.minimum(start + np.maximum(count, 1) - 1, n - 1).astype(a.dtype)
    sign = ((a >> last) & kind_of(1)).astype(bool) & (count > 0)
    return np.where(sign, out | ~mask, out)


def _mask(count, n, dtype):
    """`count` low ones per element, 0 <= count <= n."""
    one = dtype.type(1)
    partial = (one << np.minimum(count, dtype.type(n - 1))) - one
    return np.where(count >= n, ~dtype.type(0), partial)


def bfi(kind, a, b, position, length):
    """bfi.b{32,64} d, a, b, c, d: `length` low bits of a into b at `position`."""
    a, b = as_register(a, kind), as_register(b, kind)
    n = width(kind)
    start = as_register(position, "u32") & np.uint32(0xFF)
    count = as_register(length, "u32") & np.uint32(0xFF)
    inside = (start < n) & (count > 0)
    at = np.minimum(start, n - 1).astype(a.dtype)
    field = _mask(np.minimum(count, n).astype(a.dtype), n, a.dtype) << at
    return np.where(inside, (b & ~field) | ((a << at) & field), b)


def brev(kind, a):
    """brev.b{32,64}: bits reversed."""
    a = as_register(a, kind)
    n, one = width(kind), a.dtype.type
    step = n // 2
    while step:
        mask = one(((1 << n) - 1) // ((1 << step) + 1))
        a = ((a & mask) << one(step)) | ((a >> one(step)) & mask)
        step //= 2
    return a


def popc(kind, a):
    """popc.b{32,64}: number of ones, as u32."""
    return np.bitwise_count(as_register(a, kind)).astype(np.uint32)


def clz(kind, a):
    """clz.b{32,64}: number of leading zeros, as u32."""
    return (np.uint32(width(kind)) - _bit_length(as_register(a, kind))).astype(np.uint32)


def _bit_length(a):
    count = np.zeros(a.shape, np.uint32)
    step = a.dtype.itemsize * 4
    while step:
        high = a >> a.dtype.type(step)
        some = high != 0
        count += np.where(some, np.uint32(step), np.uint32(0))
        a = np.where(some, high, a)
        step //= 2
    return count + (a != 0).astype(np.uint32)


def bfind(kind, a, shiftamt=False):
    """bfind{.shiftamt}.{s,u}N: position of the highest significant bit, 0xFFFFFFFF if none."""
    a = as_register(a, kind)
    if kind[0] == "s":
        a = np.where(signed(kind, a) < 0, ~a, a)
    found = _bit_length(a)
    position = found - np.uint32(1)
    if shiftamt:
        position = np.uint32(width(kind)) - found
    return np.where(found == 0, np.uint32(0xFFFFFFFF), position)


def prmt(a, b, selector, mode=None):
    """prmt.b32{.f4e,.b4e,.rc8,.ecl,.ecr,.rc16}: four bytes out of the eight of {b, a}.

    Default mode: each 4-bit selector picks a byte by its low 3 bits; its high bit replicates the
    sign of that byte instead.
    """
    pair = (as_register(b, "u32").astype(np.uint64) << np.uint64(32)) | as_register(a, "u32")
    selector = as_register(selector, "u32")
    out = np.zeros(np.broadcast(pair, selector).shape, np.uint32)
    for i in range(4):
        pick = _prmt_index(selector, i, mode)
        byte = (pair >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        if mode is None:
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(pick & np.uint32(8), sign, byte)
        out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
    return out


def _prmt_index(selector, i, mode):
    if mode is None:
        return (selector >> np.uint32(4 * i)) & np.uint32(15)
    c = (selector & np.uint32(3)).astype(np.int64)
    table = {
        "f4e": c + i,
        "b4e": (c - i) % 8,
        "rc8": c,
        "ecl": np.maximum(c, i),
        "ecr": np.minimum(c, i),
        "rc16": 2 * (c & 1) + (i & 1),
    }
    if mode not in table:
        raise ValueError(f"prmt: unknown mode {mode!r}; expected one of {', '.join(table)}")
    return table[mode].astype(np.uint32)


def lop3(a, b, c, table):
    """lop3.b32: bit i of d is bit (a_i*4 + b_i*2 + c_i) of the 8-bit `table`."""
    a, b, c = (as_register(v, "u32") for v in (a, b, c))
    out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if (int(table) >> row) & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def dp4a(a_kind, b_kind, a, b, c):
    """dp4a.{s,u}32.{s,u}32: c plus the four byte products, 32-bit wrap."""
    return _dot(_parts(a_kind, a, 8), _parts(b_kind, b, 8), c)


def dp2a(half, a_kind, b_kind, a, b, c):
    """dp2a.{lo,hi}: c plus two products of the halves of a with the low or high bytes of b."""
    bytes_of_b = _parts(b_kind, b, 8)
    return _dot(_parts(a_kind, a, 16), bytes_of_b[:2] if half == "lo" else bytes_of_b[2:], c)


def _parts(kind, a, size):
    a = as_register(a, "u32")
    parts = [(a >> np.uint32(i)).astype(f"u{size // 8}") for i in range(0, 32, size)]
    return [(p.view(f"i{size // 8}") if kind[0] == "s" else p).astype(np.int64) for p in parts]


def _dot(xs, ys, c):
    total = as_register(c, "u32").astype(np.int64)
    for x, y in zip(xs, ys, strict=True):
        total = total + x * y
    return (total & 0xFFFFFFFF).astype(np.uint32)


def sad(kind, a, b, c):
    """sad.{s,u}N: c + |a - b|, wrapping."""
    x, y = signed(kind, a), signed(kind, b)
    difference = as_register(np.where(x > y, x, y), kind) - as_register(np.where(x > y, y, x), kind)
    return as_register(c, kind) + difference
