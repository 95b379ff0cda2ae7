"""Table: wgmma.  A product is queued when issued and computed at the wait that retires it."""

import re

import numpy as np

from mirage_hello.ptx.emulator import wgmma
from mirage_hello.ptx.emulator.formats import FORMATS
from mirage_hello.ptx.emulator.instructions_warp import aligned, constant
from mirage_hello.ptx.emulator.matrix import ELEMENT_BITS
from mirage_hello.ptx.emulator.operands import SHARED_BASE, Const, List, Slot
from mirage_hello.ptx.emulator.table import instruction


@instruction("wgmma.fence.sync.aligned", control=True)
def fence(op):
    return aligned(op, lambda lanes: lanes.m.watch.fence(lanes.warps), group=128)


@instruction("wgmma.commit_group.sync.aligned", control=True)
def commit(op):
    return aligned(op, lambda lanes: lanes.m.queue.commit_wgmma(lanes), group=128)


@instruction("wgmma.wait_group.sync.aligned", control=True)
def wait(op):
    keep = constant(op, 0)
    if not 0 <= keep <= 7:
        op.fail(f"keeps 0 to 7 groups (got {keep})")
    return aligned(op, lambda lanes: lanes.m.queue.wait_wgmma(lanes, keep), group=128)


class Product:
    """One wgmma of one warpgroup, in flight."""

    __slots__ = ("a", "b", "code", "first", "machine", "use_d")

    def __init__(self, machine, code, first, a, b, use_d):
        self.machine, self.code, self.first = machine, code, first
        self.a, self.b, self.use_d = a, b, use_d

    def run_chain(self, products):
        """Compute a committed group; products in a row on one accumulator keep it as a matrix."""
        d = None
        for i, p in enumerate(products):
            code = p.code
            if d is None and p.use_d:
                d = wgmma.d_from_registers(p.registers(code.d_rows), code.shape)
            d = p.multiply(d if p.use_d else None)
            last = i + 1 == len(products) or products[i + 1].code.d_rows != code.d_rows
            if last:
                out = wgmma.d_to_registers(d, code.shape)
                for row, values in zip(code.d_rows, out, strict=True):
                    self.machine.rows[row][p.threads] = values
                d = None
            p.retire()

    @property
    def threads(self):
        return slice(self.first, self.first + 128)

    def registers(self, rows):
        return np.stack([self.machine.rows[row][self.threads] for row in rows])

    def multiply(self, d):
        code, m = self.code, self.machine
        start = int(m.block[self.first]) * m.shared_stride
        memory = m.shared.data[start : start + m.shared_stride]
        if self.a is None:
            a = wgmma.a_from_registers(self.registers(code.a_rows), code.shape.a)
        else:
            a = wgmma.gather(memory, self.a, ELEMENT_BITS[code.shape.a] // 8)
        b = wgmma.gather(memory, self.b, ELEMENT_BITS[code.shape.b] // 8)
        return wgmma.multiply(code.shape, a, b, d, code.scale_a, code.scale_b, code.satfinite)

    def retire(self):
        d, a = self.code.indices(self.machine.watch)
        self.machine.watch.hold(d, a, self.first >> 5, -1)


class Code:
    """The decoded instruction: shape, rows, scales, descriptor readers."""

    def __init__(self, op):
        found = re.match(r"m64n(\d+)k(\d+)$", op.mods[0])
        kinds = [p for p in op.mods[1:] if p in FORMATS or p in ("s32", "s8", "u8")]
        if not found or len(kinds) != 3 or op.has("sp"):
            op.unsupported("is not of the form .m64nNkK.d.a.b; extend instructions_wgmma.py")
        self.op, self.satfinite, self._indices = op, op.has("satfinite"), None
        self._places = {}
        try:
            self.shape = wgmma.Shape(int(found[1]), int(found[2]), *kinds)
        except ValueError as error:
            op.fail(str(error))
        self._accumulator(op)
        self._operands(op)
        op.flops = self.shape.flops

    def place(self, role, descriptor, shadow):
        """(byte addresses [rows][K], shadow words, lowest byte, end) of operand A (0) or B (1).

        Remembered: a pipeline shows the same few descriptors to every block and iteration.
        """
        found = self._places.get((role, descriptor))
        if found is None:
            shape = self.shape
            rows, kind, trans = (
                (64, shape.a, self.trans_a),
                (shape.n, shape.b, self.trans_b),
            )[role]
            at = wgmma.operand_addresses(descriptor, rows, shape, kind, bool(trans))
            size = ELEMENT_BITS[kind] // 8
            words = shadow.words_of(at.ravel(), size) if shadow.on else None
            found = at, words, int(at.min()), int(at.max()) + size
            self._places[role, descriptor] = found
        return found

    def indices(self, watch):
        """(accumulator, fragment) positions in the register watch; the same for every launch."""
        if self._indices is None:
            self._indices = watch.indices(self.d_rows), watch.indices(self.a_rows)
        return self._indices

    def _accumulator(self, op):
        d = op.elements(0)
        if len(d) != self.shape.registers or not all(isinstance(e, Slot) for e in d):
            op.fail(f"needs {self.shape.registers} accumulator registers (got {len(d)})")
        self.d_rows = tuple(e.row for e in d)
        op.defs.update(self.d_rows)

    def _operands(self, op):
        a = op.operands[1]
        self.a_rows, self.a_descriptor = (), None
        if isinstance(a, List):
            self.a_rows = tuple(e.row for e in a.elements)
            op.uses.update(self.a_rows)
        else:
            self.a_descriptor = op.src(1, "b64")
        self.b_descriptor = op.src(2, "b64")
        scale = op.operands[3] if len(op.operands) > 3 else Const(1)
        self.scale_d = op.reader(scale, "pred") if isinstance(scale, Slot) else None
        self.constant_scale = bool(scale.value) if isinstance(scale, Const) else None
        if self.constant_scale is not False:
            (op.uses if self.constant_scale else op.weak_uses).update(self.d_rows)
        values = [constant(op, i) for i in range(4, len(op.operands))] + [1, 1]
        self.scale_a, self.scale_b = values[0], values[1]
        trans = [constant(op, i) for i in range(6, len(op.operands))]
        if self.a_rows:
            trans = [0, *trans]
        self.trans_a, self.trans_b = (trans + [0, 0])[:2]


@instruction("wgmma.mma_async.sync.aligned", control=True)
def mma_async(op):
    code = Code(op)

    def body(lanes):
        m = lanes.m
        if lanes.n != 32 * len(lanes.warps) or len(lanes.warps) % 4:
            return  # reported as divergent by gather
        m.watch.check_fence(np.concatenate(code.indices(m.watch)), lanes, op.pc)
        use = None if code.scale_d is None else lanes.full(code.scale_d(lanes))
        descriptors_a = None if code.a_descriptor is None else lanes.full(code.a_descriptor(lanes))
        descriptors_b = lanes.full(code.b_descriptor(lanes))
        for i in range(0, lanes.n, 128):
            use_d = code.constant_scale if use is None else bool(use[i])
            part = lanes.take(np.arange(i, i + 128))
            _check_registers(code, part, use_d, op.pc)
            a = None if descriptors_a is None else int(descriptors_a[i])
            _issue(code, part, a, int(descriptors_b[i]), use_d)
        m.counts.add_flops(op.pc, op.flops * (lanes.n // 128))

    return aligned(op, body, group=128)


def _check_registers(code, lanes, use_d, pc):
    """Undefined registers among the inputs; writes of D define it."""
    watch = lanes.m.watch
    rows = code.a_rows + (code.d_rows if use_d else ())
    for row in rows:
        if row in watch.defined and not watch.defined[row][lanes.sel].all():
            watch.undefined(row, lanes, pc)
    for row in code.d_rows:
        if row in watch.defined:
            watch.defined[row][lanes.sel] = True


def _issue(code, lanes, a, b, use_d):
    m, first, pc = lanes.m, lanes.thread(0), code.op.pc
    group = first >> 7
    base = int(m.block[first]) * m.shared_stride
    clock = int(m.queue.wgmma_time[group]) + 1
    addresses = []
    for role, descriptor in enumerate((a, b)):
        if descriptor is None:
            addresses.append(None)
            continue
        try:
            at, words, low, high = code.place(role, descriptor, m.shadow)
        except ValueError as error:
            m.findings.add("out-of-bounds", pc, first, None, str(error))
            return
        if low < SHARED_BASE or high > m.shared_end:
            m.findings.add(
                "out-of-bounds", pc, first, low,
                f"a wgmma descriptor covers shared bytes {low - SHARED_BASE} to "
                f"{high - SHARED_BASE} of a block that has {m.shared_end - SHARED_BASE}",
            )  # fmt: skip
            return
        addresses.append(at)
        if m.shadow.on:
            mine = words + base // m.shadow.granule
            m.shadow.async_read(first, mine, m.shadow.wgmma_engine(group), clock, pc)
    m.watch.hold(*code.indices(m.watch), first >> 5, 1)
    m.queue.submit_wgmma(group, Product(m, code, first, *addresses, use_d))
