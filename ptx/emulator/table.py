"""The table mnemonic -> semantics, and what a semantic function gets to work with.

    @instruction("add", "sub")
    def integer_sum(op):                      # called once, when the kernel is lowered
        a, b = op.src(1, op.kind), op.src(2, op.kind)
        put = op.dst(0, op.kind)
        def run(lanes):                       # called each time the instruction executes
            put(lanes, a(lanes) + b(lanes))
        return run

A key is the longest dotted prefix of an opcode that names the operation ("add", "cp.async.bulk",
"mbarrier.try_wait"); the parts after it are `op.mods`.  `run` returns None to go on to the next
instruction, or a list of (program counter, lanes) when control flow splits; a run function that
parks its lanes (barriers, waits) returns those that go on.  Mark such decoders with
@instruction(..., control=True): the scheduler may merge or suspend threads only there.
Registers are unsigned arrays of raw bits, one element per thread (formats.py).
"""

import numpy as np

from mirage_hello.ptx.emulator import formats
from mirage_hello.ptx.emulator.operands import Const, List, Not, Place, Slot, Special, Target, Two

INSTRUCTIONS: dict = {}  # mnemonic prefix -> decoder
CONTROL: set = set()  # prefixes where threads may split or wait


class PtxError(ValueError):
    """A kernel that no assembler would take: the message has file, line and instruction."""


class PtxUnsupported(PtxError, NotImplementedError):
    """PTX that the emulator cannot run; the message says which table to extend."""


def instruction(*prefixes, control=False):
    """Register a decoder for opcodes that begin with one of `prefixes`."""

    def register(decode):
        for prefix in prefixes:
            INSTRUCTIONS[prefix] = decode
            if control:
                CONTROL.add(prefix)
        return decode

    return register


def lookup(opcode):
    """(prefix, rest of the parts) of the longest table entry for `opcode`, or (None, parts)."""
    parts = opcode.split(".")
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in INSTRUCTIONS:
            return prefix, parts[n:]
    return None, parts


def kind_bits(kind):
    """Width of a PTX type in bits; 1 for pred."""
    return 1 if kind == "pred" else 8 * formats.register_dtype(kind).itemsize


def _is_type(part):
    try:
        return part == "pred" or bool(formats.register_dtype(part))
    except (ValueError, KeyError):
        return False


def literal(const, kind):
    """A constant as a one-element array of raw bits of `kind` (broadcasts against threads)."""
    value = const.value
    if kind == "pred":
        return np.array([bool(value)])
    dtype = formats.register_dtype(kind)
    is_float = kind in formats.FORMATS
    if const.kind == "decimal" or (const.kind != "int" and const.kind != kind and is_float):
        if const.kind == "f32":
            value = np.uint32(value).view(np.float32)
        elif const.kind == "f64":
            value = np.uint64(value).view(np.float64)
        return formats.encode(kind, np.array([float(value)]))
    return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], dtype=dtype)


class Op:
    """One lowered instruction: its text, operands and, after `bind`, its `run`.

    `kind` is the last type of the opcode ("u32", "bf16x2"), `mods` the parts after the table's
    prefix; `leader` marks places where groups of threads may meet; `uses`/`defs` are register rows.
    """

    __slots__ = (
        "base",
        "control",
        "defs",
        "flops",
        "guard",
        "guard_row",
        "kind",
        "leader",
        "line",
        "mods",
        "negated",
        "opcode",
        "operands",
        "pc",
        "program",
        "run",
        "text",
        "types",
        "uses",
        "weak_uses",
    )  # fmt: skip

    def __init__(self, program, pc, opcode, operands, guard, line, text):
        self.program, self.pc, self.opcode, self.operands = program, pc, opcode, operands
        self.line, self.text, self.run, self.leader, self.flops = line, text, None, False, 0
        self.base, self.mods = lookup(opcode)
        self.control = self.base in CONTROL
        self.types = [p for p in opcode.split(".") if _is_type(p)]
        self.kind = self.types[-1] if self.types else None
        self.guard = guard
        self.guard_row, self.negated = (guard[0].row, guard[1]) if guard else (-1, False)
        self.uses, self.defs, self.weak_uses = set(), set(), set()

    def decode(self):
        """Fill `run` from the table."""
        self.uses, self.defs, self.weak_uses = set(), set(), set()
        if self.guard:
            self.uses.add(self.guard_row)
        if self.base is None:
            self.unsupported("is not in the table; extend an instructions_*.py of ptx/emulator")
        self.run = INSTRUCTIONS[self.base](self)

    def fail(self, why):
        raise PtxError(f"{self.program.module.name}:{self.line}: {self.opcode} {why}")

    def unsupported(self, why):
        raise PtxUnsupported(f"{self.program.module.name}:{self.line}: {self.opcode} {why}")

    def has(self, *mods):
        return any(m in self.mods for m in mods)

    def rounding(self, default="rn"):
        names = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
        return next((m for m in self.mods if m in names), default)

    def target(self, i=0):
        """Program counter of the label operand `i`."""
        if not isinstance(self.operands[i], Target):
            self.fail("expects a label")
        return self.program.labels[self.operands[i].name]

    # ---- register access: closures over rows of the register file --------------------------------
    def src(self, i, kind):
        """A function lanes -> raw bits of operand `i` as an array of `kind`'s unsigned type."""
        if i >= len(self.operands):
            self.fail(f"expects at least {i + 1} operands")
        return self.reader(self.operands[i], kind)

    def reader(self, operand, kind, strong=True):
        if isinstance(operand, Const):
            value = literal(operand, kind)
            return lambda lanes: value
        if isinstance(operand, Special):
            name, dtype = operand.name, formats.register_dtype(kind)
            return lambda lanes: lanes.m.special(name, dtype)[lanes.sel]
        if isinstance(operand, Not):
            inner = self.reader(operand.slot, kind)
            return lambda lanes: ~inner(lanes)
        if not isinstance(operand, Slot):
            self.fail(f"cannot read the operand {operand}")
        (self.uses if strong else self.weak_uses).add(operand.row)
        return self._row_reader(operand, kind)

    def _row_reader(self, slot, kind):
        row, bits = slot.row, kind_bits(kind)
        if (bits == 1) != (slot.bits == 1) or bits > slot.bits:
            self.fail(f"reads {slot.name} ({slot.bits} bits) as .{kind}")
        narrow = None if bits in (slot.bits, 1) else formats.register_dtype(kind)
        if row in self.program.watched:
            pc = self.pc

            def watched(lanes):
                lanes.m.watch.read(row, lanes, pc)
                value = lanes.rows[row][lanes.sel]
                return value if narrow is None else value.astype(narrow)

            return watched
        if narrow is not None:
            return lambda lanes: lanes.rows[row][lanes.sel].astype(narrow)
        return lambda lanes: lanes.rows[row][lanes.sel]

    def dst(self, i, kind, widen=False):
        """A function (lanes, bits) that writes operand `i`; `_` swallows the value."""
        return self.writer(self.operands[i], kind, widen)

    def writer(self, operand, kind, widen=False):
        if operand is None:
            return lambda lanes, value: None
        if not isinstance(operand, Slot):
            self.fail(f"cannot write the operand {operand}")
        bits = kind_bits(kind)
        if bits != operand.bits and not (widen and 1 < bits < operand.bits):
            self.fail(f"writes .{kind} to {operand.name} ({operand.bits} bits)")
        self.defs.add(operand.row)
        row, pc = operand.row, self.pc
        extend = _sign_extender(kind, operand.bits) if bits < operand.bits else None
        if row in self.program.watched:

            def watched(lanes, value):
                lanes.m.watch.write(row, lanes, pc)
                lanes.rows[row][lanes.sel] = value if extend is None else extend(value)

            return watched
        if extend is not None:

            def widening(lanes, value):
                lanes.rows[row][lanes.sel] = extend(value)

            return widening

        def plain(lanes, value):
            lanes.rows[row][lanes.sel] = value

        return plain

    def elements(self, i):
        """The elements of a vector operand, or the operand itself as a one-element tuple."""
        operand = self.operands[i]
        return operand.elements if isinstance(operand, List) else (operand,)

    def pair(self, i):
        """(first, second) of `%a|%b`, or (operand, None)."""
        operand = self.operands[i]
        return (operand.first, operand.second) if isinstance(operand, Two) else (operand, None)

    def address(self, i, bits=None):
        """A function lanes -> int64 addresses of the memory operand `i`."""
        place = self.operands[i]
        if isinstance(place, Slot | Const):
            place = Place(place, 0) if isinstance(place, Slot) else Place(None, place.value)
        if not isinstance(place, Place):
            self.fail(f"expects an address, got {place}")
        return self.place(place)

    def place(self, place):
        offset = place.offset
        if place.base is None:
            value = np.array([offset], dtype=np.int64)
            return lambda lanes: value
        base = self.reader(place.base, f"b{place.base.bits}")
        if place.base.bits == 32:
            return lambda lanes: (base(lanes).astype(np.int64) + offset) & 0xFFFFFFFF
        if place.base.bits != 64:
            self.fail(f"addresses are 32 or 64 bits wide; {place.base.name} has {place.base.bits}")
        return lambda lanes: base(lanes).astype(np.int64) + offset


def _sign_extender(kind, bits):
    wide = np.dtype(f"u{bits // 8}")
    if kind[0] == "s" and kind[1:].isdigit():
        signed, target = np.dtype(f"i{int(kind[1:]) // 8}"), np.dtype(f"i{bits // 8}")
        return lambda v: np.ascontiguousarray(v).view(signed).astype(target).view(wide)
    return lambda v: v.astype(wide)


def bind(program):
    """Decode every operation, find suspect registers, and decode those that touch them again."""
    from mirage_hello.ptx.emulator import dataflow

    for op in program.ops:
        op.decode()
    dataflow.mark_leaders(program)
    program.suspects = dataflow.possibly_undefined(program)
    program.tensor_rows = frozenset(
        row for op in program.ops if op.opcode.startswith("wgmma.mma") for row in op.defs | op.uses
        if program.rows[row][1] == 32
    )  # fmt: skip
    program.watched = program.suspects | program.tensor_rows
    for op in program.ops:
        if (op.uses | op.defs | op.weak_uses) & program.watched:
            op.decode()
