"""Table: cp.async.bulk.tensor and cp.reduce.async.bulk.tensor: boxes of a tensor map."""

import numpy as np

from mirage_hello.ptx.emulator import memory, tensor_map
from mirage_hello.ptx.emulator.formats import register_dtype
from mirage_hello.ptx.emulator.instructions_bulk import Issue, multicast, per_thread, scalars
from mirage_hello.ptx.emulator.operands import (
    TAG_PARAM,
    TAG_SHARED,
    TAG_SHIFT,
    List,
    TensorPlace,
)
from mirage_hello.ptx.emulator.table import instruction


def _shared_address(value):
    return value & memory.OFFSET_MASK if value >> TAG_SHIFT == TAG_SHARED else value


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
        self.store = shared > tensor  # the destination comes first
        self.map = op.place(place.map)
        self.coordinates = [op.reader(c, "b32") for c in place.coordinates]
        self.shared = op.address(shared)
        offsets = next((o for o in op.operands if isinstance(o, List)), None)
        self.offsets = [op.reader(c, "b16") for c in offsets.elements] if offsets else []

    def transfer(self, issue, position, shared_address):
        """tensor_map.Transfer against virtual addresses, or None with a finding."""
        lanes = issue.lanes
        (where,) = scalars(lanes, position, self.map)
        found = _find_map(issue, where)
        if found is None:
            return None
        described, base = found
        coordinates = np.array(scalars(lanes, position, *self.coordinates), np.uint32).view(
            np.int32
        )
        offsets = scalars(lanes, position, *self.offsets)
        try:
            return tensor_map.transfer(
                described, coordinates, shared_address, offsets, base, self.store
            )
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
            f"the tensor map reaches byte {int(offsets[at])} of {buffer.label}, which has "
            f"{buffer.nbytes} bytes",
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
        dst, barrier = scalars(lanes, position, copy.shared, bar)
        issue, targets = Issue(lanes, position, pc), [(_shared_address(dst), barrier)]
        if mask is not None:
            targets = multicast(lanes, position, dst, barrier, mask)
        for where, bar_address in targets:
            moved = copy.transfer(issue, position, where)
            object_ = issue.mbarrier(bar_address)
            if moved is None or object_ is None:
                return
            _load_box(issue, moved, where, object_, counted=(where, bar_address) == targets[0])

    return per_thread(op, body)


def _box_words(shadow, flat, size):
    """Shadow words of the elements at `flat`; a whole box is one dense range."""
    if not len(flat):
        return np.zeros(0, np.int64)
    low, high = int(flat.min()), int(flat.max()) + size
    if high - low == len(flat) * size:
        return np.arange(low // shadow.granule, high // shadow.granule)
    return shadow.words_of(flat, size)


def _load_box(issue, moved, address, barrier, counted):
    m, size = issue.m, moved.itemsize
    buffer, offsets = _global_offsets(issue, moved)
    flat = _flat_box(issue, moved, address)
    if offsets is None or flat is None:
        return
    if counted:
        m.counts.bulk(issue.pc, moved.nbytes)
    if m.shadow.on:
        issue.shadow_write(_box_words(m.shadow, flat, size), barrier)

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
        (src,) = scalars(lanes, position, copy.shared)
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
            inside = flat if moved.inside.all() else flat[moved.inside]
            issue.shadow_read(_box_words(m.shadow, inside, size), time)
        kind = _reduced_kind(op, copy, issue, position, reduction) if reduction else None
        if reduction and kind is None:
            return

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


def _reduced_kind(op, copy, issue, position, reduction):
    """PTX type of the map's elements; None (with a finding) where it lacks the reduction."""
    (where,) = scalars(issue.lanes, position, copy.map)
    described, _ = _find_map(issue, where)
    name = str(described.dtype).rpartition(".")[2]
    if name not in _KINDS:
        op.fail(f"cannot reduce into a tensor of {name}")
    kind = _KINDS[name]
    nothing = np.zeros(0, register_dtype(kind))
    try:
        tensor_map.reduce(reduction, kind, nothing, nothing)
    except ValueError as error:
        issue.m.findings.add("tensor-map", copy.pc, issue.thread, where, str(error))
        return None
    return kind
