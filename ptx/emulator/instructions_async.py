"""Table: cp.async, cp.async.bulk, tensor-map copies and reductions, their groups."""

import numpy as np

from mirage_hello.ptx.emulator import memory, tensor_map
from mirage_hello.ptx.emulator.asynchronous import BulkCopy
from mirage_hello.ptx.emulator.formats import register_dtype
from mirage_hello.ptx.emulator.instructions_memory import ATOMICS, combiner, update, vector_count
from mirage_hello.ptx.emulator.instructions_warp import constant
from mirage_hello.ptx.emulator.operands import (
    SHARED_BASE,
    TAG_PARAM,
    TAG_SHARED,
    TAG_SHIFT,
    List,
    TensorPlace,
)
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


# ---- bulk groups -----------------------------------------------------------------------------
@instruction("cp.async.bulk.commit_group")
def bulk_commit(op):
    return lambda lanes: lanes.m.queue.commit_bulk(lanes)


@instruction("cp.async.bulk.wait_group")
def bulk_wait(op):
    keep = constant(op, 0)
    return lambda lanes: lanes.m.queue.wait_bulk(lanes, keep)


@instruction("cp.async.bulk.prefetch")
def bulk_prefetch(op):
    return lambda lanes: None


# ---- one transfer: shared bytes on one side, global or remote shared on the other ---------------
class Issue:
    """What every bulk copy needs: the issuing thread, its block, shared bytes and checks."""

    def __init__(self, lanes, position, pc):
        self.lanes, self.m, self.pc = lanes, lanes.m, pc
        self.thread = lanes.thread(position)
        self.one = lanes.take(np.array([position]))
        self.block = int(self.m.block[self.thread])

    def flat(self, address, nbytes, align=16):
        """Flat shared offset of a range in this block or, mapped, in a peer; None if illegal."""
        offsets, inside, _ = memory.shared_offsets(self.one, np.array([address], dtype=np.int64))
        start = int(inside[0])
        if start < SHARED_BASE or start + nbytes > self.m.shared_end:
            self.m.findings.add(
                "out-of-bounds", self.pc, self.thread, int(address),
                f"copy of {nbytes} bytes at byte {start - SHARED_BASE} of a block that has "
                f"{self.m.shared_end - SHARED_BASE} bytes of shared memory",
            )  # fmt: skip
            return None
        if start % align:
            self.m.findings.add(
                "misaligned", self.pc, self.thread, int(address),
                f"the shared address of the copy must be a multiple of {align}",
            )  # fmt: skip
            return None
        return int(offsets[0])

    def global_range(self, address, nbytes):
        """(buffer, offset) of a global range; None (with a finding) when it leaves its tensor."""
        buffer = self.m.launch.memory.buffers.get(address >> TAG_SHIFT)
        offset = address & memory.OFFSET_MASK
        if buffer is None or offset + nbytes > buffer.nbytes or address % 16:
            what = "no allocation" if buffer is None else f"{buffer.label} ({buffer.nbytes} bytes)"
            kind = "misaligned" if buffer is not None and address % 16 else "out-of-bounds"
            self.m.findings.add(
                kind, self.pc, self.thread, address,
                f"bulk copy of {nbytes} bytes at byte {offset} of {what}; 16-byte alignment needed",
            )  # fmt: skip
            return None
        return buffer, offset

    def mbarrier(self, address):
        groups = self.m.queue.mbarriers.groups(self.one, np.array([address]), self.pc)
        return next((b for b, _, _ in groups), None)

    def shadow_write(self, words, barrier):
        self.m.shadow.async_write(self.thread, words, barrier.agent, barrier.time + 1, self.pc)
        if self.m.shadow.on:
            self.m.queue.mbarriers.join_row(
                barrier, self.m.shadow.snapshot(np.array([self.thread >> 5]))[0]
            )

    def shadow_read(self, words, time):
        shadow = self.m.shadow
        agent = shadow.bulk_base + int(self.m.warp_in_cluster[self.thread])
        shadow.async_read(self.thread, words, agent, time, self.pc)

    def submit_load(self, barrier, nbytes, move):
        barriers = self.m.queue.mbarriers

        def perform():
            move()
            barriers.complete_tx(barrier, nbytes)

        self.m.queue.submit(perform)

    def submit_store(self, time, move):
        self.m.queue.submit_bulk(BulkCopy(self.thread, self.pc, time, move))


def _scalars(lanes, position, *readers):
    return [int(lanes.full(r(lanes))[position]) for r in readers]


def per_thread(op, body):
    """run: a copy instruction is executed thread by thread (one elected thread, normally)."""

    def run(lanes):
        for position in range(lanes.n):
            body(lanes, position)
        return [(op.pc + 1, lanes)]

    return run


def _shared_address(value):
    return value & memory.OFFSET_MASK if value >> TAG_SHIFT == TAG_SHARED else value


@instruction("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
             "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes",
             "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes",
             control=True)  # fmt: skip
def bulk_load(op):
    """cp.async.bulk [dst shared], [src], bytes, [mbar]{, multicast mask}{, policy}"""
    to, source, size, bar = op.address(0), op.address(1), op.src(2, "u32"), op.address(3)
    mask = op.src(4, "u16") if op.has("multicast::cluster") else None
    remote = op.base.split(".")[4] == "shared::cta"  # from this block's shared memory to a peer's
    pc = op.pc

    def body(lanes, position):
        dst, src, nbytes, barrier = _scalars(lanes, position, to, source, size, bar)
        issue = Issue(lanes, position, pc)
        targets = [(dst, barrier)]
        if mask is not None:
            targets = _multicast(lanes, position, dst, barrier, mask)
        m = lanes.m
        found = None if remote else issue.global_range(src, nbytes)
        start = issue.flat(src, nbytes) if remote else None
        if found is None and start is None:
            return
        m.counts.bulk(pc, nbytes)
        for where, bar_address in targets:
            flat, object_ = issue.flat(where, nbytes), issue.mbarrier(bar_address)
            if flat is None or object_ is None:
                continue
            if m.shadow.on:
                words = m.shadow.words_of([flat], nbytes)
                if remote:
                    words = words[_read_peer_copy(issue, start, nbytes, object_)]
                issue.shadow_write(words, object_)
            buffer, offset = (m.shared, start) if remote else found

            def move(flat=flat, buffer=buffer, offset=offset):
                m.shared.data[flat : flat + nbytes] = buffer.data[offset : offset + nbytes]

            issue.submit_load(object_, nbytes, move)

    return per_thread(op, body)


def _read_peer_copy(issue, start, nbytes, barrier):
    """Race checks of the source; returns which of its words hold data.  Padding that nobody wrote
    may travel along: it stays uninitialised at the destination."""
    shadow = issue.m.shadow
    words = shadow.words_of([start], nbytes)
    written = shadow.written(words)
    shadow.async_read(issue.thread, words[written], barrier.agent, barrier.time + 1, issue.pc)
    return written


def _multicast(lanes, position, dst, barrier, mask):
    """(destination, mbarrier) in each block of the mask, at the same offsets."""
    bits = int(lanes.full(mask(lanes))[position])
    ranks = [r for r in range(16) if bits >> r & 1]
    return [((r + 1) << 24 | dst & 0xFFFFFF, (r + 1) << 24 | barrier & 0xFFFFFF) for r in ranks]


@instruction("cp.async.bulk.global.shared::cta.bulk_group", "cp.reduce.async.bulk.global.shared::cta",
             control=True)  # fmt: skip
def bulk_store(op):
    """cp.async.bulk / cp.reduce.async.bulk [global], [shared], bytes"""
    to, source, size = op.address(0), op.address(1), op.src(2, "u32")
    reduction = _reduction(op)
    pc = op.pc

    def body(lanes, position):
        dst, src, nbytes = _scalars(lanes, position, to, source, size)
        issue = Issue(lanes, position, pc)
        found, flat = issue.global_range(dst, nbytes), issue.flat(src, nbytes)
        if found is None or flat is None:
            return
        m, (buffer, offset) = lanes.m, found
        m.counts.bulk(pc, nbytes)
        time = m.queue.next_bulk_time(issue.thread)
        if m.shadow.on:
            issue.shadow_read(m.shadow.words_of([flat], nbytes), time)

        def move():
            new = m.shared.data[flat : flat + nbytes]
            old = buffer.data[offset : offset + nbytes]
            old[:] = new if reduction is None else reduction(old, new)

        issue.submit_store(time, move)

    return per_thread(op, body)


def _reduction(op):
    """function (old bytes, new bytes) -> bytes for cp.reduce, None for a plain copy."""
    if not op.opcode.startswith("cp.reduce"):
        return None
    names = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
    name, kind = next(x for x in op.mods if x in names), op.kind
    dtype = register_dtype(kind)

    def run(old, new):
        out = tensor_map.reduce(name, kind, old.copy().view(dtype), new.copy().view(dtype))
        return np.ascontiguousarray(out).view(np.uint8)

    return run


@instruction("st.async", "red.async", control=True)
def remote_store(op):
    """st.async / red.async [shared::cluster], value(s), [mbar]: completes on the peer's mbarrier."""
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


# ---- tensor maps -----------------------------------------------------------------------------
def _find_map(issue, place_address):
    """The TensorMap object behind a map operand, with the tensor's virtual base address."""
    launch = issue.m.launch
    found = None
    if place_address >> TAG_SHIFT == TAG_PARAM:
        found = launch.maps.get(place_address & memory.OFFSET_MASK)
    if found is None:
        hint = ""
        if place_address < 4096:
            hint = "; it is an offset in parameter space: cvta.param.u64 is missing"
        issue.m.findings.add(
            "tensor-map",
            issue.pc,
            issue.thread,
            place_address,
            f"no tensor map at this address{hint}",
        )
    return found


class TensorCopy:
    """Operands of one cp.async.bulk.tensor instruction, decoded."""

    def __init__(self, op, tensor, shared):
        place = op.operands[tensor]
        if not isinstance(place, TensorPlace):
            op.fail("needs [map, {coordinates}]")
        self.op, self.pc = op, op.pc
        self.map = op.place(place.map)
        self.coordinates = [op.reader(c, "b32") for c in place.coordinates]
        self.shared = op.address(shared)
        offsets = next((o for o in op.operands if isinstance(o, List)), None)
        self.offsets = [op.reader(c, "b16") for c in offsets.elements] if offsets else []

    def transfer(self, issue, position, shared_address):
        """tensor_map.Transfer against virtual addresses, or None with a finding."""
        lanes = issue.lanes
        (where,) = _scalars(lanes, position, self.map)
        found = _find_map(issue, where)
        if found is None:
            return None
        described, base = found
        coordinates = np.array(_scalars(lanes, position, *self.coordinates), np.uint32).view(
            np.int32
        )
        offsets = _scalars(lanes, position, *self.offsets)
        try:
            return tensor_map.transfer(described, coordinates, shared_address, offsets, base)
        except ValueError as error:
            issue.m.findings.add("tensor-map", self.pc, issue.thread, shared_address, str(error))
            return None


def _global_offsets(issue, moved):
    """(buffer, offsets of the inside elements) of a transfer; None with a finding when it leaves
    the tensor's storage."""
    inside = moved.address[moved.inside]
    if not len(inside):
        return None, inside
    buffer = issue.m.launch.memory.buffers[int(inside[0]) >> TAG_SHIFT]
    offsets = inside - ((int(inside[0]) >> TAG_SHIFT) << TAG_SHIFT)
    bad = (offsets < 0) | (offsets + moved.itemsize > buffer.nbytes)
    if bad.any():
        at = int(np.argmax(bad))
        issue.m.findings.add(
            "out-of-bounds", issue.pc, issue.thread, int(inside[at]),
            f"the tensor map reaches byte {int(offsets[at])} of {buffer.label} ({buffer.nbytes} bytes)",
            int(bad.sum()),
        )  # fmt: skip
        return None, None
    return buffer, offsets


def _flat_box(issue, moved, address):
    """Flat shared offset of each element of the box in the block the address names, or None."""
    low = int(moved.shared.min())
    span = int(moved.shared.max()) + moved.itemsize - low
    flat = issue.flat(low, span, align=1)
    return None if flat is None else moved.shared - low + flat


@instruction("cp.async.bulk.tensor", control=True)
def tensor_copy(op):
    if op.mods[1] == "global":
        return _tensor_store(op, None)
    return _tensor_load(op)


@instruction("cp.reduce.async.bulk.tensor", control=True)
def tensor_reduce(op):
    names = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
    return _tensor_store(op, next(x for x in op.mods if x in names))


def _tensor_load(op):
    """[shared], [map, {..}], [mbar]{, {im2col offsets}}{, multicast mask}{, policy}"""
    copy, bar, pc = TensorCopy(op, 1, 0), op.address(2), op.pc
    mask = None
    if op.has("multicast::cluster"):
        after = 4 if isinstance(op.operands[3], List) else 3
        mask = op.src(after, "u16")

    def body(lanes, position):
        dst, barrier = _scalars(lanes, position, copy.shared, bar)
        issue, targets = Issue(lanes, position, pc), [(_shared_address(dst), barrier)]
        if mask is not None:
            targets = _multicast(lanes, position, dst, barrier, mask)
        for where, bar_address in targets:
            moved = copy.transfer(issue, position, where)
            object_ = issue.mbarrier(bar_address)
            if moved is None or object_ is None:
                return
            _load_box(issue, moved, where, object_, counted=(where, bar_address) == targets[0])

    return per_thread(op, body)


def _load_box(issue, moved, address, barrier, counted):
    m, size = issue.m, moved.itemsize
    buffer, offsets = _global_offsets(issue, moved)
    flat = _flat_box(issue, moved, address)
    if offsets is None or flat is None:
        return
    if counted:
        m.counts.bulk(issue.pc, moved.nbytes)
    if m.shadow.on:
        issue.shadow_write(m.shadow.words_of(flat, size), barrier)

    def move():
        values = np.zeros(len(flat), f"<u{size}")
        if buffer is not None:
            values[moved.inside] = buffer.view(size)[offsets // size]
        m.shared.view(size)[flat // size] = values

    issue.submit_load(barrier, moved.nbytes, move)


def _tensor_store(op, reduction):
    """[map, {..}], [shared]"""
    copy, pc = TensorCopy(op, 0, 1), op.pc

    def body(lanes, position):
        (src,) = _scalars(lanes, position, copy.shared)
        issue, m = Issue(lanes, position, pc), lanes.m
        moved = copy.transfer(issue, position, _shared_address(src))
        if moved is None:
            return
        buffer, offsets = _global_offsets(issue, moved)
        flat = _flat_box(issue, moved, src)
        if offsets is None or flat is None:
            return
        m.counts.bulk(pc, moved.nbytes)
        time, size = m.queue.next_bulk_time(issue.thread), moved.itemsize
        if m.shadow.on:
            issue.shadow_read(m.shadow.words_of(flat[moved.inside], size), time)
        kind = _map_kind(op, copy, issue, position) if reduction else None

        def move():
            if buffer is None:
                return
            new = m.shared.view(size)[flat[moved.inside] // size]
            target = buffer.view(size)
            if reduction:
                new = tensor_map.reduce(reduction, kind, target[offsets // size], new)
            target[offsets // size] = new

        issue.submit_store(time, move)

    return per_thread(op, body)


_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int32": "s32",
          "uint32": "u32", "int64": "s64", "uint64": "u64"}  # fmt: skip


def _map_kind(op, copy, issue, position):
    (where,) = _scalars(issue.lanes, position, copy.map)
    described, _ = _find_map(issue, where)
    name = str(described.dtype).rpartition(".")[2]
    if name not in _KINDS:
        op.fail(f"cannot reduce into a tensor of {name}")
    return _KINDS[name]
