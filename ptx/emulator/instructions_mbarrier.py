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


def _asked_before(m, pc, barrier, lanes):
    """The threads that this instruction already told "not yet" in this phase, or None."""
    asked = m.queue.mbarriers.asked
    now = pc << 24 | barrier.phase & 0xFFFFFF
    again = asked[lanes.sel] == now
    asked[lanes.sel] = now
    if not again.any():
        return None
    return lanes if again.all() else lanes.where(again)


@instruction("mbarrier.try_wait", "mbarrier.test_wait", control=True)
def wait(op):
    """try_wait returns false once per phase that is not complete, so a wait without a loop shows;
    asked again, it parks its threads until the phase completes, a legal length of its suspension.
    """
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
        if not blocked:
            put(lanes, passed)
            return [(op.pc + 1, lanes)]
        staying = np.ones(lanes.n, bool)
        for barrier, held in blocked:
            stuck = _asked_before(m, op.pc, barrier, held)
            if stuck is not None:
                m.counts.parked(op.pc, stuck)
                barrier.waiting.append((op.pc, stuck))
                staying[np.searchsorted(lanes.idx, stuck.idx)] = False
        if not staying.any():
            return []
        free = lanes if staying.all() else lanes.where(staying)
        put(free, passed[staying])
        return [(op.pc + 1, free)]

    return run


@instruction("mbarrier.pending_count")
def pending_count(op):
    """Arrivals that were pending before the arrive that returned the state."""
    state, put = op.src(1, "b64"), op.dst(0, "b32")
    return lambda lanes: put(lanes, (state(lanes) >> np.uint64(32)).astype(np.uint32))
