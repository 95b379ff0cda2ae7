"""A set of threads that execute the same instruction together.

Thread t of a batch of blocks is row position t of every register array.  The order is
[warpgroup of a block][block][thread of the warpgroup] (or warps, when blocks are no multiple of 128
threads), so that one role of a warp-specialised kernel is one contiguous slice over all blocks:
slices read and write registers without copying.
"""

import numpy as np


class Lanes:
    """`sel` indexes register arrays: a slice when the threads are contiguous, else indices."""

    __slots__ = ("_idx", "_warps", "m", "n", "rows", "sel", "stamp")

    def __init__(self, m, sel, n, idx=None):
        self.m, self.rows, self.sel, self.n = m, m.rows, sel, n
        self._idx, self._warps, self.stamp = idx, None, 0

    @classmethod
    def of(cls, m, idx):
        """Lanes of a sorted index array."""
        n = len(idx)
        if n and idx[-1] - idx[0] == n - 1:
            return cls(m, slice(int(idx[0]), int(idx[-1]) + 1), n, idx)
        return cls(m, idx, n, idx)

    @property
    def idx(self):
        if self._idx is None:
            self._idx = np.arange(self.sel.start, self.sel.stop)
        return self._idx

    @property
    def warps(self):
        """Distinct warps (global index t // 32), ascending."""
        if self._warps is None:
            if isinstance(self.sel, slice) and not (self.sel.start | self.sel.stop) & 31:
                self._warps = np.arange(self.sel.start >> 5, self.sel.stop >> 5)
            else:
                w = self.idx >> 5
                self._warps = w[np.concatenate(([True], w[1:] != w[:-1]))] if self.n else w
        return self._warps

    @property
    def whole(self):
        """True when every warp has all its 32 threads here."""
        return self.n == 32 * len(self.warps)

    def take(self, positions):
        """The threads at `positions` of this set."""
        return Lanes.of(self.m, self.idx[positions])

    def where(self, mask):
        """The threads for which `mask` is true."""
        return Lanes.of(self.m, self.idx[mask])

    def thread(self, position):
        """Batch index of the thread at a position."""
        return int(self.idx[position])

    def merge(self, other):
        return Lanes.of(self.m, np.sort(np.concatenate((self.idx, other.idx))))

    def full(self, value, dtype=None):
        """`value` as an array of one element per thread."""
        value = np.asarray(value, dtype=dtype)
        return value if value.shape == (self.n,) else np.broadcast_to(value, (self.n,))

    def by_warp(self, values, fill="first"):
        """values [n] -> [warps][32]; missing lanes repeat the warp's first value."""
        values = self.full(values)
        if self.whole:
            return values.reshape(-1, 32)
        slot = np.searchsorted(self.warps, self.idx >> 5)
        first = np.concatenate(([True], slot[1:] != slot[:-1]))
        out = np.repeat(values[first], 32).reshape(-1, 32)
        out[slot, self.idx & 31] = values
        return out

    def from_warps(self, table):
        """The inverse of by_warp for the threads present."""
        if self.whole:
            return np.ascontiguousarray(table).reshape(-1)
        return table[np.searchsorted(self.warps, self.idx >> 5), self.idx & 31]

    def present(self):
        """Bit mask of the lanes present, one uint32 per warp of `warps`."""
        if self.whole:
            return np.full(len(self.warps), 0xFFFFFFFF, dtype=np.uint32)
        slot = np.searchsorted(self.warps, self.idx >> 5)
        bits = np.bincount(slot, weights=np.exp2(self.idx & 31), minlength=len(self.warps))
        return bits.astype(np.uint64).astype(np.uint32)
