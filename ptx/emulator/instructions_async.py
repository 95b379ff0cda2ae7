"""Table: cp.async and its groups, st.async and red.async."""

import numpy as np

from mirage_hello.ptx.emulator import memory
from mirage_hello.ptx.emulator.instructions_memory import ATOMICS, combiner, update, vector_count
from mirage_hello.ptx.emulator.instructions_warp import constant
from mirage_hello.ptx.emulator.table import instruction, kind_bits


# ---- cp.async --------------------------------------------------------------------------------
@instruction("cp.async.ca.shared.global", "cp.async.cg.shared.global",
             "cp.async.ca.shared::cta.global", "cp.async.cg.shared::cta.global")  # fmt: skip
def copy_thread(op):
    """cp.async [shared], [global], bytes{, source bytes}: the rest is filled with zeros."""
    nbytes = constant(op, 2)
    if nbytes not in (4, 8, 16) or ("cg" in op.base.split(".") and nbytes != 16):
        op.fail(f"copies 4, 8 or 16 bytes (.cg: 16), not {nbytes}")
    to, source = op.address(0), op.address(1)
    hint = op.has("L2::cache_hint")
    given = op.src(3, "u32") if len(op.operands) > 3 + hint else None
    pc = op.pc

    def run(lanes):
        m = lanes.m
        at, src = lanes.full(to(lanes)), lanes.full(source(lanes))
        size = lanes.full(nbytes if given is None else given(lanes).astype(np.int64))
        targets = memory.resolve(lanes, "shared", at, nbytes, pc, write=True)
        fetch = _fetcher(lanes, src, np.minimum(size, nbytes), nbytes, pc)
        flat = _flat_offsets(lanes, targets)

        def perform(positions):
            good = positions[flat[positions] >= 0]
            m.shared.scatter(flat[good], fetch(good))

        time = m.queue.submit_copies(lanes, perform)
        m.counts.access(pc, lanes, targets, at, nbytes, True)
        m.counts.global_bytes(pc, lanes, src, nbytes, False)
        if m.shadow.on:
            _shadow_copies(m, lanes, flat, nbytes, time, pc)

    return run


def _fetcher(lanes, src, size, nbytes, pc):
    """positions -> rows [n][words] of the source, read when called; checked now."""
    out = np.zeros((lanes.n, nbytes), np.uint8)
    whole = np.flatnonzero(size == nbytes)
    segments = []
    if len(whole):
        sub = lanes if len(whole) == lanes.n else lanes.take(whole)
        for s in memory.resolve(sub, "global", src[whole], nbytes, pc):
            places = whole if s.positions is None else whole[s.positions]
            segments.append((s, places))
    for p in np.flatnonzero((size > 0) & (size < nbytes)):
        sub = lanes.take(np.array([p]))
        places = src[p] + np.arange(size[p])
        for s in memory.resolve(sub, "global", places, 1, pc):
            out[p, : len(s.offsets)] = s.buffer.gather(s.offsets, 1, 1)[:, 0]
    size_word = min(nbytes, 8)

    def fetch(positions):
        for s, places in segments:
            rows = s.buffer.gather(s.offsets, size_word, nbytes // size_word)
            out[places] = np.ascontiguousarray(rows).view(np.uint8).reshape(len(places), nbytes)
        return out[positions].view(f"<u{size_word}")

    return fetch


def _shadow_copies(m, lanes, flat, nbytes, time, pc):
    """Per warp, the words it fills become writes of the warp's cp.async engine."""
    for warp in lanes.warps:
        at = np.flatnonzero(((lanes.idx >> 5) == warp) & (flat >= 0))
        if len(at):
            words = m.shadow.words_of(flat[at], nbytes)
            agent = m.shadow.copy_base + int(m.shadow.warp_local[warp])
            m.shadow.async_write(int(lanes.idx[at[0]]), words, agent, int(time[at[0]]), pc)
            m.shadow.copied_by(lanes.idx[at], flat[at], nbytes)


@instruction("cp.async.commit_group")
def commit(op):
    return lambda lanes: lanes.m.queue.commit_copies(lanes)


@instruction("cp.async.wait_group")
def wait(op):
    keep = constant(op, 0)
    return lambda lanes: lanes.m.queue.wait_copies(lanes, keep)


@instruction("cp.async.wait_all")
def wait_all(op):
    return lambda lanes: lanes.m.queue.flush_copies(lanes)


@instruction("cp.async.mbarrier.arrive", control=True)
def arrive_on_copies(op):
    """The mbarrier gets this thread's arrival once all its earlier cp.async have landed."""
    address, noinc = op.address(0), op.has("noinc")

    def run(lanes):
        queue, at = lanes.m.queue, lanes.full(address(lanes))
        barriers = queue.mbarriers
        if not noinc:
            for barrier, part, _ in barriers.groups(lanes, at, op.pc):
                barrier.pending += part.n

        def perform():
            queue.flush_copies(lanes)
            one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
            barriers.arrive(lanes, at, one, none, op.pc)

        queue.submit(perform)
        return [(op.pc + 1, lanes)]

    return run


# ---- stores that complete on a peer's mbarrier ---------------------------------------------------
@instruction("st.async", "red.async", control=True)
def remote_store(op):
    """st.async, red.async [shared::cluster], values, [mbar]: completes on the peer's mbarrier."""
    size, count = kind_bits(op.kind) // 8, vector_count(op)
    to, bar, pc = op.address(0), op.address(2), op.pc
    sources = [op.reader(e, op.kind) for e in op.elements(1)]
    name = next((m for m in op.mods if m in ATOMICS), None)
    combine = combiner(op, name, op.kind) if op.base == "red.async" else None
    total, dtype = size * count, np.dtype(f"u{size}")

    def run(lanes):
        m, at = lanes.m, lanes.full(to(lanes))
        values = np.stack([lanes.full(s(lanes)) for s in sources], axis=1).astype(dtype)
        segments = memory.resolve(lanes, "shared", at, total, pc, write=True)
        due = list(m.queue.mbarriers.groups(lanes, lanes.full(bar(lanes)), pc))
        flat = _flat_offsets(lanes, segments)
        for barrier, part, positions in due:
            m.queue.mbarriers.join(barrier, part)
            if m.shadow.on:
                mine = flat if positions is None else flat[positions]
                _shadow_stores(part, mine, total, barrier, pc)

        def perform():
            for s in segments:
                mine = values if s.positions is None else values[s.positions]
                if combine:
                    update(s, mine, None, combine, size, count)
                else:
                    s.buffer.scatter(s.offsets, mine)
            for barrier, part, _ in due:
                m.queue.mbarriers.complete_tx(barrier, part.n * total)

        m.queue.submit(perform)
        return [(pc + 1, lanes)]

    return run


def _flat_offsets(lanes, segments):
    """Flat shared offset per thread, -1 where the access was illegal."""
    flat = np.full(lanes.n, -1, np.int64)
    for s in segments:
        flat[slice(None) if s.positions is None else s.positions] = s.offsets
    return flat


def _shadow_stores(lanes, flat, total, barrier, pc):
    for warp in lanes.warps:
        at = np.flatnonzero(((lanes.idx >> 5) == warp) & (flat >= 0))
        if not len(at):
            continue
        words = lanes.m.shadow.words_of(flat[at], total)
        thread = int(lanes.idx[at[0]])
        lanes.m.shadow.async_write(thread, words, barrier.agent, barrier.time + 1, pc)
