"""launch(): arguments into parameter space, the grid into batches of blocks, a report out."""

from dataclasses import dataclass

import numpy as np

from mirage_hello.ptx.emulator import formats
from mirage_hello.ptx.emulator.checks import EmulatorError, Findings
from mirage_hello.ptx.emulator.counts import Counts
from mirage_hello.ptx.emulator.dependency import WAIT, report_end
from mirage_hello.ptx.emulator.ir import Name, type_bytes
from mirage_hello.ptx.emulator.machine import Machine
from mirage_hello.ptx.emulator.memory import Buffer, GlobalMemory
from mirage_hello.ptx.emulator.operands import TAG_SHIFT, TAG_VARIABLE
from mirage_hello.ptx.emulator.program import program as lowered

MAX_SHARED = 232448  # bytes of shared memory that an sm_90 block may have: 227 KiB
BATCH_THREADS = 32768  # threads executed together: registers of a batch stay near the cache
BATCH_BYTES = 256 << 20  # registers, shared memory and race records of a batch


@dataclass
class Report:
    """What a launch did: `findings` (checks.Finding), `counts` (counts.Counts)."""

    kernel: str
    findings: list
    counts: Counts

    def as_dict(self):
        return {
            "kernel": self.kernel,
            "findings": [f.as_dict() for f in self.findings],
            **self.counts.as_dict(),
        }


class Launch:
    """The fixed facts of one kernel launch, shared by its batches."""

    def __init__(self, module, entry, grid, block, smem_bytes, checks, early, max_turns):
        self.program = lowered(module, entry)
        self.grid, self.block = _three(grid, "grid"), _three(block, "block")
        self.smem_bytes, self.checks, self.early = int(smem_bytes), checks, early
        self.max_turns, self.first_block = max_turns, 0
        self.threads = self.block[0] * self.block[1] * self.block[2]
        directives = self.program.function.directives
        self.cluster = _three(directives.get(".reqnctapercluster") or (1, 1, 1), "cluster")
        self.cluster_size = self.cluster[0] * self.cluster[1] * self.cluster[2]
        self.memory, self.maps = GlobalMemory(), {}
        self.findings = Findings(self.program)
        self.counts = Counts(self.program)
        self.param_buffer = None
        self.waits = [op.pc for op in self.program.ops if op.base == WAIT]
        self.has_waited = False
        self._check(entry, directives)

    def _check(self, entry, directives):
        required = directives.get(".reqntid")
        if required and _three(required, ".reqntid") != self.block:
            raise ValueError(f"{entry}: block {self.block} is not the {required} of .reqntid")
        most = directives.get(".maxntid")
        if most and self.threads > np.prod(most):
            raise ValueError(f"{entry}: block {self.block} exceeds the {most} of .maxntid")
        if not 0 < self.threads <= 1024:
            raise ValueError(f"{entry}: a block has 1 to 1024 threads (got {self.threads})")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise ValueError(
                f"{entry}: grid {self.grid} is no multiple of the cluster {self.cluster}"
            )
        total = self.program.shared_static + self.smem_bytes
        if total > MAX_SHARED:
            raise ValueError(f"{entry}: {total} bytes of shared memory exceed {MAX_SHARED}")

    # ---- parameters --------------------------------------------------------------------------
    def bind(self, args):
        """Fill parameter space and register the tensors."""
        program, name = self.program, self.program.function.name
        if len(args) != len(program.params):
            raise ValueError(
                f"{name}: takes {len(program.params)} arguments ({', '.join(program.params)}), "
                f"got {len(args)}"
            )
        data = np.zeros(program.param_bytes + 128, np.uint8)
        for (label, (offset, kind, count)), value in zip(program.params.items(), args, strict=True):
            raw = self._argument(label, offset, kind, count, value)
            data[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
        self.param_buffer = Buffer(data, "the kernel's parameters", program.param_bytes)
        self._variables()

    def _argument(self, label, offset, kind, count, value):
        nbytes = count * type_bytes(kind)
        if hasattr(value, "element_strides"):
            self.maps[offset] = value, self.memory.add(value.tensor, label)
            return bytes(min(nbytes, 128))
        if isinstance(value, bytes):
            if len(value) != nbytes:
                raise ValueError(f"{label}: {len(value)} bytes given, the parameter has {nbytes}")
            return value
        if hasattr(value, "untyped_storage") or (isinstance(value, np.ndarray) and value.ndim):
            if nbytes != 8:
                raise TypeError(f"{label}: a tensor needs a 64-bit parameter, not .{kind}")
            return int(self.memory.add(value, label)).to_bytes(8, "little")
        if value is None:
            return bytes(nbytes)
        if kind in formats.FORMATS:
            return formats.encode(kind, np.array([float(value)])).tobytes()
        if isinstance(value, float) or count != 1:
            raise TypeError(f"{label}: cannot pass {value!r} as .{kind}[{count}]")
        return (int(value) & ((1 << 8 * nbytes) - 1)).to_bytes(nbytes, "little")

    def _variables(self):
        """Module-scope .global and .const variables with their initial values."""
        tag, places = TAG_VARIABLE, {}
        wanted = [v for v in self.program.module.variables if v.space != "shared"]
        for v in wanted:
            places[v.name] = tag << TAG_SHIFT
            tag += 1
        for v in wanted:
            size = type_bytes(v.type)
            data = np.zeros(max(v.nbytes, size), np.uint8)
            for i, item in enumerate(v.initial or ()):
                if isinstance(item, Name):
                    raw = places[item.name].to_bytes(8, "little")[:size]
                else:
                    raw = _constant_bytes(v.type, item)
                data[i * size : i * size + size] = np.frombuffer(raw, np.uint8)
            self.memory.add_variable(places[v.name] >> TAG_SHIFT, data, v.name)

    # ---- batches -----------------------------------------------------------------------------
    def batches(self):
        """Lists of block coordinates, whole clusters in rank order."""
        gx, gy, gz = (g // c for g, c in zip(self.grid, self.cluster, strict=True))
        cx, cy, cz = self.cluster
        size = self.batch_blocks()
        batch = []
        for k in range(gx * gy * gz):
            x, y, z = k % gx * cx, k // gx % gy * cy, k // (gx * gy) * cz
            batch += [
                (x + i, y + j, z + l) for l in range(cz) for j in range(cy) for i in range(cx)
            ]
            if len(batch) >= size:
                yield batch
                batch = []
        if batch:
            yield batch

    def batch_blocks(self):
        """Blocks that run together: bounded by threads and by memory."""
        row_bytes = sum(max(1, bits // 8) for _, bits in self.program.rows)
        shared = self.program.shared_static + self.smem_bytes
        warps = -(-self.threads // 32) * self.cluster_size
        per_block = self.threads * (row_bytes + self.program.local_bytes)
        per_block += shared * ((8 + warps) if self.checks else 1)
        most = min(BATCH_THREADS // self.threads, BATCH_BYTES // max(per_block, 1))
        return max(1, most // self.cluster_size) * self.cluster_size

    def run(self):
        for batch in self.batches():
            machine = Machine(self, batch)
            self.findings.machine = machine
            machine.run()
            self.first_block += len(batch)
            if any(f.kind == "deadlock" for f in self.findings):
                return
        report_end(self)

    def release(self):
        """Let the tensors go now: the launch and its machines refer to each other."""
        for buffer in self.memory.buffers.values():
            buffer.owner = None
        self.memory.buffers.clear()
        self.maps.clear()


def _constant_bytes(kind, number):
    value = number.value
    if kind in formats.FORMATS:
        if number.kind == kind:
            return int(value).to_bytes(type_bytes(kind), "little")
        return formats.encode(kind, np.array([float(value)])).tobytes()
    return (int(value) & ((1 << 8 * type_bytes(kind)) - 1)).to_bytes(type_bytes(kind), "little")


def _three(value, what):
    value = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    value = (*value, 1, 1)[:3]
    if min(value) < 1:
        raise ValueError(f"{what}: dimensions must be positive (got {value})")
    return value


def launch(
    module, entry, grid, block, args, smem_bytes=0, checks=True, early=False, max_turns=1_000_000
):
    """Run a kernel of a parsed module on NumPy arrays and CPU tensors.

    Args:
        module: from `parse`.  entry: kernel name.  grid, block: (x, y, z).
        args: in parameter order: arrays or CPU tensors (any dtype, any strides: the kernel gets the
            address of the first element, and may touch the whole storage behind it), ints, floats,
            None (null pointer), TensorMap objects, bytes.
        smem_bytes: dynamic shared memory.
        checks: run the detectors and raise what they find; without them only deadlocks and
            unsupported instructions raise (illegal accesses are still dropped).
        early: complete asynchronous copies when issued instead of as late as legal.
        max_turns: scheduler turns before a launch counts as hanging.
    Returns: Report with findings and counts.
    Raises: EmulatorError (findings), PtxError and PtxUnsupported (the kernel), ValueError and
        TypeError (launch arguments).
    Numerics: see formats.py, arith.py, approx.py, matrix.py.  Deterministic.
    """
    run = Launch(module, entry, grid, block, smem_bytes, checks, early, max_turns)
    run.bind(args)
    try:
        with np.errstate(all="ignore"):
            run.run()
    finally:
        run.release()
    report = Report(entry, list(run.findings), run.counts)
    fatal = report.findings if checks else [f for f in report.findings if f.kind == "deadlock"]
    if fatal:
        raise EmulatorError(f"{module.name}: {entry}", fatal, report)
    return report
