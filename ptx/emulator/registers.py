"""Registers of a block, which setmaxnreg moves between its warps."""

import math

import numpy as np

MULTIPROCESSOR = 65536  # 32-bit registers
MOST = 248  # ptxas gives a thread at most 255, and setmaxnreg counts in steps of 8


def at_entry(directives, threads):
    """Registers a thread at launch = floor8(65536 / (blocks * threads)), at most `.maxnreg`.

    Args: directives: of the kernel, name -> ints; threads: of a block, as launched.
    Returns: the number, a multiple of 8, or None where ptxas ignores setmaxnreg (its C7508):
        without `.maxnreg` it needs `.minnctapersm` with `.reqntid` or `.maxntid`.
    Source: PTX ISA, setmaxnreg; the numbers are those that `ptxas -v` prints.
    """
    most = directives.get(".maxnreg", (MOST,))[0]
    blocks = directives.get(".minnctapersm")
    shape = directives.get(".reqntid") or directives.get(".maxntid")
    if blocks and shape:
        threads = math.prod(shape)
    elif ".maxnreg" not in directives:
        return None
    warps = -(-threads // 32) * (blocks or (1,))[0]
    return min(MOST, most, MULTIPROCESSOR // (32 * warps)) // 8 * 8


class RegisterPool:
    """What each warp of a batch of blocks holds, and who waits for more.

    A block owns what it was launched with: .dec gives to its pool, .inc waits until the pool has
    enough for the warpgroup.  Nothing else returns registers: no rule of the PTX ISA makes those of
    an ended warp available to the others of its block.
    """

    def __init__(self, machine):
        self.m = machine
        directives = machine.program.function.directives
        self.entry = at_entry(directives, machine.launch.threads)
        self.unit = 32 if machine.launch.threads % 128 else 128  # threads: lanes.py has the order
        self.held = np.full(machine.size // 32, self.entry or 0)  # registers a thread, by warp
        self.free = np.zeros(machine.blocks, np.int64)  # the same, summed over warps
        self.waiting = []  # (program counter, lanes of one warpgroup, registers a thread wanted)

    def decrease(self, lanes, value):
        """setmaxnreg.dec: the registers above `value` go to the pool, and wake who waits."""
        warps = lanes.warps
        given = np.maximum(self.held[warps] - value, 0)
        self.held[warps] -= given
        np.add.at(self.free, self.m.block[warps * 32], given)
        waiting, self.waiting = self.waiting, []
        for pc, part, wanted in waiting:
            self._take(pc, part, wanted)

    def increase(self, lanes, value, pc):
        """setmaxnreg.inc: warpgroups that have `value` now are put at pc + 1; the others park."""
        groups = lanes.idx // self.unit
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        for at, end in zip(starts, np.append(starts[1:], lanes.n), strict=True):
            self._take(pc, lanes.take(slice(at, end)), value)

    def _take(self, pc, lanes, wanted):
        """One warpgroup goes on with what it wants, if its block has that, or parks."""
        block = self.m.block[lanes.idx[0]]
        more = np.maximum(wanted - self.held[lanes.warps], 0)
        if more.sum() > self.free[block]:
            self.waiting.append((pc, lanes, wanted))
            return
        self.held[lanes.warps] += more
        self.free[block] -= more.sum()
        self.m.put(pc + 1, lanes)

    def waits(self):
        """(program counter, lanes, reason) of every instruction at which a block still waits."""
        groups = {}
        for pc, lanes, _ in self.waiting:
            key = pc, int(self.m.block[lanes.idx[0]])
            groups[key] = groups[key].merge(lanes) if key in groups else lanes
        return [(pc, lanes, self._why(block)) for (pc, block), lanes in groups.items()]

    def _why(self, block):
        wanted = self.held.copy()
        for _, lanes, value in self.waiting:
            wanted[lanes.warps] = value
        warps = np.flatnonzero((self.m.block[::32] == block) & self.m.exists[::32])
        asked = 32 * int(wanted[warps].sum())
        return (
            f"the warpgroups want {self._each(wanted, warps)} registers a thread, {asked} in all, "
            f"and the block owns {32 * len(warps) * self.entry} ({self.entry} a thread at entry); "
            f"they hold {self._each(self.held, warps)}"
        )

    def _each(self, numbers, warps):
        """'40, 240, 104-168': of each warpgroup, least and most where its warps differ."""
        group = self.m.tid[warps * 32] // 128
        listed = []
        for g in np.unique(group):
            low, high = (int(f(numbers[warps[group == g]])) for f in (np.min, np.max))
            listed.append(f"{low}-{high}" if low != high else str(low))
        return ", ".join(listed)
