"""Shared-memory races: two accesses, one a write, with nothing that orders them.

Each word of shared memory remembers its last writer (agent, time, thread, instruction) and the last
read of each agent.  An access is a race when the other access's time is later than what the
accessing warp knows (clocks.py).  Atomics, volatile and acquire/release accesses do not race with
each other; they carry clocks from writer to reader as barriers do.

The same clocks decide whether generic-proxy writes were fenced before the async proxy reads them.
"""

import numpy as np

from mirage_hello.ptx.emulator.lifetimes import Lifetimes
from mirage_hello.ptx.emulator.operands import SHARED_BASE

AGENT, CLOCK, THREAD, TIME, PC = range(5)


class Shadow(Lifetimes):
    """Race detector of a batch; `on` is False when checks are off and the methods do nothing."""

    def __init__(self, machine):
        super().__init__(machine)
        self.on = machine.launch.checks and machine.shared_end > SHARED_BASE
        if self.on:
            self._allocate()

    def _allocate(self):
        self.granule = _granule(self.m.program)
        words = len(self.m.shared.data) // self.granule
        self.record = np.zeros((words, 5), np.int32)
        self.warp_reads = np.zeros((self.warps, words), np.int32)
        self.engine_reads = {}
        self._any_reads = False
        self.sync = np.array([_is_synchronising(op) for op in self.m.program.ops])
        self.published = {}

    # ---- ordinary accesses -------------------------------------------------------------------
    def _rows(self, offsets, total):
        """(view of the records as [rows][words][5], row numbers) for aligned accesses."""
        words = max(1, total // self.granule)
        return words, offsets // max(total, self.granule)

    def read(self, lanes, segments, total, pc):
        """Ordinary reads of `total` bytes per thread."""
        if not self.on:
            return
        for s in segments:
            if s.space == "shared":
                sub = lanes if s.positions is None else lanes.take(s.positions)
                self._read(sub, s.offsets, total, pc)
                self.touch(sub, s.offsets, pc)

    def write(self, lanes, segments, total, pc, values=None):
        """Ordinary writes; `values` [n][count] decide whether equal addresses conflict."""
        if not self.on:
            return
        for s in segments:
            if s.space == "shared":
                sub = lanes if s.positions is None else lanes.take(s.positions)
                mine = values if values is None or s.positions is None else values[s.positions]
                self._write(sub, s, total, pc, mine)
                self.touch(sub, s.offsets, pc)

    def _read(self, lanes, offsets, total, pc):
        words, row = self._rows(offsets, total)
        last = self.record.reshape(-1, words, 5)[row]
        warp, cluster = self.m.warp_in_cluster[lanes.sel], self.m.cluster[lanes.sel]
        when = last[:, :, CLOCK]
        if not when.all():
            self._uninitialised(lanes, when, offsets, pc)
        if self.sync[pc]:
            self._meet(lanes, row, publish=False)
        self._against_writer(lanes, last, cluster, warp, offsets, pc, "read")
        if self.sync[pc]:
            return
        own = self.clocks[cluster, warp, warp]
        self.warp_reads.reshape(self.warps, -1, words)[warp, row] = own[:, None]
        self._any_reads = True

    def _write(self, lanes, segment, total, pc, values):
        offsets = segment.offsets
        words, row = self._rows(offsets, total)
        records = self.record.reshape(-1, words, 5)
        warp, cluster = self.m.warp_in_cluster[lanes.sel], self.m.cluster[lanes.sel]
        last = records[row]
        if self.sync[pc]:
            if self.m.program.ops[pc].base in ("atom", "red") and not last[:, :, CLOCK].all():
                self._uninitialised(lanes, last[:, :, CLOCK], offsets, pc)
            self._meet(lanes, row, publish=True)
        self._against_writer(lanes, last, cluster, warp, offsets, pc, "written")
        self._against_readers(lanes, row, words, cluster, warp, offsets, pc)
        self.now += 1
        fresh = np.empty((lanes.n, 5), np.int32)
        fresh[:, AGENT], fresh[:, CLOCK] = warp, self.clocks[cluster, warp, warp]
        fresh[:, THREAD], fresh[:, TIME], fresh[:, PC] = lanes.idx, self.now, pc
        records[row] = fresh[:, None, :]
        loser = records[row][:, 0, THREAD] != fresh[:, THREAD]
        if loser.any() and values is not None:
            stored = segment.buffer.gather(offsets, values.dtype.itemsize, values.shape[1])
            loser &= (stored != values).any(axis=1)
            if loser.any():
                at = int(np.argmax(loser))
                self._report(
                    "shared-race", lanes.thread(at), offsets[at], pc, int(loser.sum()),
                    "two threads store different values to one address in the same instruction",
                )  # fmt: skip

    def _meet(self, lanes, row, publish):
        """A synchronising access: learn what earlier ones on the same words published, and, if it
        writes, publish what its warps know."""
        for key in np.unique(row):
            warps = np.unique(lanes.idx[row == key] >> 5)
            known = self.published.get(int(key))
            if known is not None:
                self.acquire(warps, known)
            if publish:
                mine = self.snapshot(warps).max(axis=0)
                if known is not None:
                    mine[: len(known)] = np.maximum(mine[: len(known)], known)
                self.published[int(key)] = mine
        if publish:
            self.tick(lanes.warps)

    def _against_writer(self, lanes, last, cluster, warp, offsets, pc, verb):
        agent, when = last[:, :, AGENT], last[:, :, CLOCK]
        known = self.clocks[cluster[:, None], warp[:, None], agent]
        plain = ~self.sync[last[:, :, PC]] if self.sync[pc] else True
        bad = (when > known) & plain
        if bad.any():
            at, word = np.unravel_index(int(np.argmax(bad)), bad.shape)
            self._conflict(lanes.thread(int(at)), offsets[at], last[at, word], pc, verb, bad)
        # The same warp, since its last synchronisation, but another thread of it.
        near = (agent == warp[:, None]) & (when == known) & (when > 0) & plain
        fresh = when > self.copies_shared[cluster, warp][:, None]
        near |= (agent == warp[:, None] + self.copy_base) & fresh & ~bad
        if near.any():
            near &= last[:, :, THREAD] != lanes.idx[:, None]
            if near.any():
                at, word = np.unravel_index(int(np.argmax(near)), near.shape)
                self._conflict(lanes.thread(int(at)), offsets[at], last[at, word], pc, verb, near)

    def _against_readers(self, lanes, row, words, cluster, warp, offsets, pc):
        if self._any_reads:
            seen = self.warp_reads.reshape(self.warps, -1, words)[:, row]
            bad = seen > self.clocks[cluster, warp][:, : self.warps].T[:, :, None]
            if bad.any():
                reader, at, _ = np.unravel_index(int(np.argmax(bad)), bad.shape)
                count = int(bad.any((0, 2)).sum())
                self._report(
                    "shared-race", lanes.thread(int(at)), offsets[at], pc, count,
                    f"written while warp {self.warp_name(reader)} may still read it",
                )  # fmt: skip
        for agent, plane in self.engine_reads.items():
            bad = plane.reshape(-1, words)[row] > self.clocks[cluster, warp, agent][:, None]
            if bad.any():
                at = int(np.argmax(bad.any(axis=1)))
                self._report(
                    "async-race", lanes.thread(at), offsets[at], pc, int(bad.any(axis=1).sum()),
                    f"written while {self.agent_name(agent)} may still read it",
                )  # fmt: skip

    # ---- asynchronous accesses ---------------------------------------------------------------
    def words_of(self, offsets, nbytes):
        """Distinct words under the byte ranges [offset, offset + nbytes)."""
        first = np.asarray(offsets, dtype=np.int64) // self.granule
        span = np.arange(max(1, nbytes // self.granule))
        seen = np.zeros(int(first.max()) - int(first.min()) + len(span), bool)
        seen[(first - first.min())[:, None] + span] = True
        return np.flatnonzero(seen) + int(first.min())

    def copied_by(self, threads, offsets, nbytes):
        """The thread behind each word of a cp.async: only it may read before the warp syncs."""
        words = offsets[:, None] // self.granule + np.arange(nbytes // self.granule)
        self.record[words, THREAD] = threads[:, None]

    def written(self, words):
        """Which words anybody has written."""
        return self.record[words, CLOCK] > 0

    def async_write(self, thread, words, agent, clock, pc):
        """An asynchronous write by `agent`, done at its time `clock`, is issued by `thread`."""
        if not self.on:
            return
        cluster, warp = int(self.m.cluster[thread]), int(self.m.warp_in_cluster[thread])
        known = self.clocks[cluster, warp]
        last = self.record[words]
        late = last[:, CLOCK] > known[last[:, AGENT]]
        if late.any():
            at = int(np.argmax(late))
            self._conflict(thread, words[at] * self.granule, last[at], pc, "overwritten", late)
        self._async_against_readers(thread, words, cluster, known, pc)
        self.now += 1
        self.record[words] = (agent, clock, thread, self.now, pc)
        if agent >= self.barrier_base and len(words):
            self.use(int(words[0]) * self.granule // self.m.shared_stride, agent, clock, pc)

    def _async_against_readers(self, thread, words, cluster, known, pc):
        if self._any_reads:
            bad = self.warp_reads[:, words] > known[: self.warps, None]
            if bad.any():
                reader, at = np.unravel_index(int(np.argmax(bad)), bad.shape)
                self._report(
                    "async-race", thread, words[at] * self.granule, pc, int(bad.any(0).sum()),
                    "overwritten by an asynchronous copy while warp "
                    f"{self.warp_name(reader)} may still read it",
                )  # fmt: skip
        for agent, plane in self.engine_reads.items():
            bad = plane[words] > known[agent]
            if bad.any():
                at = int(np.argmax(bad))
                self._report(
                    "async-race", thread, words[at] * self.granule, pc, int(bad.sum()),
                    "overwritten by an asynchronous copy while "
                    f"{self.agent_name(agent)} may still read it",
                )  # fmt: skip

    def async_read(self, thread, words, agent, clock, pc):
        """An asynchronous read (bulk store, wgmma operand) by `agent` starts."""
        if not self.on:
            return
        cluster, warp = int(self.m.cluster[thread]), int(self.m.warp_in_cluster[thread])
        known = self.clocks[cluster, warp]
        last = self.record[words]
        if not last[:, CLOCK].all():
            at = int(np.argmin(last[:, CLOCK]))
            self._report(
                "uninitialised-shared", thread, words[at] * self.granule, pc,
                int((last[:, CLOCK] == 0).sum()), "asynchronous read of shared memory nobody wrote",
            )  # fmt: skip
        late = last[:, CLOCK] > known[last[:, AGENT]]
        if late.any():
            at = int(np.argmax(late))
            self._conflict(thread, words[at] * self.granule, last[at], pc, "read", late)
        self._check_proxy(thread, words, last, cluster, warp, late, pc)
        if agent not in self.engine_reads:
            self.engine_reads[agent] = np.zeros(len(self.record), np.int32)
        self.engine_reads[agent][words] = clock
        if agent >= self.barrier_base and len(words):
            self.use(int(words[0]) * self.granule // self.m.shared_stride, agent, clock, pc)

    def _check_proxy(self, thread, words, last, cluster, warp, late, pc):
        """Generic-proxy writes need fence.proxy.async by the writer, or by the issuer after it
        synchronised with the writer."""
        generic = (last[:, AGENT] < self.bulk_base) & (last[:, CLOCK] > 0) & ~late
        by_writer = self.fence_time[last[:, THREAD]] >= last[:, TIME]
        by_issuer = last[:, CLOCK] <= self.fence_clocks[cluster, warp][last[:, AGENT]]
        by_issuer &= (last[:, AGENT] != warp) | (self.fence_time[thread] >= last[:, TIME])
        missing = generic & ~by_writer & ~by_issuer
        if missing.any():
            at = int(np.argmax(missing))
            line = self.m.program.ops[last[at, PC]].line
            self._report(
                "missing-proxy-fence", thread, words[at] * self.granule, pc, int(missing.sum()),
                f"the async proxy reads what line {line} wrote with an ordinary store; "
                "fence.proxy.async must come between",
            )  # fmt: skip

    # ---- reports -----------------------------------------------------------------------------
    def _uninitialised(self, lanes, when, offsets, pc):
        missing = (when == 0).any(axis=1)
        at = int(np.argmax(missing))
        self._report(
            "uninitialised-shared", lanes.thread(at), offsets[at], pc, int(missing.sum()),
            "shared memory is read before anything was written there",
        )  # fmt: skip

    def _conflict(self, thread, offset, record, pc, verb, bad):
        line = self.m.program.ops[record[PC]].line
        agent = int(record[AGENT])
        asynchronous = agent >= self.copy_base
        by = self.agent_name(agent) if asynchronous else f"thread {int(self.m.tid[record[THREAD]])}"
        self._report(
            "async-race" if asynchronous else "shared-race", thread, offset, pc, int(bad.sum()),
            f"{verb} with nothing that orders it after the write by {by} at line {line}",
        )  # fmt: skip

    def _report(self, kind, thread, offset, pc, count, message):
        self.m.findings.add(kind, pc, thread, int(offset) % self.m.shared_stride, message, count)


def _granule(program):
    """Bytes per shadow word: the narrowest ordinary access that may go to shared memory."""
    narrow = [4]
    for op in program.ops:
        if (
            op.base in ("ld", "st", "atom", "red")
            and op.kind
            and not op.has("global", "param", "const")
        ):
            bits = {"8": 1, "6": 2 if op.kind in ("b16", "u16", "s16", "f16", "bf16") else 4}
            narrow.append(bits.get(op.kind[-1], 4) if op.kind not in ("f16x2", "bf16x2") else 4)
    return min(narrow)


def _is_synchronising(op):
    if op.base in ("atom", "red"):
        return True
    return op.base in ("ld", "st") and op.has("volatile", "relaxed", "acquire", "release", "mmio")
