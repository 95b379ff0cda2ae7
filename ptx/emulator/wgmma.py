"""wgmma.mma_async: D[64][N] = A[64][K] * B[K][N] (+ D), by a warpgroup of 128 threads.

A comes from registers (always K-major) or, like B always, from shared memory through a descriptor
(swizzle.py).  K is 32 bytes of elements: 16 for f16/bf16, 8 for tf32, 32 for e4m3/e5m2/s8/u8.
Registers are uint32 [registers][128 threads]; the fragments are those of mma.sync with row
16 * warp added (matrix.py).  Numerics: tensorcore.py.
Source: PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from dataclasses import dataclass

import numpy as np

from mirage_hello.ptx.emulator import matrix, tensorcore
from mirage_hello.ptx.emulator.matrix import ELEMENT_BITS
from mirage_hello.ptx.emulator.swizzle import Descriptor


@dataclass(frozen=True)
class Shape:
    """m64n<n>k<k> with element types; `d` is "f32", "f16" or "s32"."""

    n: int
    k: int
    d: str
    a: str
    b: str

    def __post_init__(self):
        if self.n % 8 or not 8 <= self.n <= 256:
            raise ValueError(f"wgmma: N must be a multiple of 8 in 8..256 (got {self.n})")
        if self.k * ELEMENT_BITS[self.a] != 256:
            wanted = 256 // ELEMENT_BITS[self.a]
            raise ValueError(f"wgmma: K must be {wanted} for {self.a} (got {self.k})")

    @property
    def registers(self):
        """D registers per thread."""
        return self.n // 2 if self.d != "f16" else self.n // 4

    @property
    def flops(self):
        """Multiply-adds count two."""
        return 2 * 64 * self.n * self.k


def a_from_registers(registers, kind):
    """Raw A [64][K] from registers uint32 [4][128]; thread t belongs to warp t // 32."""
    bits = ELEMENT_BITS[kind]
    per_warp = np.asarray(registers, dtype=np.uint32).reshape(4, 4, 32).transpose(1, 0, 2)
    tiles = matrix.to_matrix(per_warp, matrix.a_fragment(4, bits), (16, 256 // bits), bits)
    return tiles.reshape(64, 256 // bits)


def d_from_registers(registers, shape):
    """Raw D [64][N] from registers uint32 [shape.registers][128]."""
    bits = ELEMENT_BITS[shape.d]
    per_warp = np.asarray(registers, dtype=np.uint32).reshape(-1, 4, 32).transpose(1, 0, 2)
    index = matrix.c_fragment(shape.n, bits)
    return matrix.to_matrix(per_warp, index, (16, shape.n), bits).reshape(64, shape.n)


def d_to_registers(d, shape):
    """Registers uint32 [shape.registers][128] of raw D [64][N], the inverse of the above."""
    index = matrix.c_fragment(shape.n, ELEMENT_BITS[shape.d])
    tiles = matrix.from_matrix(d.reshape(4, 16, shape.n), index)
    return np.ascontiguousarray(tiles.transpose(1, 0, 2)).reshape(-1, 128)


def operand_addresses(descriptor, rows, shape, kind, mn_major=False):
    """Shared byte address of each element of a descriptor operand: int64 [rows][K].

    Args: descriptor 64-bit int; rows 64 for A, N for B; kind the element type; mn_major the
    imm-trans bit.  Element (i, k) occupies ELEMENT_BITS[kind] // 8 bytes from its address.
    """
    return Descriptor.decode(descriptor).addresses(rows, shape.k, ELEMENT_BITS[kind] // 8, mn_major)


def gather(memory, addresses, itemsize):
    """Raw elements at byte `addresses` of `memory` (uint8, its length a multiple of itemsize)."""
    return memory.view(f"<u{itemsize}")[addresses // itemsize]


def multiply(shape, a, b, d=None, scale_a=1, scale_b=1, satfinite=False):
    """The product itself, on raw matrices.

    Args: a raw [64][K], b raw [N][K] (as stored, row n holds B[:, n]); d raw [64][N] to add to, or
    None when scale-d is 0; scale_a, scale_b +1 or -1.
    Returns: raw D [64][N].
    """
    x, y = matrix.values(shape.a, a), matrix.values(shape.b, b)
    sign = scale_a * scale_b
    short = shape.a in ("e4m3", "e5m2")
    return tensorcore.accumulate(
        x if sign == 1 else -x, y.T, d, shape.d, shape.a, shape.b, short, satfinite
    )


def execute(
    shape, memory, a, b, d=None, scale_a=1, scale_b=1, trans_a=0, trans_b=0, satfinite=False
):
    """One wgmma.mma_async on the registers and shared memory of a warpgroup.

    Args: memory uint8 [bytes], the block's shared memory indexed by shared address; a 64-bit
    descriptor (int) or A registers uint32 [4][128]; b descriptor; d registers uint32
    [registers][128], or None for scale-d = 0.
    Returns: (d registers, [addresses of A or None, addresses of B]); addresses as
    `operand_addresses` gives them, for the race and initialisation detectors.
    Raises: IndexError (NumPy) when an operand lies outside `memory`; check the addresses first.
    """
    itemsize_a, itemsize_b = ELEMENT_BITS[shape.a] // 8, ELEMENT_BITS[shape.b] // 8
    if np.ndim(a) == 0:
        a_addresses = operand_addresses(a, 64, shape, shape.a, bool(trans_a))
        a_bits = gather(memory, a_addresses, itemsize_a)
    else:
        a_addresses, a_bits = None, a_from_registers(a, shape.a)
    b_addresses = operand_addresses(b, shape.n, shape, shape.b, bool(trans_b))
    b_bits = gather(memory, b_addresses, itemsize_b)
    old = None if d is None else d_from_registers(d, shape)
    out = multiply(shape, a_bits, b_bits, old, scale_a, scale_b, satfinite)
    return d_to_registers(out, shape), [a_addresses, b_addresses]
