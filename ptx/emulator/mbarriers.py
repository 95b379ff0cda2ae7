"""mbarrier objects: arrivals, transaction bytes, phases, and the threads that wait on them."""

from dataclasses import dataclass, field

import numpy as np

from mirage_hello.ptx.emulator import memory


@dataclass
class Mbarrier:
    """State of one 64-bit mbarrier in shared memory.

    `pending` arrivals and `tx` bytes are still due in the current phase; `phase` counts completed
    ones.  `agent` and `time` are its identity and clock in the race detector; `init_*` say who
    initialised it and when, by the clocks and by the detector's counter.
    """

    block: int
    address: int
    count: int
    pending: int
    agent: int
    tx: int = 0
    phase: int = 0
    time: int = 0
    init_thread: int = -1
    init_clock: int = 0
    init_time: int = 0
    joined: np.ndarray | None = None
    done: np.ndarray | None = None
    waiting: list = field(default_factory=list)


class Mbarriers:
    """Every mbarrier of a batch, by (block, address)."""

    def __init__(self, machine):
        self.m, self.table = machine, {}
        self.asked = np.full(machine.size, -1, np.int64)  # last try_wait that was told "not yet"

    def groups(self, lanes, addresses, pc, known_only=True):
        """Split threads by the barrier they name: yields (Mbarrier, lanes, positions or None)."""
        segments = memory.resolve(lanes, "shared", addresses, 8, pc)
        stride = self.m.shared_stride
        for s in segments:
            sub = lanes if s.positions is None else lanes.take(s.positions)
            offsets = s.offsets
            if (offsets == offsets[0]).all():
                parts = [(int(offsets[0]), sub, s.positions)]
            else:
                parts = []
                for key in np.unique(offsets):
                    at = np.flatnonzero(offsets == key)
                    places = at if s.positions is None else s.positions[at]
                    parts.append((int(key), sub.take(at), places))
            for flat, part, positions in parts:
                key = flat // stride, flat % stride
                barrier = self.table.get(key)
                if barrier is None and known_only:
                    self.m.findings.add(
                        "mbarrier",
                        pc,
                        part.thread(0),
                        key[1],
                        "no mbarrier.init at this address",
                        part.n,
                    )
                    continue
                if known_only:
                    self._check_order(barrier, part, pc)
                yield (barrier if known_only else key), part, positions

    def init(self, lanes, addresses, count, pc):
        for key, part, positions in self.groups(lanes, addresses, pc, known_only=False):
            n = int(
                np.atleast_1d(count)[0 if positions is None or len(count) == 1 else positions[0]]
            )
            old = self.table.get(key)
            cluster = key[0] // self.m.cluster_size
            agent = old.agent if old else self.m.shadow.new_barrier_agent(cluster)
            fresh = Mbarrier(key[0], key[1], n, n, agent)
            if old:
                fresh.time = old.time + 1
            self._remember_init(fresh, part)
            self.table[key] = fresh
            if not 0 < n < (1 << 20):
                self.m.findings.add(
                    "mbarrier", pc, part.thread(0), key[1], f"mbarrier.init with count {n}"
                )

    def _remember_init(self, barrier, lanes):
        shadow = self.m.shadow
        barrier.init_thread = lanes.thread(0)
        warp = barrier.init_thread >> 5
        local = int(shadow.warp_local[warp])
        barrier.init_clock = int(shadow.clocks[shadow.warp_cluster[warp], local, local])
        shadow.now += 1
        barrier.init_time = shadow.now

    def _check_order(self, barrier, lanes, pc):
        """Something must order a use after mbarrier.init by another warp."""
        shadow = self.m.shadow
        if not shadow.on:
            return
        maker = shadow.warp_local[barrier.init_thread >> 5]
        mine = shadow.warp_local[lanes.warps]
        known = shadow.clocks[shadow.warp_cluster[lanes.warps], mine, maker]
        unsure = (known < barrier.init_clock) & (mine != maker)
        if unsure.any():
            warp = int(lanes.warps[int(np.argmax(unsure))])
            self.m.findings.add(
                "mbarrier", pc, warp * 32, barrier.address,
                "nothing orders this after mbarrier.init by thread "
                f"{int(self.m.tid[barrier.init_thread])}; a barrier must come between",
            )  # fmt: skip

    def arrive(self, lanes, addresses, counts, tx, pc, release=True):
        """mbarrier.arrive{.expect_tx}: returns the state tokens (phase of each arrival) as u64."""
        tokens = np.zeros(lanes.n, np.uint64)
        for barrier, part, positions in self.groups(lanes, addresses, pc):
            pick = slice(None) if positions is None else positions
            tokens[pick] = barrier.phase | barrier.pending << 32
            if release:
                self.join(barrier, part)
            self.m.shadow.touch_remote(part, barrier.block, pc)
            barrier.tx += int(lanes.full(tx)[pick].sum())
            barrier.pending -= int(lanes.full(counts)[pick].sum())
            if barrier.pending < 0:
                self.m.findings.add(
                    "mbarrier", pc, part.thread(0), barrier.address,
                    f"more arrivals in one phase than the {barrier.count} of mbarrier.init",
                )  # fmt: skip
                barrier.pending = 0
            self.advance(barrier)
        return tokens

    def join(self, barrier, lanes):
        """The barrier learns what the arriving warps know."""
        shadow = self.m.shadow
        if not shadow.on:
            return
        row = shadow.snapshot(lanes.warps).max(axis=0)
        self.join_row(barrier, row)
        shadow.tick(lanes.warps)

    def join_row(self, barrier, row):
        if barrier.joined is None:
            barrier.joined = row.copy()
        else:
            n = min(len(row), len(barrier.joined))
            if len(row) > len(barrier.joined):
                barrier.joined = np.pad(barrier.joined, (0, len(row) - len(barrier.joined)))
            barrier.joined[:n] = np.maximum(barrier.joined[:n], row[:n])

    def complete_tx(self, barrier, nbytes):
        barrier.tx -= nbytes
        self.advance(barrier)

    def advance(self, barrier):
        """Complete the phase when nothing is due any more, and wake those who wait."""
        if barrier.pending or barrier.tx:
            return
        barrier.phase += 1
        barrier.time += 1
        barrier.pending = barrier.count
        barrier.done = barrier.joined
        waiting, barrier.waiting = barrier.waiting, []
        for pc, lanes in waiting:
            self.m.put(pc, lanes)

    def test(self, lanes, addresses, expected, parity, pc):
        """Per thread: has the phase (of that parity, or of the state token) completed?

        A thread that names no mbarrier passes: that is a finding already, and it must not spin.
        """
        passed = np.ones(lanes.n, bool)
        blocked = []
        for barrier, part, positions in self.groups(lanes, addresses, pc):
            pick = slice(None) if positions is None else positions
            want = lanes.full(expected)[pick]
            ok = (barrier.phase & 1) != (want & 1) if parity else barrier.phase > want
            passed[pick] = ok
            if ok.any():
                self._learn(barrier, part if ok.all() else part.where(ok))
            if not ok.all():
                blocked.append((barrier, part if not ok.any() else part.where(~ok)))
        return passed, blocked

    def _learn(self, barrier, lanes):
        shadow = self.m.shadow
        if not shadow.on:
            return
        if barrier.done is not None:
            shadow.acquire(lanes.warps, barrier.done)
        shadow.learn(lanes.warps, barrier.agent, barrier.time)

    def waits(self):
        """(program counter, lanes, reason) of every thread still waiting."""
        out = []
        for b in self.table.values():
            for pc, lanes in b.waiting:
                why = (
                    f"mbarrier at {b.address:#x} is in phase {b.phase} (parity {b.phase & 1}) with "
                    f"{b.pending} of {b.count} arrivals and {b.tx} bytes outstanding"
                )
                out.append((pc, lanes, why))
        return out
