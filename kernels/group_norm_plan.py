"""How the hand-written group_norm runs a shape: which kernel, how it is cut, how many threads.

A group's statistics need all its values, the result needs them again. Two ways:

one pass    a block, or a cluster of up to 8, keeps whole groups in registers or shared memory
            between the two: x is read once. Blocks are few, so latency decides.
two passes  partial sums first, then the result: x is read twice, by as many blocks as pay.

`plan` takes the cheapest by a model of the time, a sum whose terms are below and whose constants
are fitted (least squares of the relative error) to a sweep of bench/sweeps/group_norm.py on an
H200: 400 plans of 9 shapes, 3 to 12 % off within a shape.

Example, 320 channels @64x64 bf16: 2.6 MB in 64 blocks of 512 pixels x 80 B, 320 threads, 8 vectors
each, 64 lanes. fixed 1.75 + cluster 0.42 + 2 x 5 steps 0.2 + 8 vectors 0.56 + 10 warps 0.22 +
512 x 112 B / 125000 = 0.46 + 20480 elements / 31000 = 0.66 + 64 x 57 KB x 0.32 = 1.17: 5.4 us
(measured 5.5); in 128 blocks of 512 pixels x 40 B an element costs half, a sector twice.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

FIXED_US = 1.75  # launch in a CUDA graph, one wave of loads, one of stores
CLUSTER_US = 0.42  # pushing pairs to the peers, and the barrier
WAVE_US = 1.1  # blocks that wait for others to leave
STEP_US = 0.02  # a warp merging one pair of each of 32 lanes in shared memory
VEC_US = 0.07  # each further vector of a thread: instructions that nothing overlaps
WARP_US = 0.022  # prologue and epilogue of each warp of a multiprocessor
SM_BYTES_PER_US = 125_000  # 71 bytes a clock of 1.755 GHz
SM_ELEMENTS_PER_US = 31_000  # 128 lanes x 1.755 GHz / about 7 instructions
MB_US = 0.32  # all bytes through the L2: one read and one write, 6.3 TB/s
SECTOR_BYTES, ROW_BYTES = 32, 64  # what the L2 moves at least, and a row costs at least
TWO_PASS_US = 5.5  # two launches, four latencies, a merge of all slices
TWO_PASS_MB_US = 0.58  # of x: two reads and one write
TWO_PASS_IN_FLIGHT_US = 10.0  # and this / accesses in flight of a block: its warps x vectors, to 64
MAX_VECS = 16  # of a thread
MAX_NARROW_VECS = 24  # in shared memory, of less than 16 bytes each
MAX_SMEM_BYTES = 227 * 1024
MAX_PAIRS_BYTES = 96 * 1024  # of pairs (mean, M2) alone
# Clusters resident at once on 132 multiprocessors, one block on each: not 132 / size, because a
# cluster stays inside a GPC (1, 2, 4, 8 by cuOccupancyMaxActiveClusters; 3 and 6 by arithmetic:
# GPCs of 5 x 18, 2 x 16 and 10, or 6 x 18, 16 and 8 agree with those).
RESIDENT_CLUSTERS = {1: 132, 2: 66, 3: 43, 4: 30, 6: 20, 8: 15}


@dataclass(frozen=True)
class Shape:
    """What a plan depends on. `access_bytes`: the widest access that all pointers allow."""

    images: int
    channels: int
    pixels: int
    groups: int
    size: int  # bytes of an element
    channels_last: bool
    access_bytes: int = 16
    clusters: bool = True  # compute capability 9.0 or newer
    multiprocessors: int = 132
    x_channels: int = 0  # of the first of two tensors, side by side along the channels; 0: one

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups


@dataclass(frozen=True)
class Plan:
    """Numbers of a launch, named as in the PTX headers.

    channels_last: `columns` x `lanes` threads, `slab_groups` groups a slab (or tile).
    contiguous: `lanes` threads and one group, `columns` = 1, `slab_groups` = 1.
    """

    passes: int
    elements: int
    segment: int
    slab_groups: int
    columns: int
    lanes: int
    vecs: int
    cluster: int = 1
    slices: int = 1  # blocks of the first of two kernels, for each tile or group
    apply_blocks: int = 1  # and of the second
    staging: str = "registers"  # where a one-pass plan of channels_last keeps x, or "shared"
    blocks_per_sm: int = 1  # that registers and shared memory must leave room for
    estimate_us: float = 0.0

    @property
    def threads(self) -> int:
        return self.columns * self.lanes

    def block_units(self, shape: Shape) -> int:
        """Pixels (channels_last) or vectors of the group (contiguous) of one block."""
        units = shape.pixels
        if not shape.channels_last:
            units = shape.group_channels * shape.pixels // self.elements
        return -(-units // self.cluster)

    def trigger(self, shape: Shape) -> str:
        """When the next kernel may start, of a one-pass plan: "early", as this one begins to read,
        or "late", when it has its statistics.

        Blocks that start early take multiprocessors that are free, two to one of them while others
        have none, and are slow then: 320 @64, 64 blocks, 5.68 us early, 3.97 late, 4.57 without
        overlap. Where blocks come in several waves early is a little better. All of this is the
        kernel behind itself; before a convolution late seems to cost (docs/group-norm.md, Speed).
        """
        blocks = shape.images * shape.groups // self.slab_groups * self.cluster
        return "late" if self.cluster > 1 and blocks <= shape.multiprocessors else "early"

    def smem_bytes(self, shape: Shape) -> int:
        """Dynamic shared memory of a channels_last kernel: see "Shared map" in its header."""
        pitch = self.columns * self.elements // self.segment | 1
        pairs = self.slab_groups * (1 + self.cluster) + self.lanes * pitch
        used = 8 * pairs + 4 * self.lanes + 8 * (self.passes == 1)  # an mbarrier
        if self.staging == "shared":
            used = -(-used // 16) * 16 + self.threads * self.vecs * self.elements * shape.size
        return used


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape, in_shared: bool = True) -> Plan | None:
    """The plan with the least estimated time, or None where no kernel can take the shape.

    in_shared: whether the kernels can keep x in shared memory (those in CUDA C++ cannot).
    """
    able = (p for p in plans(shape) if in_shared or p.staging == "registers")
    return min(able, key=lambda p: p.estimate_us, default=None)


def plans(shape: Shape) -> Iterator[Plan]:
    """Every plan that fits: bench/sweeps/group_norm.py times them."""
    if shape.channels_last:
        yield from nhwc_one_pass(shape)
        yield from nhwc_two_pass(shape)
    else:
        yield from nchw_one_pass(shape)
        yield from nchw_two_pass(shape)


def widest(shape: Shape, *multiples: int) -> int:
    """Elements of the widest access that divides all of these counts, and lies in one tensor."""
    multiples = (*multiples, shape.x_channels)
    widths = (shape.access_bytes // shape.size >> k for k in range(4))
    return next((e for e in widths if e >= 1 and all(m % e == 0 for m in multiples)), 1)


def registers(vecs: int, elements: int, segments: int, size: int) -> int:
    """An upper estimate: packed vectors, sums, scale and shift, weight and bias, the rest."""
    words = max(1, elements * size // 4)
    return vecs * words + (4 if size == 4 else 3) * segments + 2 * elements + 2 * words + 28


def fits(threads: int, needed: int) -> bool:
    """64 K registers of a multiprocessor hold one block at least; no thread has more than 255."""
    return threads <= 1024 and needed <= min(248, 65536 // threads // 8 * 8)


def padded(columns: int) -> int:
    """Columns of a block, of which 1024 threads must hold whole warps."""
    if columns * 32 // math.gcd(32, columns) <= 1024:
        return columns
    return -(-columns // 8) * 8 if columns <= 256 else -(-columns // 32) * 32


def lane_choices(columns: int, units: int) -> Iterator[int]:
    """Lanes that make whole warps and about 128 to 1024 threads, no more lanes than units."""
    step = 32 // math.gcd(32, columns)
    most = -(-units // step) * step
    targets = (128, 256, 320, 384, 512, 640, 768, 1024)
    lanes = {min(most, max(step, t // columns // step * step)) for t in targets}
    yield from sorted(n for n in lanes if n * columns <= 1024)


def nhwc_one_pass(shape: Shape) -> Iterator[Plan]:
    for slab_groups in range(1, shape.groups + 1):
        slab = slab_groups * shape.group_channels
        elements = widest(shape, slab, shape.channels)
        columns = padded(slab // elements)
        if shape.groups % slab_groups or columns > 1024:
            continue
        segment = math.gcd(shape.group_channels, elements)
        for cluster in RESIDENT_CLUSTERS if shape.clusters else (1,):
            units = -(-shape.pixels // cluster)
            for lanes in lane_choices(columns, units):
                for staging in ("registers", "shared"):
                    vecs = -(-units // lanes)
                    if staging == "shared":
                        vecs = -(-vecs // 4) * 4  # the kernel takes 4 a turn
                    part = Plan(1, elements, segment, slab_groups, columns, lanes, vecs, cluster)
                    part = replace(part, staging=staging)
                    blocks_per_sm = nhwc_blocks_per_sm(shape, part)
                    if blocks_per_sm:
                        part = replace(part, blocks_per_sm=min(2, blocks_per_sm))
                        yield replace(part, estimate_us=nhwc_one_pass_us(shape, part))


def nhwc_blocks_per_sm(shape: Shape, p: Plan) -> int:
    """How many blocks of a one-pass plan a multiprocessor holds; 0 where it is not possible."""
    in_shared = p.staging == "shared"
    width = p.elements * shape.size
    if in_shared and (width < 4 or p.vecs > (MAX_VECS if width == 16 else MAX_NARROW_VECS)):
        return 0  # cp.async copies 4 bytes at least
    kept = 2 if in_shared else p.vecs
    needed = registers(kept, p.elements, p.elements // p.segment, shape.size)
    limit = MAX_SMEM_BYTES if in_shared else MAX_PAIRS_BYTES
    if kept > MAX_VECS or not fits(p.threads, needed) or p.smem_bytes(shape) > limit:
        return 0
    by_registers = 65536 // (p.threads * -(-needed // 8) * 8)
    by_smem = MAX_SMEM_BYTES // (p.smem_bytes(shape) + 1024)  # 1 KB of a block is the system's
    return max(1, min(by_registers, by_smem, 2048 // p.threads))


def nhwc_one_pass_us(shape: Shape, p: Plan) -> float:
    row = p.slab_groups * shape.group_channels * shape.size
    # Sectors that a row of the slab touches: its ends share theirs with neighbours.
    row_bytes = max(ROW_BYTES, row if row % SECTOR_BYTES == 0 else row + SECTOR_BYTES)
    blocks = shape.images * (shape.groups // p.slab_groups) * p.cluster
    steps = -(-p.lanes // 32) * shape.group_channels // p.segment
    merge_us = STEP_US * steps * -(-p.slab_groups // (p.threads // 32))
    return merge_us + one_pass_us(shape, p, blocks, p.block_units(shape) * row_bytes)


def nchw_one_pass(shape: Shape) -> Iterator[Plan]:
    elements = widest(shape, shape.pixels)
    vectors = shape.group_channels * shape.pixels // elements
    for cluster in RESIDENT_CLUSTERS if shape.clusters else (1,):
        units = -(-vectors // cluster)
        for lanes in lane_choices(1, units):
            vecs = -(-units // lanes)
            # An index, a weight and a bias for each vector.
            needed = registers(vecs, elements, 1, shape.size) + 3 * vecs
            if vecs > MAX_VECS or not fits(lanes, needed):
                continue
            per_sm = max(1, min(2048 // lanes, 65536 // (lanes * needed)))
            part = Plan(1, elements, elements, 1, 1, lanes, vecs, cluster, blocks_per_sm=per_sm)
            blocks, moved = shape.images * shape.groups * cluster, units * elements * shape.size
            estimate_us = one_pass_us(shape, part, blocks, moved)
            yield replace(part, blocks_per_sm=1, estimate_us=estimate_us)


def one_pass_us(shape: Shape, p: Plan, blocks: int, block_bytes: int) -> float:
    """The model above; `block_bytes` are read once and written once by each block."""
    usable = RESIDENT_CLUSTERS[p.cluster] * p.cluster * shape.multiprocessors / 132
    waves = math.ceil(blocks / (usable * p.blocks_per_sm))
    share = math.ceil(blocks / usable)  # blocks of the busiest multiprocessor
    return (
        FIXED_US
        + (CLUSTER_US if p.cluster > 1 else 0)
        + WAVE_US * (waves - 1)
        + VEC_US * min(p.vecs, MAX_VECS)
        + WARP_US * share * p.threads / 32
        + share * block_bytes / SM_BYTES_PER_US
        + share * p.threads * p.vecs * p.elements / SM_ELEMENTS_PER_US
        + MB_US * blocks * block_bytes / 1e6
    )


def nhwc_two_pass(shape: Shape) -> Iterator[Plan]:
    # The widest tile of whole groups that 512 threads cover with whole columns.
    for tile_groups in range(shape.groups, 0, -1):
        tile = tile_groups * shape.group_channels
        elements = widest(shape, tile, shape.channels)
        if shape.groups % tile_groups == 0 and tile // elements <= (
            512 if tile_groups > 1 else 1024
        ):
            break
    else:
        return
    columns = padded(tile // elements)
    segment = math.gcd(shape.group_channels, elements)
    tiles = shape.images * shape.groups // tile_groups
    for lanes in lane_choices(columns, shape.pixels):
        for vecs, per_sm in ((4, 1), (8, 1), (4, 2)):
            needed = registers(vecs, elements, elements // segment, shape.size)
            if not fits(columns * lanes * per_sm, needed if per_sm == 1 else min(needed, 64)):
                continue
            chunks = -(-shape.pixels // (lanes * vecs))
            slices = max(1, min(chunks, -(-per_sm * shape.multiprocessors // tiles)))
            part = Plan(2, elements, segment, tile_groups, columns, lanes, vecs, 1, slices)
            part = replace(part, apply_blocks=min(chunks, 2 * slices), blocks_per_sm=per_sm)
            if part.smem_bytes(shape) <= MAX_PAIRS_BYTES:
                yield replace(part, estimate_us=two_pass_us(shape, part))


def nchw_two_pass(shape: Shape) -> Iterator[Plan]:
    elements = widest(shape, shape.pixels)
    vectors = shape.group_channels * shape.pixels // elements
    for lanes, vecs in ((256, 4), (512, 4), (512, 8)):
        slabs = shape.images * shape.groups
        chunks = -(-vectors // (lanes * vecs))
        slices = max(1, min(chunks, -(-2 * shape.multiprocessors // slabs)))
        part = Plan(2, elements, elements, 1, 1, lanes, vecs, 1, slices, 2 * slices)
        yield replace(part, estimate_us=two_pass_us(shape, part))


def two_pass_us(shape: Shape, p: Plan) -> float:
    """Two launches and three passes over x; near 512 threads a block where equal."""
    megabytes = shape.images * shape.channels * shape.pixels * shape.size / 1e6
    in_flight = min(64, p.threads // 32 * p.vecs)
    move_us = TWO_PASS_MB_US * megabytes * (1 + TWO_PASS_IN_FLIGHT_US / in_flight)
    return TWO_PASS_US + move_us + abs(p.threads - 512) * 1e-5 + p.vecs * 1e-3
