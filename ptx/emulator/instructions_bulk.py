"""Table: cp.async.bulk and cp.reduce.async.bulk without a tensor map, and the bulk groups."""

import numpy as np

from mirage_hello.ptx.emulator import memory, tensor_map
from mirage_hello.ptx.emulator.asynchronous import BulkCopy
from mirage_hello.ptx.emulator.formats import register_dtype
from mirage_hello.ptx.emulator.instructions_warp import constant
from mirage_hello.ptx.emulator.operands import SHARED_BASE, TAG_SHIFT
from mirage_hello.ptx.emulator.table import instruction


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
        barrier, shadow = next((b for b, _, _ in groups), None), self.m.shadow
        if barrier is not None and shadow.on:
            fences = shadow.init_fence_time[[barrier.init_thread, self.thread]]
            if (fences < barrier.init_time).all():
                self.m.findings.add(
                    "missing-proxy-fence", self.pc, self.thread, barrier.address,
                    "the copy completes on an mbarrier whose mbarrier.init no fence.mbarrier_init "
                    "made visible to the async proxy",
                )  # fmt: skip
        return barrier

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
        self.m.dependency.threads_write(np.array([self.thread]), self.pc)
        self.m.queue.submit_bulk(BulkCopy(self.thread, self.pc, time, move))


def scalars(lanes, position, *readers):
    return [int(lanes.full(r(lanes))[position]) for r in readers]


def per_thread(op, body):
    """run: a copy instruction is executed thread by thread (one elected thread, normally)."""

    def run(lanes):
        for position in range(lanes.n):
            body(lanes, position)
        return [(op.pc + 1, lanes)]

    return run


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
        dst, src, nbytes, barrier = scalars(lanes, position, to, source, size, bar)
        issue = Issue(lanes, position, pc)
        targets = [(dst, barrier)]
        if mask is not None:
            targets = multicast(lanes, position, dst, barrier, mask)
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


def multicast(lanes, position, dst, barrier, mask):
    """(destination, mbarrier) in each block of the mask, at the same offsets."""
    bits = int(lanes.full(mask(lanes))[position])
    ranks = [r for r in range(16) if bits >> r & 1]
    return [((r + 1) << 24 | dst & 0xFFFFFF, (r + 1) << 24 | barrier & 0xFFFFFF) for r in ranks]


@instruction("cp.async.bulk.global.shared::cta.bulk_group",
             "cp.reduce.async.bulk.global.shared::cta", control=True)  # fmt: skip
def bulk_store(op):
    """cp.async.bulk / cp.reduce.async.bulk [global], [shared], bytes"""
    to, source, size = op.address(0), op.address(1), op.src(2, "u32")
    reduction = _reduction(op)
    pc = op.pc

    def body(lanes, position):
        dst, src, nbytes = scalars(lanes, position, to, source, size)
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
