"""Shared-memory swizzles and the 64-bit matrix descriptor of wgmma.

A swizzle permutes 16-byte chunks by address bits, so it depends on the absolute shared address:
    128 B: bits 4-6 ^= bits 7-9;   64 B: bits 4-5 ^= bits 7-8;   32 B: bit 4 ^= bit 7.
TMA's swizzle modes and wgmma's are the same function.

Descriptor bits: 0-13 start address >> 4, 16-29 leading byte offset (LBO) >> 4, 32-45 stride byte
offset (SBO) >> 4, 49-51 base offset, 62-63 layout (0 none, 1 = 128 B, 2 = 64 B, 3 = 32 B).

Source: PTX ISA 8.x, "Shared Memory Matrix Layout", "Matrix-descriptor format", and the tensor-map
swizzle modes; the LBO/SBO table is checked against an H200 by the fixtures of tests/ptx_forms.py.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LAYOUTS = {0: 0, 1: 128, 2: 64, 3: 32}  # descriptor bits 62-63 -> swizzle span in bytes
ADDRESS_MASK = 0x3FFFF  # the unit sees 18 bits of a shared address


def swizzle(address, span, base_offset=0):
    """Byte address after the swizzle of `span` bytes (0, 32, 64 or 128).

    Args: address integer array of absolute shared addresses; base_offset the descriptor field, the
    (pattern start >> 7) & 7 of a tile that does not start on a pattern boundary.
    Returns: int64 array.
    """
    address = np.asarray(address, dtype=np.int64)
    if span == 0:
        return address
    if span not in (32, 64, 128):
        raise ValueError(f"swizzle: span must be 0, 32, 64 or 128 bytes (got {span})")
    return address ^ ((((address >> 7) - base_offset) & (span // 16 - 1)) << 4)


@dataclass(frozen=True)
class Descriptor:
    """Fields of a wgmma matrix descriptor, all in bytes but `base_offset`."""

    start: int
    lbo: int
    sbo: int
    base_offset: int
    span: int

    @classmethod
    def decode(cls, bits):
        """The descriptor held in a 64-bit register.

        Raises: ValueError when reserved bits are set, which is nearly always a wrong constant.
        """
        bits = int(bits)
        reserved = bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62)
        if reserved:
            raise ValueError(
                f"wgmma descriptor {bits:#018x}: reserved bits {reserved:#x} are set; shift "
                "addresses and offsets right by 4 and mask them to 14 bits"
            )
        return cls(
            start=(bits & 0x3FFF) << 4,
            lbo=(bits >> 16 & 0x3FFF) << 4,
            sbo=(bits >> 32 & 0x3FFF) << 4,
            base_offset=bits >> 49 & 7,
            span=LAYOUTS[bits >> 62],
        )

    def encode(self):
        """The 64-bit register value, the inverse of `decode`."""
        layout = {span: code for code, span in LAYOUTS.items()}[self.span]
        fields = (self.start >> 4 & 0x3FFF) | (self.lbo >> 4) << 16 | (self.sbo >> 4) << 32
        return fields | self.base_offset << 49 | layout << 62

    def addresses(self, rows, columns, itemsize, mn_major=False):
        """Shared byte address of each element of an operand.

        Args: rows extent along M or N; columns extent along K (32 bytes' worth); itemsize bytes of
        an element (1, 2, 4); mn_major True when M or N is the contiguous dimension (16-bit only).
        Returns: int64 [rows][columns], the first byte of element (mn, k).
        """
        if mn_major and itemsize != 2:
            raise ValueError(
                "wgmma: only 16-bit operands may be MN-major; transpose 8- and 32-bit ones"
            )
        # The pattern repeats every 1024 bytes, so one table serves every start of equal remainder.
        low = self.start & 1023
        table = _addresses(
            low, self.lbo, self.sbo, self.base_offset, self.span, rows, columns, itemsize, mn_major
        )
        return (table + (self.start - low)) & ADDRESS_MASK


@lru_cache(maxsize=512)
def _addresses(low, lbo, sbo, base_offset, span, rows, columns, itemsize, mn_major):
    mn = np.arange(rows, dtype=np.int64)[:, None]
    k = np.arange(columns, dtype=np.int64)[None, :]
    if not mn_major:
        byte = k * itemsize
        if span:
            # Atom: 8 rows of `span` bytes; SBO steps to the next 8 rows, LBO is ignored.
            offset = mn // 8 * sbo + mn % 8 * span + byte
        else:
            # Core matrix: 8 rows x 16 bytes, contiguous; LBO along K, SBO along M/N.
            offset = mn // 8 * sbo + mn % 8 * 16 + byte // 16 * lbo + byte % 16
    elif span:
        # Atom: span/2 elements of MN x 8 k; LBO to the next atom along MN, SBO to the next 8 k.
        width = span // 2
        offset = mn // width * lbo + mn % width * 2 + k // 8 * sbo + k % 8 * span
    else:
        # Core matrix: 8 elements of MN x 8 k; LBO to the next 8 k, SBO to the next 8 along MN.
        offset = mn // 8 * sbo + mn % 8 * 2 + k // 8 * lbo + k % 8 * 16
    table = swizzle(low + offset, span, base_offset)
    table.setflags(write=False)
    return table
