"""Warp matrix instructions: fragments of mma.sync, ldmatrix, stmatrix, movmatrix.

Registers of a warp are arrays [..., registers][32 lanes] of uint32; leading dimensions are warps.
With lane = 4*g + q (g = lane // 4, q = lane % 4) and e elements of a 32-bit register:

    A register r:  row g + 8*(r & 1),   k = e_count*q + 4*e_count*(r >> 1) + e
    B register r:  column g,            k = e_count*q + 4*e_count*r + e
    C, D (32-bit): row g + 8*(r >> 1),  column 2*q + (r & 1)
    C, D (f16):    row g + 8*r,         columns 2*q and 2*q + 1 (low, high half)

One formula covers every element width: 16 bits (e_count 2), 8 bits (4), tf32 (1).

Numerics: tensorcore.py, bit for bit the hardware's.
Source: PTX ISA 8.x, "Warp Level Matrix Instructions".
"""

from functools import lru_cache

import numpy as np

from mirage_hello.ptx.emulator import tensorcore
from mirage_hello.ptx.emulator.cvt import integer_values
from mirage_hello.ptx.emulator.formats import FORMATS, decode, encode

ELEMENT_BITS = {
    **{name: fmt.bits for name, fmt in FORMATS.items()},
    "s8": 8,
    "u8": 8,
    "s32": 32,
}

_LANE = np.arange(32)
_G, _Q = _LANE // 4, _LANE % 4


@lru_cache(maxsize=64)
def a_fragment(registers, bits):
    """(row, k) int arrays [registers][32][elements] of an A operand with `bits`-bit elements."""
    count = 32 // bits
    r, e = np.arange(registers)[:, None, None], np.arange(count)
    row = _G[:, None] + 8 * (r & 1) + 0 * e
    return row, count * _Q[:, None] + 4 * count * (r >> 1) + e


@lru_cache(maxsize=64)
def b_fragment(registers, bits):
    """(k, column) int arrays [registers][32][elements] of a B operand."""
    count = 32 // bits
    r, e = np.arange(registers)[:, None, None], np.arange(count)
    k = count * _Q[:, None] + 4 * count * r + e
    return k, _G[:, None] + 0 * k


@lru_cache(maxsize=64)
def c_fragment(columns, bits=32):
    """(row, column) int arrays [registers][32][elements] of an accumulator 16 rows x `columns`.

    For wgmma (columns = N) the rows are those of one warp; add 16 * warp.
    """
    registers = columns // 2 if bits == 32 else columns // 4
    r = np.arange(registers)[:, None, None]
    if bits == 32:
        e = np.zeros(1, dtype=int)
        row, column = (
            _G[:, None] + 8 * (r >> 1 & 1) + e,
            8 * (r >> 2) + 2 * _Q[:, None] + (r & 1) + e,
        )
    else:
        e = np.arange(2)
        row, column = _G[:, None] + 8 * (r & 1) + 0 * e, 8 * (r >> 1) + 2 * _Q[:, None] + e
    return row, column


def unpack(registers, bits):
    """uint32 [..., 32] -> elements [..., 32, 32 // bits], lowest bits first."""
    registers = np.ascontiguousarray(registers, dtype=np.uint32)
    return registers.view(f"<u{bits // 8}").reshape(*registers.shape, 32 // bits)


def pack(elements):
    """Elements [..., n] whose bits fill a word -> uint32 [...], the inverse of `unpack`."""
    elements = np.ascontiguousarray(elements)
    return elements.view("<u4").reshape(elements.shape[:-1])


def to_matrix(registers, index, shape, bits):
    """Scatter a fragment [..., registers, 32] into a raw-bit matrix [..., *shape]."""
    elements = unpack(registers, bits)
    out = np.zeros((*elements.shape[:-3], *shape), dtype=elements.dtype)
    out[(..., *index)] = elements
    return out


def from_matrix(matrix, index):
    """Gather a fragment [..., registers, 32] from a raw-bit matrix [..., rows, columns]."""
    return pack(matrix[(..., *index)])


def values(kind, bits):
    """Matrix elements as float64, or int64 for s8, u8, s32."""
    return integer_values(kind, bits) if kind in ("s8", "u8", "s32") else decode(kind, bits)


def mma(shape, kinds, a, b, c, satfinite=False):
    """mma.sync.aligned.<shape>.row.col.<d>.<a>.<b>.<c>.

    Args: shape (m, n, k) with m = 16, n = 8; kinds (d, a, b, c) PTX types; a, b, c uint32
    [..., registers, 32]; a and b of type f16, bf16, tf32, e4m3, e5m2, s8 or u8.
    Returns: d uint32 [..., registers, 32].
    Raises: ValueError for a shape without these fragments.
    """
    m, n, k = shape
    d_kind, a_kind, b_kind, c_kind = kinds
    bits = ELEMENT_BITS[a_kind]
    if (m, n) != (16, 8) or k * bits not in (128, 256):
        raise ValueError(f"mma.sync.m{m}n{n}k{k}.{a_kind}: expected m16n8 with k of 16 or 32 bytes")
    a_index, b_index = a_fragment(k * bits // 64, bits), b_fragment(k * bits // 128, bits)
    a_values = values(a_kind, to_matrix(a, a_index, (m, k), bits))
    b_values = values(b_kind, to_matrix(b, b_index, (k, n), bits))
    c_index = c_fragment(n, ELEMENT_BITS[c_kind])
    c_bits = to_matrix(c, c_index, (m, n), ELEMENT_BITS[c_kind])
    if c_kind != d_kind:
        c_bits = encode(d_kind, decode(c_kind, c_bits))
    if a_kind in ("e4m3", "e5m2"):
        d = tensorcore.accumulate_fp8_mma(a_values, b_values, c_bits)
    else:
        d = tensorcore.accumulate(
            a_values, b_values, c_bits, d_kind, a_kind, b_kind, satfinite=satfinite
        )
    return from_matrix(d, c_fragment(n, ELEMENT_BITS[d_kind]))


def ldmatrix_rows(addresses, count):
    """Row addresses that ldmatrix / stmatrix .x<count> touches, 16 bytes each.

    Args: addresses [..., 32] shared byte address of each lane; lanes 0 .. 8*count-1 are used.
    Returns: [..., count, 8]; lane 8*i + j supplies row j of matrix i.
    """
    addresses = np.asarray(addresses)
    return addresses[..., : 8 * count].reshape(*addresses.shape[:-1], count, 8)


def _transposed(registers):
    """The m8n8 b16 fragment of the transposed matrices, registers [..., 32]."""
    index = m8n8_fragment()
    matrix = to_matrix(registers[..., None, :], index, (8, 8), 16)
    return from_matrix(np.swapaxes(matrix, -1, -2), index)[..., 0, :]


@lru_cache(maxsize=1)
def m8n8_fragment():
    """(row, column) [1][32][2] of an m8n8 b16 matrix: a lane holds row g, columns 2q and 2q+1."""
    e = np.arange(2)
    return (_G[:, None] + 0 * e)[None], (2 * _Q[:, None] + e)[None]


def ldmatrix(rows, trans=False):
    """ldmatrix.sync.aligned.m8n8.x<count>{.trans}.shared.b16.

    Args: rows uint8 [..., count, 8, 16], the 16 bytes at each address of `ldmatrix_rows`.
    Returns: registers uint32 [..., count, 32]: lane holds row lane//4, elements 2*(lane%4), +1.
    """
    rows = np.ascontiguousarray(rows)
    registers = rows.view("<u4").reshape(*rows.shape[:-2], 32)
    return _transposed(registers) if trans else registers


def stmatrix(registers, trans=False):
    """stmatrix.sync.aligned.m8n8.x<count>{.trans}.shared.b16.

    Args: registers uint32 [..., count, 32].
    Returns: rows uint8 [..., count, 8, 16] to store at the addresses of `ldmatrix_rows`.
    """
    registers = np.ascontiguousarray(registers, dtype=np.uint32)
    if trans:
        registers = np.ascontiguousarray(_transposed(registers))
    return registers.view(np.uint8).reshape(*registers.shape[:-1], 8, 16)


def movmatrix(registers):
    """movmatrix.sync.aligned.m8n8.trans.b16 of registers [..., 32]."""
    return _transposed(np.asarray(registers, dtype=np.uint32))
