"""Barriers of a block (bar, barrier: 16 numbered ones) and of a cluster (barrier.cluster)."""

import numpy as np


class _Numbered:
    """One barrier number in all blocks: who has come, how many are due, who waits."""

    def __init__(self, blocks, warps):
        self.arrived = np.zeros(warps, np.int64)  # threads, by warp
        self.came_by = np.full(warps, -1, np.int64)  # program counter, by warp
        self.due = np.zeros(blocks, np.int64)
        self.all_threads = np.ones(blocks, bool)
        self.clock = [None] * blocks
        self.votes = np.zeros((blocks, 2), np.int64)  # predicates true, threads that voted
        self.waiting = []  # (program counter, lanes, deliver)
        self.last = {}  # block -> (program counter, thread) of its last arrival


class Barriers:
    """All barriers of a batch of blocks."""

    def __init__(self, machine):
        self.m = machine
        self.numbered = {}
        clusters = machine.clusters
        self.cluster_arrived = np.zeros(clusters, np.int64)
        self.cluster_phase = np.zeros(clusters, np.int64)
        self.cluster_clock = [None] * clusters
        self.cluster_done = [None] * clusters
        self.thread_phase = np.full(machine.size, -1, np.int64)
        self.cluster_waiting = []
        self.mbarriers = None

    # ---- numbered barriers -------------------------------------------------------------------
    def arrive(self, pc, lanes, number, due, waits, vote=None, deliver=None):
        """Threads come to barrier `number`; those of completed blocks go on.

        Args: due: threads per block (array per lane) or None for all living ones; waits: False for
        barrier.arrive; vote: bool per lane for bar.red; deliver(lanes, true_votes, votes).
        """
        state = self.numbered.setdefault(number, _Numbered(self.m.blocks, self.m.size // 32))
        block = self.m.block[lanes.sel]
        if due is not None:
            self._refuse_split(state, pc, lanes)
        state.arrived += np.bincount(lanes.idx >> 5, minlength=len(state.arrived))
        here, first = np.unique(block, return_index=True)
        for key, at in zip(here, first, strict=True):
            state.last[int(key)] = pc, lanes.thread(int(at))
        state.all_threads[here] = due is None
        if due is not None:
            state.due[block] = due
        if vote is not None:
            state.votes[:, 0] += np.bincount(block, weights=vote, minlength=self.m.blocks).astype(
                int
            )
            state.votes[:, 1] += np.bincount(block, minlength=self.m.blocks)
        self._collect(state.clock, lanes, block_of_warp=True)
        if waits:
            state.waiting.append((pc, lanes, deliver))
        self.m.shadow.tick(lanes.warps)
        self._release(state, here)
        return [] if waits else [(pc + 1, lanes)]

    def _refuse_split(self, state, pc, lanes):
        """A counted barrier takes its arrivals a warp at a time (PTX ISA, bar), so parts of a warp
        that come by different instructions never add up; on an H200 such a block hangs."""
        warps = lanes.idx >> 5
        split = (state.arrived[warps] > 0) & (state.came_by[warps] != pc)
        state.came_by[warps] = pc
        if split.any():
            self.m.findings.add(
                "barrier-unbalanced", pc, lanes.thread(int(np.argmax(split))), None,
                "the rest of this warp came to the barrier by another instruction, and arrivals "
                "are counted a warp at a time",
                int(split.sum()),
            )  # fmt: skip

    def _collect(self, clocks, lanes, block_of_warp):
        """Join the arriving warps' clocks into the barrier's."""
        shadow, m = self.m.shadow, self.m
        if not shadow.on:
            return
        warps = lanes.warps
        rows = shadow.snapshot(warps)
        where = m.block[warps * 32] if block_of_warp else m.cluster[warps * 32]
        for key in np.unique(where):
            joined = rows[where == key].max(axis=0)
            old = clocks[key]
            if old is not None:
                joined[: len(old)] = np.maximum(joined[: len(old)], old)
            clocks[key] = joined

    def _due(self, state, blocks):
        living = np.bincount(self.m.block[self.m.alive], minlength=self.m.blocks)
        return np.where(state.all_threads[blocks], living[blocks], state.due[blocks])

    def _arrived(self, state):
        """Arrivals per block. A warp whose last living thread has come counts 32 (PTX ISA, bar:
        "the arrival count is incremented by the warp size"), unless all living threads are due.
        """
        m, by_warp = self.m, state.arrived
        living = m.alive.reshape(-1, 32).sum(axis=1)
        block = m.block[::32]
        whole = (by_warp >= living) & (by_warp > 0) & (by_warp < 32) & ~state.all_threads[block]
        weights = np.where(whole, 32, by_warp)
        return np.bincount(block, weights=weights, minlength=m.blocks).astype(np.int64)

    def _release(self, state, blocks):
        due = self._due(state, blocks)
        arrived = self._arrived(state)[blocks]
        done = blocks[(arrived >= due) & (arrived > 0)]
        if not len(done):
            return False
        complete = np.zeros(self.m.blocks, bool)
        complete[done] = True
        still = []
        for pc, lanes, deliver in state.waiting:
            mask = complete[self.m.block[lanes.sel]]
            if mask.all():
                free = lanes
            else:
                still.append((pc, lanes.where(~mask), deliver))
                free = lanes.where(mask)
            if free.n:
                self._learn(free, state.clock, True)
                if deliver:
                    deliver(free, *state.votes[self.m.block[free.sel]].T)
                self.m.put(pc + 1, free)
        state.waiting = [w for w in still if w[1].n]
        state.arrived[complete[self.m.block[::32]]] = 0
        state.votes[done] = 0
        for block in done:
            state.clock[block] = None
        return True

    def _learn(self, lanes, clocks, block_of_warp):
        shadow = self.m.shadow
        if not shadow.on:
            return
        warps = lanes.warps
        where = (self.m.block if block_of_warp else self.m.cluster)[warps * 32]
        shadow.acquire(warps, _stack([clocks[k] for k in where]))

    # ---- cluster barrier ---------------------------------------------------------------------
    def cluster_arrive(self, lanes):
        cluster = self.m.cluster[lanes.sel]
        self.thread_phase[lanes.sel] = self.cluster_phase[cluster]
        self.cluster_arrived += np.bincount(cluster, minlength=self.m.clusters)
        self._collect(self.cluster_clock, lanes, block_of_warp=False)
        self.m.shadow.tick(lanes.warps)
        self._release_clusters(np.unique(cluster))

    def _release_clusters(self, clusters):
        living = np.bincount(self.m.cluster[self.m.alive], minlength=self.m.clusters)
        arrived = self.cluster_arrived[clusters]
        done = clusters[(arrived >= living[clusters]) & (arrived > 0)]
        if not len(done):
            return False
        self.cluster_phase[done] += 1
        self.cluster_arrived[done] = 0
        for c in done:
            self.cluster_done[c], self.cluster_clock[c] = self.cluster_clock[c], None
        waiting, self.cluster_waiting = self.cluster_waiting, []
        for pc, lanes in waiting:
            self.m.put(pc, lanes)
        return True

    def cluster_wait(self, pc, lanes):
        """Threads whose phase is complete go on, the others park."""
        without = self.thread_phase[lanes.sel] < 0
        if without.any():
            at = int(np.argmax(without))
            self.m.findings.add(
                "barrier-unbalanced", pc, lanes.thread(at), None,
                "barrier.cluster.wait without a barrier.cluster.arrive before it",
                int(without.sum()),
            )  # fmt: skip
        passed = self.thread_phase[lanes.sel] < self.cluster_phase[self.m.cluster[lanes.sel]]
        free, held = (lanes, None) if passed.all() else (lanes.where(passed), lanes.where(~passed))
        if held is not None and held.n:
            self.m.counts.parked(pc, held)
            self.cluster_waiting.append((pc, held))
        if not free.n:
            return []
        self._learn(free, self.cluster_done, False)
        self.thread_phase[free.sel] = -1
        return [(pc + 1, free)]

    # ---- ends --------------------------------------------------------------------------------
    def recheck(self):
        """After exits fewer threads are due: release what is complete now."""
        moved = False
        for state in self.numbered.values():
            if state.waiting:
                moved |= self._release(state, np.arange(self.m.blocks))
        if self.cluster_waiting:
            moved |= self._release_clusters(np.arange(self.m.clusters))
        return moved

    def report_ends(self):
        """Whoever still waits now waits for ever; arrivals that nobody waited for are left over."""
        waits = self.m.registers.waits()  # first: others may wait for these threads
        for number, state in sorted(self.numbered.items()):
            for pc, lanes, _ in state.waiting:
                block = int(self.m.block[lanes.idx[0]])
                due = int(self._due(state, np.array([block]))[0])
                arrived = int(self._arrived(state)[block])
                why = f"barrier {number} has {arrived} of {due} arrivals"
                waits.append((pc, lanes, why))
        for pc, lanes in self.cluster_waiting:
            c = int(self.m.cluster[lanes.idx[0]])
            waits.append(
                (pc, lanes, f"cluster barrier has {int(self.cluster_arrived[c])} arrivals")
            )
        waits += self.m.queue.mbarriers.waits()
        for pc, lanes, why in waits:
            self.m.findings.add(
                "deadlock",
                pc,
                lanes.thread(0),
                None,
                f"{why}; {_who(self.m, lanes)} wait here",
                lanes.n,
            )

        self._report_leftovers()

    def _report_leftovers(self):
        """Arrivals that nobody waited for when their block ended."""
        for number, state in self.numbered.items():
            arrived = self._arrived(state)
            for block in np.flatnonzero(arrived) if not state.waiting else ():
                pc, thread = state.last[int(block)]
                self.m.findings.add(
                    "barrier-unbalanced", pc, thread, None,
                    f"barrier {number} has {int(arrived[block])} arrivals that nobody waits for "
                    "when the block ends",
                )  # fmt: skip


def _who(m, lanes):
    """'threads 0-31, 64-95 of block 0' for a message."""
    first = int(m.block[lanes.idx[0]])
    tids = np.sort(m.tid[lanes.idx[m.block[lanes.sel] == first]])
    edges = np.flatnonzero(np.diff(tids) != 1)
    starts, ends = tids[np.r_[0, edges + 1]], tids[np.r_[edges, len(tids) - 1]]
    runs = [f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True)]
    listed = ", ".join(runs[:6]) + (", ..." if len(runs) > 6 else "")
    x, y, z = (int(v) for v in m.block_ids[first])
    return f"threads {listed} of block ({x}, {y}, {z})"


def _stack(rows):
    rows = [r if r is not None else np.zeros(1, np.int32) for r in rows]
    width = max(len(r) for r in rows)
    out = np.zeros((len(rows), width), np.int32)
    for i, r in enumerate(rows):
        out[i, : len(r)] = r
    return out
