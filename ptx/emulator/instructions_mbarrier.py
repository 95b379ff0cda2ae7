"""Table: mbarrier objects (state in mbarriers.py)."""

import numpy as np

from mirage_hello.ptx.emulator.table import instruction


@instruction("mbarrier.init")
def init(op):
    address, count = op.address(0), op.src(1, "u32")

    def run(lanes):
        at = lanes.full(address(lanes))
        lanes.m.queue.mbarriers.init(lanes, at, count(lanes), op.pc)

    return run


@instruction("mbarrier.inval")
def inval(op):
    address = op.address(0)

    def run(lanes):
        barriers = lanes.m.queue.mbarriers
        for barrier, _, _ in list(barriers.groups(lanes, lanes.full(address(lanes)), op.pc)):
            barriers.table.pop((barrier.block, barrier.address), None)

    return run


@instruction("mbarrier.arrive", "mbarrier.arrive_drop", control=True)
def arrive(op):
    """mbarrier.arrive{.expect_tx} state|_, [a]{, count | tx}"""
    drop = op.base.endswith("drop")
    expect = op.has("expect_tx")
    put = op.dst(0, "b64")
    address = op.address(1)
    value = op.src(2, "u32") if len(op.operands) > 2 else None
    release = not op.has("relaxed")

    def run(lanes):
        at, one = lanes.full(address(lanes)), np.ones(1, np.int64)
        given = one if value is None else value(lanes).astype(np.int64)
        counts, tx = (one, given) if expect else (given, np.zeros(1, np.int64))
        barriers = lanes.m.queue.mbarriers
        if drop:
            for barrier, part, _ in list(barriers.groups(lanes, at, op.pc)):
                barrier.count -= part.n
        put(lanes, barriers.arrive(lanes, at, counts, tx, op.pc, release))
        return [(op.pc + 1, lanes)]

    return run


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx", control=True)
def expect_tx(op):
    address, value = op.address(0), op.src(1, "u32")
    sign = 1 if "expect" in op.base else -1

    def run(lanes):
        tx = sign * value(lanes).astype(np.int64)
        at = lanes.full(address(lanes))
        lanes.m.queue.mbarriers.arrive(lanes, at, np.zeros(1, np.int64), tx, op.pc, release=False)
        return [(op.pc + 1, lanes)]

    return run


@instruction("mbarrier.try_wait", "mbarrier.test_wait", control=True)
def wait(op):
    """try_wait parks the threads whose phase is not complete: that is a legal duration of its
    suspension, and a kernel that needs it to return false would hang on the hardware too."""
    parity, suspends = op.has("parity"), op.base.endswith("try_wait")
    put, address = op.dst(0, "pred"), op.address(1)
    expected = op.src(2, "u32" if parity else "b64")

    def run(lanes):
        m = lanes.m
        at = lanes.full(address(lanes))
        want = expected(lanes).astype(np.int64) & 0xFFFFFFFF
        passed, blocked = m.queue.mbarriers.test(lanes, at, want, parity, op.pc)
        if not suspends:
            put(lanes, passed)
            return [(op.pc + 1, lanes)]
        for barrier, held in blocked:
            m.counts.parked(op.pc, held)
            barrier.waiting.append((op.pc, held))
        if not passed.any():
            return []
        free = lanes if passed.all() else lanes.where(passed)
        put(free, np.ones(free.n, bool))
        return [(op.pc + 1, free)]

    return run


@instruction("mbarrier.pending_count")
def pending_count(op):
    """Arrivals that were pending before the arrive that returned the state."""
    state, put = op.src(1, "b64"), op.dst(0, "b32")
    return lambda lanes: put(lanes, (state(lanes) >> np.uint64(32)).astype(np.uint32))
