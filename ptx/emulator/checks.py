"""Findings: what the emulator saw that the hardware would hide.

`Findings` collects them (one per kind and line, with a count), `EmulatorError` carries them out
of `launch`, and `Watch` looks after registers: reads before any write, and accumulators or
fragments of a wgmma that is still in flight.  Shared-memory races are in races.py.
"""

from dataclasses import asdict, dataclass

import numpy as np

KINDS = {
    "out-of-bounds": "access outside the tensor, the block's shared memory or the thread's frame",
    "misaligned": "address not a multiple of the access size",
    "uninitialised-shared": "shared memory read before anything was written there",
    "uninitialised-register": "register read before it was written",
    "shared-race": "two accesses to shared memory, one a write, with nothing ordering them",
    "async-race": "asynchronous copy or wgmma still in flight on shared memory that is touched",
    "missing-proxy-fence": "ordinary writes read by TMA or wgmma without fence.proxy.async",
    "divergent-aligned": "warp- or warpgroup-wide instruction without all its threads",
    "accumulator-in-flight": "wgmma register touched before wgmma.wait_group",
    "missing-wgmma-fence": "wgmma registers used by ordinary instructions without wgmma.fence",
    "shuffle-inactive": "shfl reads a lane that does not execute it",
    "copy-in-flight-at-exit": "block or thread exits while a copy still uses its shared memory",
    "exited-block": "shared memory of a block that has exited, or may have, is used by a peer",
    "mbarrier": "mbarrier used before its mbarrier.init is sure, or with too many arrivals",
    "tensor-map": "operand of a tensor copy is not a usable tensor map",
    "barrier-unbalanced": "arrivals left over or by parts of a warp, cluster wait without arrive",
    "grid-dependency": "global memory written before griddepcontrol.wait, or no thread waits",
    "deadlock": "threads wait for something that cannot happen",
}


@dataclass
class Finding:
    """One defect: where in the text, which thread first, how many threads in all."""

    kind: str
    line: int
    text: str
    block: tuple[int, int, int]
    thread: int
    address: int | None
    message: str
    count: int = 1

    def __str__(self):
        where = f"block {self.block} thread {self.thread}"
        if self.address is not None:
            where += f" address {self.address:#x}"
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"line {self.line}: {self.kind}: {self.message}; {where}{times}\n    {self.text}"

    def as_dict(self):
        return asdict(self)


class EmulatorError(RuntimeError):
    """A checked launch had findings; `findings` lists them, `report` has the counts."""

    def __init__(self, name, findings, report=None):
        self.findings, self.report = findings, report
        listed = "\n".join(str(f) for f in findings)
        super().__init__(f"{name}: {len(findings)} finding(s)\n{listed}")


class Findings(list):
    """Findings of a launch, merged by (kind, program counter)."""

    def __init__(self, program, enabled=True):
        super().__init__()
        self.program, self.machine, self._known, self.enabled = program, None, {}, enabled

    def add(self, kind, pc, thread, address, message, count=1):
        """Record a finding; `thread` is a batch index, `pc` the instruction."""
        known = self._known.get((kind, pc))
        if known is not None:
            known.count += count
            return
        op, m = self.program.ops[pc], self.machine
        block = tuple(int(v) for v in m.block_ids[m.block[thread]])
        finding = Finding(
            kind, op.line, op.text, block, int(m.tid[thread]), address, message, count
        )
        self._known[kind, pc] = finding
        self.append(finding)


class Watch:
    """Per-thread state of the registers that need it (`program.watched`).

    `defined[row]`: written yet, per thread, for rows that some path reads uninitialised.  For rows
    that wgmma uses: `held[role][row, warp]` counts products in flight on the row as accumulator
    (role 0: neither read nor write) or A fragment (role 1: no write); `touched[row, warp]` is when
    an ordinary instruction last read or wrote it, for wgmma.fence.
    """

    def __init__(self, machine):
        self.m = machine
        program, warps = machine.program, machine.size // 32
        self.defined = {row: np.zeros(machine.size, bool) for row in program.suspects}
        self.index = {row: i for i, row in enumerate(sorted(program.tensor_rows))}
        self.touched = np.zeros((len(self.index), warps), np.int64)
        self.held = np.zeros((2, len(self.index), warps), np.int16)
        self.fenced = np.zeros(warps, np.int64)
        self.in_flight, self.time = 0, 1

    def read(self, row, lanes, pc):
        flags = self.defined.get(row)
        if flags is not None and not flags[lanes.sel].all():
            self.undefined(row, lanes, pc)
        i = self.index.get(row)
        if i is not None:
            self.time += 1
            self.touched[i, lanes.warps] = self.time
            if self.in_flight:
                self._in_flight(row, lanes, pc, "read", (0,))

    def write(self, row, lanes, pc):
        flags = self.defined.get(row)
        if flags is not None:
            flags[lanes.sel] = True
        i = self.index.get(row)
        if i is not None:
            self.time += 1
            self.touched[i, lanes.warps] = self.time
            if self.in_flight:
                self._in_flight(row, lanes, pc, "written", (0, 1))

    def undefined(self, row, lanes, pc):
        """Report the threads of `lanes` that have not written the row."""
        missing = ~self.defined[row][lanes.sel]
        at = int(np.argmax(missing))
        name = self.m.program.rows[row][0]
        self.m.findings.add(
            "uninitialised-register", pc, lanes.thread(at), None,
            f"{name} is read before it is written", int(missing.sum()),
        )  # fmt: skip

    def _in_flight(self, row, lanes, pc, verb, roles):
        for role in roles:
            hit = self.held[role, self.index[row]][lanes.warps] > 0
            if hit.any():
                warp = int(lanes.warps[int(np.argmax(hit))])
                name = self.m.program.rows[row][0]
                self.m.findings.add(
                    "accumulator-in-flight", pc, warp * 32, None,
                    f"{name} is {verb} while a wgmma that uses it as "
                    f"{('accumulator', 'A fragment')[role]} is in flight; wgmma.wait_group must "
                    "come first", int(hit.sum()),
                )  # fmt: skip
                return

    # ---- wgmma ---------------------------------------------------------------------------------
    def indices(self, rows):
        """Positions of tensor rows in `held` and `touched`."""
        return np.array([self.index[row] for row in rows], dtype=np.int64)

    def hold(self, d, a, first_warp, delta):
        """A product on rows `d` and `a` (from `indices`) starts (delta 1) or retires (-1)."""
        warps = slice(first_warp, first_warp + 4)
        self.held[0, d, warps] += delta
        self.held[1, a, warps] += delta
        self.in_flight += delta

    def fence(self, warps):
        self.time += 1
        self.fenced[warps] = self.time

    def check_fence(self, rows, lanes, pc):
        """wgmma: ordinary accesses to its registers lie before the warp's last wgmma.fence, and
        there is one before the first wgmma."""
        fenced = self.fenced[lanes.warps]
        late = (self.touched[rows][:, lanes.warps] > fenced) | (fenced == 0)
        if late.any():
            i, warp = np.unravel_index(int(np.argmax(late)), late.shape)
            row = sorted(self.index)[int(rows[i])]
            self.m.findings.add(
                "missing-wgmma-fence", pc, int(lanes.warps[warp]) * 32, None,
                f"{self.m.program.rows[row][0]} is used by ordinary instructions, or by "
                "no wgmma before; wgmma.fence must come first", int(late.any(axis=0).sum()),
            )  # fmt: skip
