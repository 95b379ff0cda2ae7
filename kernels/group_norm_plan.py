"""How the hand-written group_norm runs a shape: which kernel, how it is cut, how many threads.

A group's statistics need all its values, the result needs them again. Two ways:

one pass    a block, or a cluster of up to 8, keeps whole groups in registers between the two: x is
            read once. Blocks are few and their threads many, so latency decides.
two passes  partial sums first, then the result: x is read twice, by as many blocks as pay.

`plan` takes the cheapest by a model of the time (`estimate_us`), whose constants are an H200's:

    time = LAUNCH_US + MERGE_US per step (+ CLUSTER_US) + waves * LATENCY_US + 2 move + compute
    move = max(bytes of the busiest multiprocessor / SM_BYTES_PER_US, all bytes / L2_BYTES_PER_US)
    compute = elements of the busiest multiprocessor / SM_ELEMENTS_PER_US

Example, 320 channels @64x64 bf16: 2.6 MB in 64 blocks of 512 pixels x 80 B. launch 0.9 + cluster
0.5 + latency 1.0 + 2 x max(57 KB / 80, 3.7 MB / 4800) + 20480 / 16000 = 5.2 us; in 128 blocks of
512 pixels x 40 B the last term halves, and the sectors that two blocks share count twice.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

LAUNCH_US = 0.9  # a dependent kernel in a CUDA graph
LATENCY_US = 1.0  # device memory or L2, and back, for each wave of blocks
CLUSTER_US = 0.5  # pushing pairs to the peers, and the barrier
MERGE_US = 0.012  # one step of a warp over 32 lanes' pairs in shared memory
SM_BYTES_PER_US = 80_000  # about 46 bytes a clock of 1.75 GHz
L2_BYTES_PER_US = 4_800_000
SM_ELEMENTS_PER_US = 16_000  # 128 lanes x 1.75 GHz / about 14 instructions
SECTOR_BYTES = 32  # what the L2 moves at least
MAX_VECS = 16
MAX_SMEM_BYTES = 96 * 1024
# Clusters resident at once on 132 multiprocessors, one block on each: not 132 / size, because a
# cluster stays inside a GPC (measured with cuOccupancyMaxActiveClusters).
RESIDENT_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}


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
    cluster: int
    slices: int
    estimate_us: float

    @property
    def threads(self) -> int:
        return self.columns * self.lanes

    def block_units(self, shape: Shape) -> int:
        """Pixels (channels_last) or vectors of the group (contiguous) of one block."""
        units = shape.pixels
        if not shape.channels_last:
            units = shape.group_channels * shape.pixels // self.elements
        return -(-units // self.cluster)

    def smem_bytes(self, shape: Shape) -> int:
        """Dynamic shared memory of a channels_last kernel: see "Shared map" in its header."""
        pitch = self.columns * self.elements // self.segment | 1
        pairs = self.slab_groups * (1 + self.cluster) + self.lanes * pitch
        return 8 * pairs + 4 * self.lanes


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape) -> Plan | None:
    """The plan with the least estimated time, or None where no kernel can take the shape."""
    return min(plans(shape), key=lambda p: p.estimate_us, default=None)


def plans(shape: Shape) -> Iterator[Plan]:
    """Every plan that fits: bench/sweeps/group_norm.py times them."""
    if shape.channels_last:
        yield from nhwc_one_pass(shape)
        yield from nhwc_two_pass(shape)
    else:
        yield from nchw_one_pass(shape)
        yield from nchw_two_pass(shape)


def widest(shape: Shape, *multiples: int) -> int:
    """Elements of the widest access that divides all of these counts."""
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
                vecs = -(-units // lanes)
                needed = registers(vecs, elements, elements // segment, shape.size)
                if vecs > MAX_VECS or not fits(columns * lanes, needed):
                    continue
                part = Plan(
                    1, elements, segment, slab_groups, columns, lanes, vecs, cluster, 1, 0.0
                )
                if part.smem_bytes(shape) > MAX_SMEM_BYTES:
                    continue
                row = slab * shape.size
                # Sectors that a row of the slab touches: its ends share theirs with neighbours.
                moved = row if row % SECTOR_BYTES == 0 else row + SECTOR_BYTES
                warps = max(1, part.threads // 32)
                steps = -(-lanes // 32) * shape.group_channels // segment
                merge_us = MERGE_US * steps * -(-slab_groups // warps)
                blocks = shape.images * (shape.groups // slab_groups) * cluster
                time_us = one_pass_us(shape, part, needed, blocks, units * moved, merge_us)
                yield with_estimate(part, time_us)


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
            part = Plan(1, elements, elements, 1, 1, lanes, vecs, cluster, 1, 0.0)
            blocks = shape.images * shape.groups * cluster
            moved = units * elements * shape.size
            yield with_estimate(part, one_pass_us(shape, part, needed, blocks, moved, MERGE_US))


def one_pass_us(
    shape: Shape, part: Plan, needed: int, blocks: int, block_bytes: int, merge_us: float
) -> float:
    """The model above; `block_bytes` are read once and written once by each block."""
    usable = RESIDENT_CLUSTERS[part.cluster] * part.cluster * shape.multiprocessors / 132
    per_sm = max(1, min(2048 // part.threads, 65536 // (part.threads * needed)))
    waves = math.ceil(blocks / (usable * per_sm))
    share = math.ceil(blocks / usable)
    elements = part.threads * part.vecs * part.elements
    move_us = max(share * block_bytes / SM_BYTES_PER_US, blocks * block_bytes / L2_BYTES_PER_US)
    fixed_us = LAUNCH_US + merge_us + (CLUSTER_US if part.cluster > 1 else 0)
    compute_us = share * elements / SM_ELEMENTS_PER_US
    return fixed_us + waves * LATENCY_US + 2 * move_us + compute_us


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
    for lanes in lane_choices(columns, shape.pixels):
        for vecs in (4, 8):
            needed = registers(vecs, elements, elements // segment, shape.size)
            if not fits(columns * lanes, needed):
                continue
            tiles = shape.images * shape.groups // tile_groups
            chunks = -(-shape.pixels // (lanes * vecs))
            slices = max(1, min(chunks, -(-shape.multiprocessors // tiles)))
            part = Plan(2, elements, segment, tile_groups, columns, lanes, vecs, 1, slices, 0.0)
            if part.smem_bytes(shape) <= MAX_SMEM_BYTES:
                yield with_estimate(part, two_pass_us(shape, part.threads))


def nchw_two_pass(shape: Shape) -> Iterator[Plan]:
    elements = widest(shape, shape.pixels)
    vectors = shape.group_channels * shape.pixels // elements
    for lanes, vecs in ((256, 4), (512, 4), (512, 8)):
        slabs = shape.images * shape.groups
        chunks = -(-vectors // (lanes * vecs))
        slices = max(1, min(chunks, -(-2 * shape.multiprocessors // slabs)))
        part = Plan(2, elements, elements, 1, 1, lanes, vecs, 1, slices, 0.0)
        yield with_estimate(part, two_pass_us(shape, lanes))


def two_pass_us(shape: Shape, threads: int) -> float:
    """Two launches, two latencies each, three passes over x; 512 threads a block where equal."""
    moved = 3 * shape.images * shape.channels * shape.pixels * shape.size
    elements = moved / shape.size / shape.multiprocessors
    time_us = 2 * LAUNCH_US + 4 * LATENCY_US + moved / L2_BYTES_PER_US
    time_us += elements / SM_ELEMENTS_PER_US / 2  # half the instructions: one of two jobs a pass
    return time_us + abs(threads - 512) * 1e-5


def with_estimate(part: Plan, estimate_us: float) -> Plan:
    return Plan(**{**part.__dict__, "estimate_us": estimate_us})
