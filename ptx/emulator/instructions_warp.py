"""Table: instructions that exchange values between the lanes of a warp."""

import numpy as np

from mirage_hello.ptx.emulator import integer, matrix
from mirage_hello.ptx.emulator.operands import Const
from mirage_hello.ptx.emulator.table import instruction


def converging(op, mask, body):
    """run: hold threads until all lanes of the membermask are here, then body(lanes)."""

    def masks(lanes):
        return lanes.full(mask(lanes))

    def run(lanes):
        lanes = lanes.m.gather(op, lanes, masks)
        if lanes is None:
            return []
        body(lanes)
        return [(op.pc + 1, lanes)]

    return run


def aligned(op, body, group=32):
    """run: hold threads until the whole warp (or warpgroup) is here, then body(lanes)."""

    def run(lanes):
        lanes = lanes.m.gather(op, lanes, group=group, strict=True)
        if lanes is None:
            return []
        out = body(lanes)
        return [(op.pc + 1, lanes)] if out is None else out

    return run


_LANE = np.arange(32, dtype=np.int64)


def _source_lanes(mode, b, c):
    """(source lane, source is in range) per [warps][32], by the formulas of the PTX ISA."""
    bound, segment = c & 31, (c >> 8) & 31
    top = (_LANE & segment) | (bound & ~segment)
    low = _LANE & segment
    b = b & 31
    if mode == "up":
        j = _LANE - b
        inside = j >= top
    elif mode == "down":
        j = _LANE + b
        inside = j <= top
    elif mode == "bfly":
        j = _LANE ^ b
        inside = j <= top
    else:
        j = low | (b & ~segment)
        inside = j <= top
    return np.where(inside, j, _LANE), inside


@instruction("shfl.sync", control=True)
def shfl(op):
    mode = op.mods[0]
    first, second = op.pair(0)
    a, b, c, mask = op.src(1, "b32"), op.src(2, "u32"), op.src(3, "u32"), op.src(4, "b32")
    put = op.writer(first, "b32")
    put_inside = op.writer(second, "pred") if second is not None else None

    def body(lanes):
        values = lanes.by_warp(a(lanes))
        shape = values.shape
        amount, control = (lanes.by_warp(x(lanes)).astype(np.int64) for x in (b, c))
        source, inside = _source_lanes(mode, amount, control)
        source = np.broadcast_to(source, shape)
        if not lanes.whole:
            _check_active(op, lanes, source)
        put(lanes, lanes.from_warps(np.take_along_axis(values, source, axis=1)))
        if put_inside:
            put_inside(lanes, lanes.from_warps(np.broadcast_to(inside, shape)))

    return converging(op, mask, body)


def _check_active(op, lanes, source):
    present = lanes.present()[:, None]
    absent = (present >> source.astype(np.uint32)) & 1 == 0
    mine = lanes.from_warps(absent)
    if mine.any():
        at = int(np.argmax(mine))
        lanes.m.findings.add(
            "shuffle-inactive", op.pc, lanes.thread(at), None,
            "the source lane does not execute this shfl.sync", int(mine.sum()),
        )  # fmt: skip


def ballot(lanes, predicate):
    """uint32 per warp: bit i set where lane i is here and its predicate is true."""
    bits = np.zeros((len(lanes.warps), 32), np.uint64)
    slot = np.searchsorted(lanes.warps, lanes.idx >> 5)
    bits[slot, lanes.idx & 31] = lanes.full(predicate)
    return (bits << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)


def per_lane(lanes, per_warp):
    return per_warp[np.searchsorted(lanes.warps, lanes.idx >> 5)]


@instruction("vote.sync", control=True)
def vote(op):
    mode = op.mods[0]
    p, mask = op.src(1, "pred"), op.src(2, "b32")
    put = op.dst(0, "b32" if mode == "ballot" else "pred")

    def body(lanes):
        members = lanes.full(mask(lanes))
        true = per_lane(lanes, ballot(lanes, p(lanes))) & members
        here = per_lane(lanes, lanes.present()) & members
        answers = {
            "ballot": lambda: true,
            "any": lambda: true != 0,
            "all": lambda: true == here,
            "uni": lambda: (true == here) | (true == 0),
        }
        put(lanes, answers[mode]())

    return converging(op, mask, body)


@instruction("match.any.sync", "match.all.sync", control=True)
def match(op):
    everyone = op.base == "match.all.sync"
    kind = op.kind
    first, second = op.pair(0)
    a, mask, put = op.src(1, kind), op.src(2, "b32"), op.writer(first, "b32")
    put_all = op.writer(second, "pred") if second is not None else None

    def body(lanes):
        values = lanes.by_warp(a(lanes))
        members = lanes.by_warp(mask(lanes)) & lanes.present()[:, None]
        active = (members >> _LANE.astype(np.uint32)) & 1
        same = (values[:, :, None] == values[:, None, :]) & (active[:, None, :] == 1)
        found = (same * (np.uint64(1) << _LANE.astype(np.uint64))).sum(axis=2).astype(np.uint32)
        if everyone:
            whole = found == members
            found = np.where(whole, members, 0).astype(np.uint32)
            if put_all:
                put_all(lanes, lanes.from_warps(whole))
        put(lanes, lanes.from_warps(found))

    return converging(op, mask, body)


@instruction("redux.sync", control=True)
def redux(op):
    kind, name = op.kind, op.mods[0]
    a, mask, put = op.src(1, kind), op.src(2, "b32"), op.dst(0, kind)
    ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }.get(name)  # fmt: skip
    if ufunc is None or kind.startswith("f"):
        op.fail("knows add, min, max on s32/u32 and and, or, xor on b32")

    def body(lanes):
        slot = np.searchsorted(lanes.warps, lanes.idx >> 5)
        first = np.flatnonzero(np.r_[True, slot[1:] != slot[:-1]])
        values = integer.signed(kind, lanes.full(a(lanes)))
        total = ufunc.reduceat(values, first, dtype=values.dtype)
        put(lanes, np.ascontiguousarray(total[slot]).view(np.uint32))

    return converging(op, mask, body)


@instruction("activemask")
def activemask(op):
    put = op.dst(0, "b32")
    return lambda lanes: put(lanes, per_lane(lanes, lanes.present()))


@instruction("elect.sync", control=True)
def elect(op):
    """elect.sync d|p, membermask: the lowest lane of the mask is the leader."""
    first, second = op.pair(0)
    mask = op.src(1, "b32")
    put, put_leader = op.writer(first, "b32"), op.writer(second, "pred")

    def body(lanes):
        members = lanes.full(mask(lanes)) & per_lane(lanes, lanes.present())
        leader = np.log2((members & (~members + np.uint32(1))).astype(np.float64)).astype(np.uint32)
        put(lanes, leader)
        put_leader(lanes, (lanes.idx & 31) == leader)

    return converging(op, mask, body)


@instruction("movmatrix.sync.aligned", control=True)
def movmatrix(op):
    a, put = op.src(1, "b32"), op.dst(0, "b32")

    def body(lanes):
        out = matrix.movmatrix(lanes.by_warp(a(lanes)))
        put(lanes, lanes.from_warps(out))

    return aligned(op, body)


@instruction("mma.sync.aligned", control=True)
def mma(op):
    """mma.sync.aligned.m16n8kK.row.col{.satfinite}.d.a.b.c"""
    shape = op.mods[0]
    if not op.has("row") or not op.has("col") or op.has("sp"):
        op.unsupported("is not supported; extend instructions_warp.py (dense .row.col forms are)")
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    kinds, satfinite = tuple(op.types), op.has("satfinite")
    if len(kinds) != 4:
        op.fail("needs the four types of d, a, b and c")
    readers = [[op.reader(e, "b32") for e in op.elements(i)] for i in (1, 2, 3)]
    puts = [op.writer(e, "b32") for e in op.elements(0)]
    op.flops = 2 * m * n * k

    def body(lanes):
        parts = [np.stack([lanes.by_warp(r(lanes)) for r in rs], axis=1) for rs in readers]
        d = matrix.mma((m, n, k), kinds, *parts, satfinite)
        for i, put in enumerate(puts):
            put(lanes, lanes.from_warps(d[:, i]))
        lanes.m.counts.add_flops(op.pc, op.flops * len(lanes.warps))

    return aligned(op, body)


def constant(op, i):
    operand = op.operands[i]
    if not isinstance(operand, Const):
        op.fail(f"operand {i} must be a constant")
    return int(operand.value)
