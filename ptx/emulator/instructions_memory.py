"""Table: loads, stores, atomics, ldmatrix and stmatrix, cluster addresses."""

import numpy as np

from mirage_hello.ptx.emulator import arith, integer, matrix, memory
from mirage_hello.ptx.emulator.instructions_arithmetic import elementwise, is_float
from mirage_hello.ptx.emulator.instructions_warp import aligned
from mirage_hello.ptx.emulator.operands import TAG_SHARED, TAG_SHIFT, Place
from mirage_hello.ptx.emulator.table import instruction, kind_bits

_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")


def space_of(op, place=None):
    """State space of an access: the opcode's, "" for generic, "local" for a function's .param."""
    if isinstance(place, Place) and place.space == "local":
        return "local"
    space = next((m for m in op.mods if m in _SPACES), "")
    return "param" if space.startswith("param") else space


def vector_count(op):
    return next((int(m[1:]) for m in op.mods if m in ("v2", "v4", "v8")), 1)


def _shape(op):
    """(bytes of an element, elements) of a vector access, checked against the widest legal one."""
    size, count = kind_bits(op.kind) // 8, vector_count(op)
    if size * count > 16:
        op.fail("is wider than 16 bytes, which needs sm_100")
    return size, count


@instruction("ld", "ldu")
def load(op):
    size, count = _shape(op)
    space, address = space_of(op, op.operands[1]), op.address(1)
    elements = op.elements(0)
    if len(elements) != count:
        op.fail(f"loads {count} elements into {len(elements)} registers")
    puts = [op.writer(e, op.kind, widen=True) for e in elements]
    pc, total = op.pc, size * count
    counted = space.split("::")[0] in ("", "global", "shared")

    def run(lanes):
        at = address(lanes)
        if counted:
            at = lanes.full(at)
        values, segments = memory.load(lanes, space, at, size, count, pc)
        if counted:
            lanes.m.shadow.read(lanes, segments, total, pc)
            lanes.m.counts.access(pc, lanes, segments, at, total, False)
        for i, put in enumerate(puts):
            put(lanes, values[:, i])

    return run


@instruction("st")
def store(op):
    size, count = _shape(op)
    space, address = space_of(op, op.operands[0]), op.address(0)
    sources = [op.reader(e, op.kind) for e in op.elements(1)]
    if len(sources) != count:
        op.fail(f"stores {count} elements from {len(sources)} registers")
    pc, total, dtype = op.pc, size * count, np.dtype(f"u{size}")

    def run(lanes):
        values = np.empty((lanes.n, count), dtype)
        for i, source in enumerate(sources):
            values[:, i] = source(lanes)
        at = lanes.full(address(lanes))
        segments = memory.store(lanes, space, at, values, pc)
        lanes.m.shadow.write(lanes, segments, total, pc, values)
        lanes.m.counts.access(pc, lanes, segments, at, total, True)

    return run


# ---- atomics ---------------------------------------------------------------------------------
ATOMICS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def combiner(op, name, kind):
    """function (old bits, b bits, c bits or None) -> new bits."""
    if name == "exch":
        return lambda old, b, c: b
    if name == "cas":
        return lambda old, b, c: np.where(old == b, c, old)
    if name == "inc":
        return lambda old, b, c: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1))
    if name == "dec":
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - old.dtype.type(1))
    if is_float(kind):
        function = {"add": arith.add, "min": arith.minimum, "max": arith.maximum}[name]
        if name == "add" and not op.has("shared"):
            function = arith.add_in_global_memory
        return lambda old, b, c: function(kind, old, b)
    if name in ("min", "max"):
        function = integer.minimum if name == "min" else integer.maximum
        return lambda old, b, c: function(kind, old, b)
    if name not in ATOMICS:
        op.unsupported(f"has no operation .{name}; extend instructions_memory.py")
    return lambda old, b, c: ATOMICS[name](old, b)


def _rounds(offsets):
    """Positions in groups without repeated offsets, in thread order per offset."""
    order = np.argsort(offsets, kind="stable")
    ordered = offsets[order]
    fresh = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    if fresh.all():
        return [slice(None)]
    start = np.maximum.accumulate(np.where(fresh, np.arange(len(fresh)), 0))
    rank = np.empty(len(offsets), np.int64)
    rank[order] = np.arange(len(fresh)) - start
    return [np.flatnonzero(rank == r) for r in range(int(rank.max()) + 1)]


def update(segment, values, compare, combine, size, count):
    """Apply an atomic in thread order; returns the old values [n][count]."""
    old = np.empty_like(values)
    for part in _rounds(segment.offsets):
        before = segment.buffer.gather(segment.offsets[part], size, count)
        other = None if compare is None else compare[part]
        after = np.stack(
            [
                combine(before[:, i], values[part][:, i], None if other is None else other[:, i])
                for i in range(count)
            ],
            axis=1,
        )
        segment.buffer.scatter(segment.offsets[part], after.astype(before.dtype))
        old[part] = before
    return old


@instruction("atom", "red")
def atomic(op):
    """atom d, [a], b{, c} and red [a], b: read-modify-write in thread order."""
    wants_old = op.base == "atom"
    first = 1 if wants_old else 0
    size, count = _shape(op)
    name = next((m for m in op.mods if m in ("exch", "cas", "inc", "dec", *ATOMICS)), "?")
    combine, kind = combiner(op, name, op.kind), op.kind
    space, address = space_of(op, op.operands[first]), op.address(first)
    b = [op.reader(e, kind) for e in op.elements(first + 1)]
    c = [op.reader(e, kind) for e in op.elements(first + 2)] if name == "cas" else None
    puts = [op.writer(e, kind) for e in op.elements(0)] if wants_old else []
    pc, total, dtype = op.pc, size * count, np.dtype(f"u{size}")

    def table(lanes, sources):
        return np.stack([lanes.full(s(lanes)) for s in sources], axis=1).astype(dtype)

    def run(lanes):
        at = lanes.full(address(lanes))
        values, other = table(lanes, b), table(lanes, c) if c else None
        old = np.zeros_like(values)
        segments = memory.resolve(lanes, space, at, total, pc, write=True)
        lanes.m.shadow.write(lanes, segments, total, pc)
        for s in segments:
            pick = slice(None) if s.positions is None else s.positions
            mine = None if other is None else other[pick]
            old[pick] = update(s, values[pick], mine, combine, size, count)
        lanes.m.counts.access(pc, lanes, segments, at, total, True)
        for i, put in enumerate(puts):
            put(lanes, old[:, i])

    return run


# ---- matrices --------------------------------------------------------------------------------
def _matrices(op):
    return next(int(m[1:]) for m in op.mods if m in ("x1", "x2", "x4"))


@instruction("ldmatrix.sync.aligned", control=True)
def ldmatrix(op):
    count, trans = _matrices(op), op.has("trans")
    if not op.has("m8n8") or op.kind != "b16":
        op.unsupported("is supported as .m8n8 .b16; extend instructions_memory.py")
    address = op.address(1)
    puts = [op.writer(e, "b32") for e in op.elements(0)]
    if len(puts) != count:
        op.fail(f"loads {count} matrices into {len(puts)} registers")

    def body(lanes):
        if not lanes.whole:
            return
        at = lanes.full(address(lanes))
        users = (lanes.idx & 31) < 8 * count
        sub, at = (lanes, at) if count == 4 else (lanes.where(users), at[users])
        values, segments = memory.load(sub, "shared", at, 8, 2, op.pc)
        lanes.m.shadow.read(sub, segments, 16, op.pc)
        lanes.m.counts.access(op.pc, sub, segments, at, 16, False)
        rows = values.view(np.uint8).reshape(-1, count, 8, 16)
        registers = matrix.ldmatrix(rows, trans)
        for i, put in enumerate(puts):
            put(lanes, lanes.from_warps(registers[:, i]))

    return aligned(op, body)


@instruction("stmatrix.sync.aligned", control=True)
def stmatrix(op):
    count, trans = _matrices(op), op.has("trans")
    address = op.address(0)
    sources = [op.reader(e, "b32") for e in op.elements(1)]
    if len(sources) != count:
        op.fail(f"stores {count} matrices from {len(sources)} registers")

    def body(lanes):
        if not lanes.whole:
            return
        registers = np.stack([lanes.by_warp(s(lanes)) for s in sources], axis=1)
        rows = (
            np.ascontiguousarray(matrix.stmatrix(registers, trans)).view(np.uint64).reshape(-1, 2)
        )
        at = lanes.full(address(lanes))
        users = (lanes.idx & 31) < 8 * count
        sub, at = (lanes, at) if count == 4 else (lanes.where(users), at[users])
        segments = memory.store(sub, "shared", at, rows, op.pc)
        lanes.m.shadow.write(sub, segments, 16, op.pc, rows)
        lanes.m.counts.access(op.pc, sub, segments, at, 16, True)

    return aligned(op, body)


# ---- cluster addresses -----------------------------------------------------------------------
@instruction("mapa")
def mapa(op):
    """Address of a shared variable in block `rank` of the cluster: rank + 1 in bits 24-31."""
    kind = op.kind
    generic = "shared::cluster" not in op.mods

    def run(a, rank):
        rank = rank.astype(a.dtype)
        out = (a & a.dtype.type(0xFFFFFF)) | ((rank + a.dtype.type(1)) << a.dtype.type(24))
        return (
            out | a.dtype.type(TAG_SHARED << TAG_SHIFT)
            if generic and a.dtype.itemsize == 8
            else out
        )

    return elementwise(op, run, (kind, "u32"), kind)


@instruction("getctarank")
def getctarank(op):
    kind = op.kind
    a, put = op.src(1, kind), op.dst(0, "u32")

    def run(lanes):
        rank = (a(lanes) >> 24).astype(np.int64) & 0xFF
        put(lanes, np.where(rank > 0, rank - 1, lanes.m.rank[lanes.sel]).astype(np.uint32))

    return run
