"""The address spaces of a launch: who owns an address, is the access legal, and the bytes.

Global pointers are virtual: allocation i begins at (i + 1) << 40, so the same launch gives the same
addresses every time and a wrong index never reaches another tensor.  The bytes are those of the
caller's arrays and tensors (no copy): an allocation is the whole storage behind a view, and the
pointer that the kernel gets is the view's first element, as on the GPU.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np

from mirage_hello.ptx.emulator.operands import (
    SHARED_BASE,
    TAG_LOCAL,
    TAG_PARAM,
    TAG_SHARED,
    TAG_SHIFT,
    TAG_VARIABLE,
)

OFFSET_MASK = (1 << TAG_SHIFT) - 1
SPACES = ("global", "shared", "local", "param", "const")


@dataclass
class Buffer:
    """Bytes with cached views by access width."""

    data: np.ndarray
    label: str
    nbytes: int
    owner: object = None
    views: dict = field(default_factory=dict)

    def view(self, total):
        """The buffer as rows of `total` bytes: 1-D for 1, 2, 4, 8; [n, total // 8] of u64 above."""
        if total not in self.views:
            whole = self.data[: len(self.data) // total * total]
            if total <= 8:
                self.views[total] = whole.view(f"<u{total}")
            else:
                self.views[total] = whole.view("<u8").reshape(-1, total // 8)
        return self.views[total]

    def gather(self, offsets, size, count):
        """Unsigned [n][count] of `size`-byte elements at byte `offsets`, multiples of the total."""
        total = size * count
        rows = self.view(total)[offsets // total]
        return rows.view(f"<u{size}").reshape(len(offsets), count)

    def scatter(self, offsets, values):
        """Store unsigned [n][count]; with equal offsets the last thread wins."""
        total = values.dtype.itemsize * values.shape[1]
        rows = np.ascontiguousarray(values)
        rows = rows.view(f"<u{total}")[:, 0] if total <= 8 else rows.view("<u8")
        self.view(total)[offsets // total] = rows


def _storage(value):
    """(address of the whole storage, its bytes, address of the first element) of an argument."""
    if hasattr(value, "untyped_storage"):
        if value.device.type != "cpu":
            raise TypeError(
                f"launch: the emulator takes CPU tensors (got one on {value.device}); "
                "move it with .cpu()"
            )
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.nbytes(), value.data_ptr()
    base = value
    while isinstance(base.base, np.ndarray):
        base = base.base
    low, high = np.lib.array_utils.byte_bounds(base)
    return low, high - low if base.size else 0, value.__array_interface__["data"][0]


class GlobalMemory:
    """Allocations of one launch, by tag (address >> 40)."""

    def __init__(self):
        self.buffers, self._known = {}, {}

    def add(self, value, label):
        """Register a tensor (once per storage); returns the pointer to its first element."""
        start, nbytes, first = _storage(value)
        if (start, nbytes) not in self._known:
            tag = len(self.buffers) + 1
            data = np.zeros(0, np.uint8)
            if nbytes:
                data = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(start))
            self.buffers[tag] = Buffer(data, label, nbytes, owner=value)
            self._known[start, nbytes] = tag
        return (self._known[start, nbytes] << TAG_SHIFT) + (first - start if nbytes else 0)

    def add_variable(self, tag, data, label):
        self.buffers[tag] = Buffer(data, label, len(data))


def buffer_of(machine, tag):
    if tag == TAG_PARAM:
        return machine.launch.param_buffer
    return machine.launch.memory.buffers.get(tag)


class Segment:
    """The part of an access that goes to one buffer: which threads, at which byte offsets."""

    __slots__ = ("buffer", "offsets", "positions", "space")

    def __init__(self, space, buffer, offsets, positions):
        self.space, self.buffer, self.offsets, self.positions = space, buffer, offsets, positions


def resolve(lanes, space, addresses, total, pc, write=False):
    """Check an access of `total` bytes per thread and split it by buffer.

    Args: addresses int64 [n]; space "global", "shared", "shared::cluster", "local", "param",
    "const" or "" (generic).
    Returns: list of Segment; illegal threads are reported and left out.
    """
    segments = _split(lanes, space, addresses, total, pc)
    if write:
        lanes.m.dependency.write(lanes, segments, pc)
    return segments


def _split(lanes, space, addresses, total, pc):
    if space.startswith("shared"):
        return _shared(lanes, addresses, total, pc, None)
    if space == "local":
        return _local(lanes, addresses, total, pc, None)
    if space == "param":
        addresses = addresses & OFFSET_MASK
        buffer = lanes.m.launch.param_buffer
        return _bounded(lanes, "param", buffer, addresses, addresses, total, pc, None)
    tags = addresses >> TAG_SHIFT
    first = int(tags[0])
    if len(tags) == 1 or (tags == first).all():
        return _tagged(lanes, space, first, addresses, total, pc, None)
    segments = []
    for tag in np.unique(tags):
        positions = np.flatnonzero(tags == tag)
        segments += _tagged(lanes, space, int(tag), addresses[positions], total, pc, positions)
    return segments


def _tagged(lanes, space, tag, addresses, total, pc, positions):
    if space == "" and tag == TAG_SHARED:
        return _shared(lanes, addresses & OFFSET_MASK, total, pc, positions)
    if space == "" and tag == TAG_LOCAL:
        return _local(lanes, addresses & OFFSET_MASK, total, pc, positions)
    buffer = buffer_of(lanes.m, tag)
    if buffer is None or (space == "global" and tag >= TAG_SHARED):
        at = 0 if positions is None else int(positions[0])
        what = f"{_window(tag)} is not a .global address" if tag else "is no allocation"
        lanes.m.findings.add(
            "out-of-bounds", pc, lanes.thread(at), int(addresses[0]), f"{total}-byte access: {what}"
        )
        return []
    name = "const" if tag >= TAG_VARIABLE and space == "const" else "global"
    offsets = addresses & OFFSET_MASK
    return _bounded(lanes, name, buffer, offsets, addresses, total, pc, positions)


def _window(tag):
    names = {TAG_SHARED: "a shared-window", TAG_LOCAL: "a local-window", TAG_PARAM: "a parameter"}
    return f"{names.get(tag, 'an')} address"


def _bounded(lanes, space, buffer, offsets, addresses, total, pc, positions):
    """Drop threads outside the buffer or misaligned, with a finding for the first of each."""
    limit = buffer.nbytes - total
    low = offsets & (total - 1)
    if int(offsets.max()) <= limit and not low.any():
        return [Segment(space, buffer, offsets, positions)]
    outside, crooked = offsets > limit, low != 0
    if outside.any():
        at = int(np.argmax(outside))
        lanes.m.findings.add(
            "out-of-bounds", pc, lanes.thread(at if positions is None else int(positions[at])),
            int(addresses[at]),
            f"{total}-byte access to {space} memory at byte {int(offsets[at])} of {buffer.label}, "
            f"which has {buffer.nbytes} bytes", int(outside.sum()),
        )  # fmt: skip
    crooked &= ~outside
    if crooked.any():
        _misaligned(lanes, space, crooked, addresses, total, pc, positions)
    keep = np.flatnonzero(~(outside | crooked))
    if not len(keep):
        return []
    positions = keep if positions is None else positions[keep]
    if len(offsets) == 1 and lanes.n > 1:
        positions = None
    return [Segment(space, buffer, offsets[keep], positions)]


def _misaligned(lanes, space, crooked, addresses, total, pc, positions):
    at = int(np.argmax(crooked))
    lanes.m.findings.add(
        "misaligned", pc, lanes.thread(at if positions is None else int(positions[at])),
        int(addresses[at]),
        f"{total}-byte access to {space} memory at {int(addresses[at]):#x}, no multiple of {total}",
        int(crooked.sum()),
    )  # fmt: skip


def shared_offsets(lanes, addresses):
    """(flat byte offset in the batch's shared memory, block-relative offset, rank is known).

    An address above 2**24 came from mapa: block rank + 1 of the cluster in bits 24 and up.
    """
    m = lanes.m
    rank = addresses >> 24
    if not rank.any():
        return m.block[lanes.sel].astype(np.int64) * m.shared_stride + addresses, addresses, None
    block = m.block[lanes.sel]
    mapped = block - block % m.cluster_size + (rank - 1)
    known = rank <= m.cluster_size
    block = np.where(rank > 0, mapped, block)
    inside = addresses & 0xFFFFFF
    return np.where(known, block, 0) * m.shared_stride + inside, inside, known


def _shared(lanes, addresses, total, pc, positions):
    m = lanes.m
    sub = lanes if positions is None else lanes.take(positions)
    if len(addresses) == 1 and sub.n > 1:
        addresses = np.broadcast_to(addresses, (sub.n,))
    flat, inside, known = shared_offsets(sub, addresses)
    end = m.shared_end - total
    low = addresses & (total - 1)
    if known is None and inside.min() >= SHARED_BASE and inside.max() <= end and not low.any():
        return [Segment("shared", m.shared, flat, positions)]
    outside = (inside < SHARED_BASE) | (inside > end)
    if known is not None:
        outside |= ~known
    if outside.any():
        at = int(np.argmax(outside))
        m.findings.add(
            "out-of-bounds", pc, sub.thread(at), int(addresses[at]),
            f"{total}-byte access to shared memory at byte {int(inside[at]) - SHARED_BASE} of a "
            f"block that has {m.shared_end - SHARED_BASE} bytes", int(outside.sum()),
        )  # fmt: skip
    crooked = (low != 0) & ~outside
    if crooked.any():
        _misaligned(sub, "shared", crooked, addresses, total, pc, None)
    keep = np.flatnonzero(~(outside | crooked))
    if not len(keep):
        return []
    return [Segment("shared", m.shared, flat[keep], keep if positions is None else positions[keep])]


def _local(lanes, addresses, total, pc, positions):
    m = lanes.m
    sub = lanes if positions is None else lanes.take(positions)
    addresses = np.broadcast_to(addresses, (sub.n,)) if len(addresses) == 1 else addresses
    frame = Buffer(m.local.data, "the thread's local memory", m.program.local_bytes)
    found = _bounded(sub, "local", frame, addresses, addresses, total, pc, None)
    out = []
    for s in found:
        threads = sub.idx if s.positions is None else sub.idx[s.positions]
        places = (
            s.positions
            if positions is None
            else positions[s.positions if s.positions is not None else slice(None)]
        )
        out.append(Segment("local", m.local, threads * m.local_stride + s.offsets, places))
    return out


def load(lanes, space, addresses, size, count, pc):
    """Unsigned [n][count] of `size`-byte elements (zero where the access was illegal), segments."""
    segments = resolve(lanes, space, addresses, size * count, pc)
    if len(segments) == 1 and segments[0].positions is None:
        s = segments[0]
        return s.buffer.gather(s.offsets, size, count), segments
    out = np.zeros((lanes.n, count), dtype=f"<u{size}")
    for s in segments:
        out[slice(None) if s.positions is None else s.positions] = s.buffer.gather(
            s.offsets, size, count
        )
    return out, segments


def store(lanes, space, addresses, values, pc):
    """Store unsigned values [n][count]; returns the segments."""
    total = values.dtype.itemsize * values.shape[1]
    segments = resolve(lanes, space, addresses, total, pc, write=True)
    for s in segments:
        s.buffer.scatter(s.offsets, values if s.positions is None else values[s.positions])
    return segments
