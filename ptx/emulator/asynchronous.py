"""Operations that finish later: cp.async, bulk and tensor copies, wgmma.

An operation waits in a queue until something allows a program to rely on it: a wait of the thread
that issued it, or, for copies that complete on an mbarrier, the moment nothing else can run.  Its
data moves only then, so code that forgot the wait reads the old bytes.  `launch(..., early=True)`
completes copies at issue instead, the other legal extreme.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from mirage_hello.ptx.emulator.mbarriers import Mbarriers


@dataclass
class BulkCopy:
    """A bulk store in a thread's bulk group; `reads_shared` until it completes."""

    thread: int
    pc: int
    time: int
    perform: object


@dataclass
class ThreadCopies:
    """One cp.async instruction: per thread its group and what to move."""

    lanes: object
    group: np.ndarray
    time: np.ndarray  # per thread: the warp's copy counter, for the race detector
    perform: object  # positions -> None
    left: np.ndarray  # bool per position


class AsyncQueue:
    """Everything in flight in a batch of blocks."""

    def __init__(self, machine):
        m = self.m = machine
        self.mbarriers = Mbarriers(machine)
        self.early = machine.launch.early
        self.loads = deque()
        self.bulk_open, self.bulk_groups = {}, {}
        self.bulk_time = np.zeros(m.size // 32, np.int64)
        self.copies, self.copy_time = [], np.zeros(m.size // 32, np.int64)
        self.copies_committed = np.zeros(m.size, np.int64)
        self.wgmma_open, self.wgmma_groups = {}, {}
        self.wgmma_time = np.zeros(m.size // 128 + 1, np.int64)

    # ---- copies that complete on an mbarrier -----------------------------------------------------
    def submit(self, perform):
        if self.early:
            perform()
        else:
            self.loads.append(perform)

    def complete_next(self):
        """Complete the oldest operation in flight; False when there is none."""
        if self.loads:
            self.loads.popleft()()
            return True
        for groups in self.bulk_groups.values():
            if groups:
                for copy in groups.popleft():
                    self._finish_bulk(copy)
                return True
        return False

    # ---- bulk groups -------------------------------------------------------------------------
    def next_bulk_time(self, thread):
        """Clock of the warp's bulk engine at which a copy issued now will be done."""
        self.bulk_time[thread >> 5] += 1
        return int(self.bulk_time[thread >> 5])

    def submit_bulk(self, copy):
        self.bulk_open.setdefault(copy.thread, []).append(copy)

    def commit_bulk(self, lanes):
        for t in lanes.idx:
            t = int(t)
            opened = self.bulk_open.pop(t, None)
            if opened is not None or t in self.bulk_groups:
                self.bulk_groups.setdefault(t, deque()).append(opened or [])

    def wait_bulk(self, lanes, keep):
        """cp.async.bulk.wait_group{.read} keep."""
        if not self.bulk_groups:
            return
        for t in lanes.idx:
            groups = self.bulk_groups.get(int(t), ())
            while len(groups) > keep:
                for copy in groups.popleft():
                    self._finish_bulk(copy)

    def _finish_bulk(self, copy):
        copy.perform()
        shadow = self.m.shadow
        warp = np.array([copy.thread >> 5])
        shadow.learn(warp, shadow.bulk_base + shadow.warp_local[warp], copy.time)

    # ---- cp.async ----------------------------------------------------------------------------
    def submit_copies(self, lanes, perform):
        """Queue one cp.async; returns the clock per thread at which it will be done."""
        self.copy_time[lanes.warps] += 1
        time = self.copy_time[lanes.idx >> 5]
        group = self.copies_committed[lanes.sel].copy()
        self.copies.append(ThreadCopies(lanes, group, time, perform, np.ones(lanes.n, bool)))
        return time

    def commit_copies(self, lanes):
        self.copies_committed[lanes.sel] += 1

    def wait_copies(self, lanes, keep):
        """cp.async.wait_group keep: all but the newest `keep` groups of these threads are done."""
        mine = np.zeros(self.m.size, bool)
        mine[lanes.sel] = True
        limit = self.copies_committed - keep
        self._finish_copies(mine, limit)

    def flush_copies(self, lanes, include_open=True):
        """Everything these threads issued so far (wait_all, or an mbarrier arrive on copies)."""
        mine = np.zeros(self.m.size, bool)
        mine[lanes.sel] = True
        self._finish_copies(mine, self.copies_committed + int(include_open))

    def _finish_copies(self, mine, limit):
        shadow, still = self.m.shadow, []
        for c in self.copies:
            idx = c.lanes.idx
            due = c.left & mine[idx] & (c.group < limit[idx])
            if due.any():
                at = np.flatnonzero(due)
                c.perform(at)
                c.left[at] = False
                warps, first = np.unique(idx[at] >> 5, return_index=True)
                engines = shadow.copy_base + shadow.warp_local[warps]
                shadow.learn(warps, engines, c.time[at][first])
            if c.left.any():
                still.append(c)
        self.copies = still

    # ---- wgmma -------------------------------------------------------------------------------
    def submit_wgmma(self, group, product):
        self.wgmma_open.setdefault(group, []).append(product)

    def commit_wgmma(self, lanes):
        for g in np.unique(lanes.warps >> 2):
            g = int(g)
            self.wgmma_time[g] += 1
            self.wgmma_groups.setdefault(g, deque()).append(self.wgmma_open.pop(g, []))

    def wait_wgmma(self, lanes, keep):
        """wgmma.wait_group keep, for every warpgroup present."""
        shadow = self.m.shadow
        for g in np.unique(lanes.warps >> 2):
            g = int(g)
            groups = self.wgmma_groups.get(g, ())
            while len(groups) > keep:
                products = groups.popleft()
                if products:
                    products[0].run_chain(products)
            done = int(self.wgmma_time[g]) - len(groups)
            warps = np.arange(4 * g, 4 * g + 4)
            shadow.learn(warps, shadow.wgmma_engine(g), done)

    # ---- ends --------------------------------------------------------------------------------
    def on_exit(self, lanes):
        """Bulk copies that still read the block's shared memory when their thread leaves."""
        held = [t for t, groups in self.bulk_groups.items() if any(groups)]
        held += list(self.bulk_open)
        if not held:
            return
        leaving = set(held) & {int(t) for t in lanes.idx}
        for t in sorted(leaving):
            opened = self.bulk_open.get(t)
            copies = opened or next(g for g in self.bulk_groups[t] if g)
            self.m.findings.add(
                "copy-in-flight-at-exit", copies[0].pc, t, None,
                "the thread exits without cp.async.bulk.wait_group: shared memory may be reused "
                "while the copy still reads it",
            )  # fmt: skip

    def finish(self):
        """The batch is over: whatever is in flight lands."""
        while self.complete_next():
            pass
        for copies in list(self.bulk_open.values()):
            for copy in copies:
                copy.perform()
        for c in self.copies:
            c.perform(np.flatnonzero(c.left))
