"""Executes a batch of thread blocks of one kernel.

The unit of execution is a group: all threads, of all warps and blocks of the batch, that stand at
the same program counter.  Each instruction of a group is a handful of NumPy calls whatever the
group's size.  Groups split at divergent branches and meet again at block leaders, because the group
with the lowest program counter runs first; every 256 turns the scheduler serves the others in order
of age for a while, so a spinning group starves nobody.

Waiting threads are parked outside the ready set: at barriers (barriers.py), at mbarriers, for
registers (registers.py), or, for `.aligned` and `.sync` warp instructions, until the rest of their
warp arrives.  When no group is ready, one asynchronous operation completes (asynchronous.py): the
latest moment the hardware is allowed, so a forgotten wait shows.  When none is left either, the
parked threads are a deadlock.
"""

import numpy as np

from mirage_hello.ptx.emulator.asynchronous import AsyncQueue
from mirage_hello.ptx.emulator.barriers import Barriers
from mirage_hello.ptx.emulator.checks import Watch
from mirage_hello.ptx.emulator.dependency import Dependency
from mirage_hello.ptx.emulator.lanes import Lanes
from mirage_hello.ptx.emulator.memory import Buffer
from mirage_hello.ptx.emulator.operands import SHARED_BASE
from mirage_hello.ptx.emulator.races import Shadow
from mirage_hello.ptx.emulator.registers import RegisterPool
from mirage_hello.ptx.emulator.specials import Specials

ROW_DTYPE = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: np.uint64}


class Machine:
    """State of a batch of blocks: registers, shared and local memory, parked threads.

    `block[t]`, `tid[t]`, `warp_in_cluster[t]`, `cluster[t]` describe thread t; `block_ids` are the
    (x, y, z) of the batch's blocks, whole clusters in rank order.
    """

    def __init__(self, launch, block_ids):
        self.launch, self.program = launch, launch.program
        self.findings, self.counts = launch.findings, launch.counts
        self.block_ids = np.asarray(block_ids, dtype=np.int64)
        self.blocks = len(block_ids)
        self.rows = ()
        self._place_threads()
        self.rows = [np.zeros(self.size, ROW_DTYPE[bits]) for _, bits in self.program.rows]
        for array in self.rows:
            if array.dtype == np.uint32:
                array.fill(0x7FBADBAD)  # a NaN pattern: an undefined register does not look like 0
        self._place_memory()
        self.carry = np.zeros(self.size, bool)
        self.ready, self.gathering, self.turn = {}, {}, 0
        self.forced, self.limit = None, launch.max_turns
        self.special = Specials(self).get
        self.watch = Watch(self)
        self.queue = AsyncQueue(self)
        self.shadow = Shadow(self)
        self.dependency = Dependency(self)
        self.barriers = Barriers(self)
        self.registers = RegisterPool(self)

    def _place_threads(self):
        threads = self.launch.threads
        unit = 128 if threads % 128 == 0 else 32
        units = -(-threads // unit)
        self.size = units * self.blocks * unit
        t = np.arange(self.size)
        self.block = t // unit % self.blocks
        self.tid = t // (unit * self.blocks) * unit + t % unit
        self.cluster_size = self.launch.cluster_size
        self.cluster = self.block // self.cluster_size
        self.clusters = self.blocks // self.cluster_size
        self.rank = self.block % self.cluster_size
        self.warps_per_block = -(-threads // 32)
        self.warp_in_cluster = self.rank * self.warps_per_block + self.tid // 32
        self.exists = self.tid < threads
        self.alive = self.exists.copy()
        self.living = np.bincount(self.block[self.exists], minlength=self.blocks)
        bits = np.where(self.exists, np.uint32(1) << (t & 31).astype(np.uint32), np.uint32(0))
        self.alive_mask = np.bitwise_or.reduce(bits.reshape(-1, 32), axis=1)

    def _place_memory(self):
        launch = self.launch
        self.shared_end = self.program.dynamic_base + launch.smem_bytes
        if not launch.smem_bytes:
            self.shared_end = SHARED_BASE + self.program.shared_static
        self.shared_stride = -(-self.shared_end // 1024) * 1024
        data = np.full(self.blocks * self.shared_stride, 0xA5, dtype=np.uint8)
        self.shared = Buffer(data, "shared memory", len(data))
        self.local_stride = -(-self.program.local_bytes // 16) * 16
        local = np.zeros(self.size * self.local_stride, dtype=np.uint8)
        self.local = Buffer(local, "local memory", len(local))

    # ---- the scheduler -----------------------------------------------------------------------
    def run(self):
        """Execute until every thread has exited."""
        self.put(0, Lanes.of(self, np.flatnonzero(self.exists)))
        while True:
            while self.ready:
                if self.turn > self.limit:
                    self._hang()
                    return
                pc = self._choose()
                self._execute(pc, self.ready.pop(pc))
            if self._recheck() or self.queue.complete_next():
                continue
            if self._force_gathered():
                continue
            break
        self.barriers.report_ends()
        self.queue.finish()

    def _choose(self):
        self.turn += 1
        if len(self.ready) == 1:
            return next(iter(self.ready))
        if self.turn % 320 < 256:
            return min(self.ready)
        return min(self.ready, key=lambda pc: self.ready[pc].stamp)

    def put(self, pc, lanes):
        """Make a group ready at `pc`, merged with the group that already stands there."""
        if not lanes.n:
            return
        other = self.ready.get(pc)
        if other is not None:
            stamp = other.stamp
            lanes = other.merge(lanes)
            lanes.stamp = stamp
        else:
            lanes.stamp = self.turn
        self.ready[pc] = lanes

    def _execute(self, pc, lanes):
        """Run a group until it splits, parks, or another group should go first."""
        ops, ready, count = self.program.ops, self.ready, self.counts.issued
        while True:
            op = ops[pc]
            taken, rest = lanes, None
            if op.guard_row >= 0:
                taken, rest = self._guarded(op, lanes)
            count(pc, lanes, taken.n if taken else 0)
            if taken is None:
                pc += 1
            else:
                out = op.run(taken)
                if out is not None:
                    for target, group in out:
                        self.put(target, group)
                    if rest is not None:
                        self.put(pc + 1, rest)
                    return
                pc += 1
            if ready and ops[pc].leader and min(ready) <= pc:
                self.put(pc, lanes)
                return

    def _guarded(self, op, lanes):
        """(threads whose guard is true or None, the others or None)."""
        if op.guard_row in self.program.watched:
            self.watch.read(op.guard_row, lanes, op.pc)
        p = self.rows[op.guard_row][lanes.sel]
        hits = int(np.count_nonzero(p))
        if op.negated:
            hits = lanes.n - hits
        if hits == lanes.n:
            return lanes, None
        if hits == 0:
            return None, lanes
        mask = ~p if op.negated else p
        taken = lanes.where(mask)
        if not op.control:
            return taken, None
        rest = lanes.where(~mask)
        self.counts.split(op.pc, len(taken.warps) + len(rest.warps) - len(lanes.warps))
        return taken, rest

    # ---- convergence -------------------------------------------------------------------------
    def gather(self, op, lanes, masks=None, group=32, strict=False):
        """Hold threads at a warp- or warpgroup-wide instruction until the rest arrives.

        Args: masks: function lanes -> membermask per thread, or None for all living threads of the
        warp; group: 32, or 128 for warpgroup instructions; strict: exited lanes are an error too.
        Returns: the lanes that are complete now, or None.
        """
        if group == 32 and op.pc not in self.gathering and lanes.whole:
            return lanes
        waiting = self.gathering.pop(op.pc, None)
        if waiting is not None:
            lanes = waiting.merge(lanes)
        want = alive = self.alive_mask[lanes.warps]
        if masks is not None:
            want = np.bitwise_or.reduce(lanes.by_warp(masks(lanes)), axis=1) & alive
        complete = (lanes.present() & want) == want
        if group == 128:
            complete = self._warpgroups_complete(lanes, complete)
        if strict and not (alive == 0xFFFFFFFF).all():
            self._divergent(op, lanes, alive == 0xFFFFFFFF, np.full_like(want, 0xFFFFFFFF))
        if complete.all():
            return lanes
        if self.forced == op.pc:
            self.forced = None
            self._divergent(op, lanes, complete, want)
            return lanes
        ok = complete[np.searchsorted(lanes.warps, lanes.idx >> 5)]
        parked = lanes.where(~ok)
        self.counts.parked(op.pc, parked)
        self.gathering[op.pc] = parked
        return lanes.where(ok) if ok.any() else None

    def _warpgroups_complete(self, lanes, complete):
        """A warpgroup is complete when its four warps are here, all complete."""
        if self.launch.threads % 128:
            return np.zeros(len(complete), bool)
        groups = lanes.warps >> 2
        number = np.bincount(groups, weights=complete)
        return number[groups] == 4

    def _divergent(self, op, lanes, complete, want):
        slot = int(np.argmin(complete))
        warp = int(lanes.warps[slot])
        present = int(lanes.present()[slot])
        missing = int(want[slot]) & ~present
        lane = int(present & -present).bit_length() - 1
        absent = ", ".join(str(i) for i in range(32) if missing >> i & 1)[:60]
        text = f"{op.opcode} executed by only part of its warp; lanes {absent} are elsewhere"
        if not missing:
            text = f"{op.opcode} executed by only part of its warpgroup"
        self.findings.add("divergent-aligned", op.pc, warp * 32 + max(lane, 0), None, text)

    def _recheck(self):
        """Threads that exited may have completed a warp or a barrier."""
        moved = self.barriers.recheck()
        for pc, lanes in list(self.gathering.items()):
            del self.gathering[pc]
            self._execute(pc, lanes)
            after = self.gathering.get(pc)
            moved |= after is None or after.n != lanes.n
        return moved or bool(self.ready)

    def _force_gathered(self):
        """Nothing else can happen: threads held for convergence are divergent; let them go."""
        if not self.gathering:
            return False
        pc = min(self.gathering)
        self.forced = pc
        self._execute(pc, self.gathering.pop(pc))
        self.forced = None
        return True

    def exit(self, lanes, pc):
        """Threads end; a block's shared memory ends with its last one."""
        self.alive[lanes.sel] = False
        left = np.bincount(self.block[lanes.sel], minlength=self.blocks)
        self.living -= left
        for block in np.flatnonzero((left > 0) & (self.living == 0)):
            self.shadow.block_ends(int(block), lanes, pc)
        np.bitwise_and.at(
            self.alive_mask, lanes.idx >> 5, ~(np.uint32(1) << (lanes.idx & 31).astype(np.uint32))
        )
        self.queue.on_exit(lanes)
        return []

    def _hang(self):
        """The launch runs and runs: report every group as it stands and give up."""
        for pc, lanes in sorted(self.ready.items()):
            text = f"still running after {self.limit} scheduler turns, here with {lanes.n} threads"
            self.findings.add("deadlock", pc, lanes.thread(0), None, text, lanes.n)
        self.ready.clear()
