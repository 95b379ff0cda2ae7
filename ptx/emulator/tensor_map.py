"""The TMA unit: which global and shared bytes one cp.async.bulk.tensor instruction touches.

    moved = transfer(tensor_map, coordinates, shared_address, offsets)      offsets: im2col (w, h)
    load:   shared[moved.shared] = global[moved.address] where moved.inside, else 0   (zero fill)
    store:  global[moved.address] = shared[moved.shared] where moved.inside           (clipped)
    reduce: global[moved.address] = reduce(op, kind, old, new) where moved.inside

A tensor map is anything with the fields of `mirage_hello.ptx.tensor_map.TensorMap`: kind, tensor,
dims, strides (bytes, of dims[1:]), box, element_strides, swizzle, dtype, lower, upper, channels,
pixels; all innermost dimension first.

Tiled: element i of dimension d lies at coordinate[d] + i * element_strides[d], and the box holds
ceil(box[d] / element_strides[d]) of them (dimension 0 ignores its element stride).
im2col: `pixels` positions are walked from the base coordinate, W fastest, then H, then N, inside
[lower, dim + upper) of each spatial dimension, by the element strides; `offsets` are added to each
position after the walk.
The box lies dense in shared memory, innermost first, its 16-byte chunks permuted by the swizzle;
rows narrower than the swizzle are padded to its span.

Source: PTX ISA 8.x, "Tensors", "cp.async.bulk.tensor"; cuda.h, cuTensorMapEncodeTiled / Im2col.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mirage_hello.ptx.emulator import arith, integer
from mirage_hello.ptx.emulator.swizzle import swizzle

SWIZZLE_ALIGNMENT = {0: 128, 32: 256, 64: 512, 128: 1024}  # bytes until the pattern repeats
_OFFSET_LIMIT = {3: 1 << 16, 4: 1 << 8, 5: 1 << 5}  # im2col offsets by rank
_CORNERS = {3: (-(1 << 15), (1 << 15) - 1), 4: (-128, 127), 5: (-16, 15)}


@dataclass(frozen=True)
class Transfer:
    """One instruction's elements, in shared-memory order before the swizzle.

    address: int64 [n], global byte address of each element (meaningless where not inside);
    inside: bool [n]; shared: int64 [n], shared byte address; itemsize: bytes of an element;
    nbytes: what the mbarrier counts, the whole box with its out-of-bounds part.
    """

    address: np.ndarray
    inside: np.ndarray
    shared: np.ndarray
    itemsize: int

    @property
    def nbytes(self):
        return self.inside.size * self.itemsize


def itemsize(tensor_map):
    """Bytes of an element."""
    return int(tensor_map.dtype.itemsize)


def box_shape(tensor_map):
    """Elements that land in shared memory per dimension, innermost first."""
    if tensor_map.kind == "im2col":
        return (tensor_map.channels, tensor_map.pixels)
    strides = (1, *tensor_map.element_strides[1:])
    return tuple(-(-b // s) for b, s in zip(tensor_map.box, strides, strict=True))


def box_bytes(tensor_map):
    """Bytes that one load counts on its mbarrier: the whole box, filled part included."""
    return math.prod(box_shape(tensor_map)) * itemsize(tensor_map)


def _require(condition, message):
    if not condition:
        raise ValueError(f"tensor map: {message}")


def check_map(tensor_map, base=None):
    """The limits of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col.

    Args: base global address of the tensor; default tensor_map.tensor.data_ptr().
    Raises: ValueError naming the limit and the value.
    """
    m, size = tensor_map, itemsize(tensor_map)
    rank = len(m.dims)
    base = m.tensor.data_ptr() if base is None else base
    _require(1 <= rank <= 5, f"rank must be 1..5 (got {rank})")
    _require(base % 16 == 0, f"the address must be a multiple of 16 bytes (got {base:#x})")
    _require(all(1 <= d <= 1 << 32 for d in m.dims), f"dims must be 1..2**32 (got {m.dims})")
    _require(len(m.strides) == rank - 1, f"strides must have {rank - 1} entries (got {m.strides})")
    good = all(s % 16 == 0 and 0 <= s < 1 << 40 for s in m.strides)
    _require(good, f"strides must be multiples of 16 bytes below 2**40 (got {m.strides})")
    _require(len(m.element_strides) == rank, f"element_strides must have {rank} entries")
    good = all(1 <= s <= 8 for s in m.element_strides)
    _require(good, f"element_strides must be 1..8 (got {m.element_strides})")
    _require(m.swizzle in SWIZZLE_ALIGNMENT, f"swizzle must be 0, 32, 64 or 128 (got {m.swizzle})")
    if m.kind == "im2col":
        inner = m.channels * size
        _check_im2col(m, rank)
    else:
        _require(len(m.box) == rank, f"box must have {rank} entries (got {m.box})")
        _require(all(1 <= b <= 256 for b in m.box), f"box must be 1..256 (got {m.box})")
        inner = m.box[0] * size
    _require(inner % 16 == 0, f"the innermost box must be a multiple of 16 bytes (got {inner})")
    if m.swizzle:
        fits = inner <= m.swizzle
        _require(
            fits, f"the innermost box must not exceed the swizzle ({inner} > {m.swizzle} bytes)"
        )


def _check_im2col(m, rank):
    _require(3 <= rank <= 5, f"im2col rank must be 3..5 (got {rank})")
    low, high = _CORNERS[rank]
    for name, corner in (("lower", m.lower), ("upper", m.upper)):
        good = len(corner) == rank - 2 and all(low <= c <= high for c in corner)
        _require(good, f"{name} corner must be {rank - 2} values in {low}..{high} (got {corner})")
    _require(1 <= m.channels <= 256, f"channels must be 1..256 (got {m.channels})")
    _require(1 <= m.pixels <= 1024, f"pixels must be 1..1024 (got {m.pixels})")


def check_transfer(tensor_map, coordinates, shared_address, offsets=(), store=False):
    """What the instruction itself requires.

    Raises: ValueError for a wrong number of coordinates or offsets, a misaligned shared address
    (128 bytes; 256, 512, 1024 for the 32-, 64-, 128-byte swizzle), and for what an H200 refuses as
    an illegal instruction: a negative coordinate of a store, a tiled box whose innermost coordinate
    is not a multiple of 16 bytes.
    """
    rank = len(tensor_map.dims)
    if len(coordinates) != rank:
        raise ValueError(
            f"tensor map: rank {rank} needs {rank} coordinates (got {len(coordinates)})"
        )
    if store and min(coordinates) < 0:
        raise ValueError(
            f"tensor map: coordinates of a store must not be negative (got {list(coordinates)}); "
            "only its far edges are clipped"
        )
    first = int(coordinates[0]) * itemsize(tensor_map)
    if tensor_map.kind != "im2col" and first % 16:
        raise ValueError(
            "tensor map: the innermost coordinate must be a multiple of 16 bytes "
            f"(got {coordinates[0]}, {first} bytes)"
        )
    alignment = SWIZZLE_ALIGNMENT[tensor_map.swizzle]
    if shared_address % alignment:
        raise ValueError(
            f"tensor map: the shared address must be a multiple of {alignment} bytes for swizzle "
            f"{tensor_map.swizzle} (got {shared_address:#x})"
        )
    if tensor_map.kind != "im2col":
        _require(not offsets, f"a tiled map takes no im2col offsets (got {offsets})")
        return
    limit = _OFFSET_LIMIT[rank]
    good = len(offsets) in (0, rank - 2) and all(0 <= o < limit for o in offsets)
    _require(good, f"im2col offsets must be {rank - 2} values in 0..{limit - 1} (got {offsets})")


@lru_cache(maxsize=256)
def _box_indices(shape):
    """Index of each element of a box along each dimension: int64 [rank][n], innermost fastest."""
    indices = np.indices(shape[::-1], dtype=np.int64)[::-1].reshape(len(shape), -1)
    indices.setflags(write=False)
    return indices


@lru_cache(maxsize=256)
def _shared_offsets(count, inner, size, span):
    """Shared offset of each element for a base on a pattern boundary.

    Rows of `inner` elements narrower than the swizzle are spread to its span (seen on an H200).
    """
    ordinal = np.arange(count, dtype=np.int64)
    pitch = max(inner * size, span)
    offsets = swizzle(ordinal // inner * pitch + ordinal % inner * size, span)
    offsets.setflags(write=False)
    return offsets


def _tiled_coordinates(tensor_map, coordinates):
    steps = (1, *tensor_map.element_strides[1:])
    indices = _box_indices(box_shape(tensor_map))
    return [c + i * s for c, i, s in zip(coordinates, indices, steps, strict=True)]


def _walk(start, low, end, step, ordinal):
    """Position of the ordinal-th step from `start`, wrapping from `end` to `low`, and the laps."""
    first = max(-(-(end - start) // step), 1)  # positions before the first wrap
    lap = max(-(-(end - low) // step), 1)
    later = ordinal - first
    wrapped = later >= 0
    position = np.where(wrapped, low + later % lap * step, start + ordinal * step)
    return position, np.where(wrapped, later // lap + 1, 0)


def _im2col_coordinates(tensor_map, coordinates, offsets):
    m = tensor_map
    spatial = len(m.dims) - 2
    channel, pixel = _box_indices((m.channels, m.pixels))
    where, carry = [], pixel
    for d in range(spatial):
        end = m.dims[1 + d] + m.upper[d]
        step = m.element_strides[1 + d]
        position, carry = _walk(coordinates[1 + d], m.lower[d], end, step, carry)
        where.append(position + (offsets[d] if offsets else 0))
    return [coordinates[0] + channel, *where, coordinates[-1] + carry]


def transfer(tensor_map, coordinates, shared_address, offsets=(), base=None, store=False):
    """The elements that one tensor copy moves.

    Args: coordinates signed ints, innermost first; shared_address of the box; offsets im2col
    (w, h, ...) u16 values, empty for tiled and for im2col_no_offs; base global address of element
    0, default tensor_map.tensor.data_ptr(); store for copies and reductions to global memory.
    Returns: Transfer.
    Raises: ValueError as `check_transfer`.
    """
    m = tensor_map
    coordinates, offsets = [int(c) for c in coordinates], tuple(int(o) for o in offsets)
    check_transfer(m, coordinates, shared_address, offsets, store)
    if m.kind == "im2col":
        where = _im2col_coordinates(m, coordinates, offsets)
    else:
        where = _tiled_coordinates(m, coordinates)
    size = itemsize(m)
    inside = np.ones(where[0].shape, dtype=bool)
    address = np.full(where[0].shape, m.tensor.data_ptr() if base is None else base, dtype=np.int64)
    for position, extent, stride in zip(where, m.dims, (size, *m.strides), strict=True):
        inside &= (position >= 0) & (position < extent)
        address += position * stride
    inner = box_shape(m)[0]
    shared = _shared_offsets(inside.size, inner, size, m.swizzle) + int(shared_address)
    return Transfer(address, inside, shared, size)


def expand(addresses, size):
    """Byte addresses [n, size] of elements of `size` bytes that start at `addresses` [n]."""
    return np.asarray(addresses)[:, None] + np.arange(size)


def reduce(operation, kind, old, new):
    """cp.reduce.async.bulk: old <op> new on raw bits.

    Args: operation add, min, max, inc, dec, and, or, xor; kind "f16", "bf16", "f32", "f64",
    "u32", "s32", "u64", "s64" or "b32", "b64".
    Returns: raw bits.  Numerics: floating-point add rounds once, to nearest.
    Raises: ValueError for an operation that the kind lacks; inc and dec take u32 alone (into a
    tensor map of int32 they are an illegal instruction on an H200).
    """
    if kind in ("f16", "bf16", "f32", "f64"):
        table = {"add": arith.add, "min": arith.minimum, "max": arith.maximum}
    else:
        table = {
            "add": integer.add,
            "min": integer.minimum,
            "max": integer.maximum,
            "and": integer.and_,
            "or": integer.or_,
            "xor": integer.xor,
        }
    if kind == "u32":
        # inc: old >= new ? 0 : old + 1;   dec: old == 0 or old > new ? new : old - 1
        table["inc"] = lambda k, a, b: np.where(a >= b, a.dtype.type(0), a + a.dtype.type(1))
        table["dec"] = lambda k, a, b: np.where((a == 0) | (a > b), b, a - a.dtype.type(1))
    if operation not in table:
        known = ", ".join(table)
        raise ValueError(
            f"cp.reduce: {operation} is not defined for {kind}; expected one of {known}"
        )
    return table[operation](kind, old, new)
