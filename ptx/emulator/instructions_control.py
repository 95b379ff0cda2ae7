"""Table: branches, exits and the block and cluster barriers."""

import numpy as np

from mirage_hello.ptx.emulator.operands import Const
from mirage_hello.ptx.emulator.table import instruction


@instruction("bra", control=True)
def bra(op):
    target = op.target(len(op.operands) - 1)
    if target != op.pc:
        return lambda lanes: [(target, lanes)]

    def itself(lanes):
        text = "a branch to itself never ends: nothing in the loop can change its guard"
        lanes.m.findings.add("deadlock", op.pc, lanes.thread(0), None, text, lanes.n)
        return lanes.m.exit(lanes, op.pc)

    return itself


@instruction("ret", "exit", control=True)
def leave(op):
    return lambda lanes: lanes.m.exit(lanes, op.pc)


@instruction("trap", control=True)
def trap(op):
    def run(lanes):
        lanes.m.findings.add("deadlock", op.pc, lanes.thread(0), None, "trap executed", lanes.n)
        return lanes.m.exit(lanes, op.pc)

    return run


@instruction("brkpt", "nanosleep", "pmevent", "griddepcontrol.launch_dependents", "prefetch",
             "prefetchu", "discard", "applypriority", "fence.acq_rel", "fence.sc", "fence",
             "membar", "fence.proxy.tensormap::generic", "fence.proxy.alias")  # fmt: skip
def nothing(op):
    """No effect on values here: the emulator's memory is sequentially consistent, and what a
    missing fence would break is found by the race detector instead."""
    return lambda lanes: None


@instruction("griddepcontrol.wait")
def grid_dependency_wait(op):
    return lambda lanes: lanes.m.dependency.wait(lanes)


@instruction("createpolicy")
def createpolicy(op):
    put = op.dst(0, "b64")
    return lambda lanes: put(lanes, np.uint64(0x12F0000000000000))


@instruction("setmaxnreg", control=True)
def setmaxnreg(op):
    """Warpgroup-wide; without effect where the registers at entry are unknown, as for ptxas."""
    value = int(op.operands[0].value)
    if value % 8 or not 24 <= value <= 256:
        op.fail(f"takes a multiple of 8 in 24..256 (got {value})")
    if op.has("inc") == op.has("dec"):
        op.fail("is .inc or .dec")

    def run(lanes):
        m = lanes.m
        lanes = m.gather(op, lanes, group=m.registers.unit)
        if lanes is None:
            return []
        if m.registers.entry is not None:
            if op.has("inc"):
                m.registers.increase(lanes, value, op.pc)
                return []
            m.registers.decrease(lanes, value)
        return [(op.pc + 1, lanes)]

    return run


def _threads(lanes, value):
    return None if value is None else lanes.full(value(lanes)).astype(np.int64)


def _by_number(op, lanes, number, go):
    """Call go(barrier number, lanes, positions) for each distinct barrier number."""
    numbers = lanes.full(number(lanes))
    if (numbers == numbers[0]).all():
        return go(int(numbers[0]), lanes, slice(None))
    out = []
    for n in np.unique(numbers):
        at = np.flatnonzero(numbers == n)
        out += go(int(n), lanes.take(at), at)
    return out


@instruction("bar.sync", "bar.arrive", "bar.cta.sync", "bar.cta.arrive", "barrier.sync",
             "barrier.arrive", "barrier.cta.sync", "barrier.cta.arrive", control=True)  # fmt: skip
def barrier(op):
    aligned = op.opcode.startswith("bar.") or op.has("aligned")
    waits = "sync" in op.base
    number = op.src(0, "u32")
    count = op.src(1, "u32") if len(op.operands) > 1 else None
    if not waits and count is None:
        op.fail("needs a thread count")
    if isinstance(op.operands[0], Const) and not 0 <= op.operands[0].value < 16:
        op.fail(f"has barriers 0 to 15 (got {op.operands[0].value})")

    def run(lanes):
        m = lanes.m
        if aligned:
            lanes = m.gather(op, lanes)
            if lanes is None:
                return []
        due = _threads(lanes, count)

        def go(n, part, at):
            return m.barriers.arrive(op.pc, part, n, None if due is None else due[at], waits)

        return _by_number(op, lanes, number, go)

    return run


@instruction("bar.red", "bar.cta.red", "barrier.red", "barrier.cta.red", control=True)
def barrier_reduction(op):
    aligned = op.opcode.startswith("bar.") or op.has("aligned")
    how = next(m for m in op.mods if m in ("popc", "and", "or"))
    put = op.dst(0, "u32" if how == "popc" else "pred")
    number, vote = op.src(1, "u32"), op.src(len(op.operands) - 1, "pred")
    count = op.src(2, "u32") if len(op.operands) > 3 else None

    def deliver(lanes, true, votes):
        answer = {"popc": true.astype(np.uint32), "and": true == votes, "or": true > 0}[how]
        put(lanes, answer)

    def run(lanes):
        m = lanes.m
        if aligned:
            lanes = m.gather(op, lanes)
            if lanes is None:
                return []
        due, votes = _threads(lanes, count), lanes.full(vote(lanes))

        def go(n, part, at):
            mine = None if due is None else due[at]
            return m.barriers.arrive(op.pc, part, n, mine, True, votes[at], deliver)

        return _by_number(op, lanes, number, go)

    return run


@instruction("barrier.cluster.arrive", control=True)
def cluster_arrive(op):
    def run(lanes):
        if op.has("aligned"):
            lanes = lanes.m.gather(op, lanes)
            if lanes is None:
                return []
        lanes.m.barriers.cluster_arrive(lanes)
        return [(op.pc + 1, lanes)]

    return run


@instruction("barrier.cluster.wait", control=True)
def cluster_wait(op):
    def run(lanes):
        if op.has("aligned"):
            lanes = lanes.m.gather(op, lanes)
            if lanes is None:
                return []
        return lanes.m.barriers.cluster_wait(op.pc, lanes)

    return run


@instruction("bar.warp.sync", control=True)
def warp_sync(op):
    mask = op.src(0, "b32")

    def masks(lanes):
        return lanes.full(mask(lanes))

    def run(lanes):
        m = lanes.m
        lanes = m.gather(op, lanes, masks)
        if lanes is None:
            return []
        m.shadow.tick(lanes.warps)
        return [(op.pc + 1, lanes)]

    return run


@instruction("fence.mbarrier_init")
def init_fence(op):
    return lambda lanes: lanes.m.shadow.init_fence(lanes)


@instruction("fence.proxy.async")
def proxy_fence(op):
    return lambda lanes: lanes.m.shadow.proxy_fence(lanes)
