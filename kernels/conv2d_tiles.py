"""The tile of ptx/conv2d.sm90a.ptx.j2: what it is, what it costs, which one a convolution gets."""

import functools
import math
from dataclasses import dataclass, replace

from mirage_hello.kernels import tuning

SMEM_BYTES = {1: 232448, 2: 115712}  # a block may have, by blocks on a multiprocessor
# Clusters resident at once on an H200, one block a multiprocessor (cuOccupancyMaxActiveClusters):
# not 132 / size, because a cluster stays inside a GPC.
RESIDENT = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
# Stages, by warpgroups that multiply. One has narrow tiles, which wait for weights: behind a
# GroupNorm with cold weights, 1280 channels at 8x8 take 18.5, 15.8, 13.9 and 12.0 us with 4, 6, 8
# and 12 stages; two, at 64x64, the same from 6 stages on. In the 880m's step 20 for all of one
# warpgroup cost 7 us more than 12; e4m3 at 8x8 is faster with 16 and more, which its tiles name.
MAX_STAGES = {1: 20, 2: 12, 3: 12}
RING = 12  # stages where a tile names none
RINGS = (6, 8, 16, 20)  # that `mirage tune` tries beside it
SHORT_PATCHES = (6, 4)  # in flight, of tiles with a shortcut
MULTIPROCESSORS = 132
# Of the estimate, in clocks of an H200; fitted to 200 measured tiles (7 % mean error).
PRODUCTS = 1.07  # products against the peak rate of 4096 FLOP a clock
READS, WRITES = 0.82 / 128, 1.16 / 128  # a byte of shared memory that wgmma reads, that TMA writes
LOAD = 1 / 62  # a byte that TMA brings
LAUNCH, TILE, TILE_AREA = 3700, 1500, 10  # a kernel; a tile; its 64-row columns
SPLIT, SPLIT_AREA = 710, 7  # more for each block of a cluster, and for its 64-row columns
TWO_BLOCKS = 1.2  # what is left of a tile's own time where another block hides it


@dataclass(frozen=True)
class Tile:
    """64 * warpgroups rows by block_n columns, K over a cluster of `split` blocks.

    blocks_per_sm: 2 lets one block's epilogue run under the other's products.
    patch: convolution of stride 1: the input under a tile is loaded once for all taps.
    stages: K blocks in flight; None: as many as the shared memory holds, at most RING.
    persistent: one block a multiprocessor takes several tiles, and loads the next one while it
        stores; split must be 1.
    patches: in flight; 3 where a norm rewrites them, so that the load, the norm and the products
        have one each; more where a shortcut takes a patch for every K block.
    promote: of e4m3 operands: K blocks whose products wgmma sums with its 14 bits before they are
        added in float32; 0: all.
    quantises: a norm writes e4m3 patches beside the bfloat16 ones that were loaded.
    """

    warpgroups: int
    block_n: int
    split: int = 1
    blocks_per_sm: int = 1
    patch: bool = False
    stages: int | None = None
    persistent: bool = False
    patches: int = 2
    promote: int = 0
    quantises: bool = False

    @property
    def patch_stages(self) -> int:
        return self.patches if self.patch else 0

    @property
    def block_m(self) -> int:
        return 64 * self.warpgroups

    def pixel_bytes(self, r: int, s: int) -> int:
        """Of one load of A: whole 1024-byte swizzle atoms."""
        if not self.patch:
            return self.block_m * 128
        return -(-(8 + s - 1) * (8 * self.warpgroups + r - 1) * 128 // 1024) * 1024

    def pipeline_bytes(self, stages: int, r: int = 1, s: int = 1) -> int:
        """Patches and stages; a stage is a weight tile, with the pixels unless there is a patch."""
        pixels, weight = self.pixel_bytes(r, s), self.block_n * 128
        ring = self.patch_stages * pixels * (2 if self.quantises else 1)
        return ring + stages * (weight if self.patch else pixels + weight)

    @property
    def row_parts(self) -> int:
        """Slices that the cluster cuts a tile's rows into; its columns take the rest of `split`."""
        return next(n for n in (4, 2, 1) if self.warpgroups % n == 0 and self.split % n == 0)

    @property
    def octets(self) -> int:
        """Columns of a slice, in eights."""
        return -(-self.block_n // 8 // (self.split // self.row_parts))

    def slice_bytes(self) -> int:
        """All slices of the epilogue: `split` staged, split - 1 received; float32, rows padded to
        an odd number of 32 bytes against bank conflicts."""
        rows = self.block_m // self.row_parts
        return (2 * self.split - 1) * rows * 32 * (self.octets | 1)

    def sum_slots(self, unit: int) -> int:
        """Slots that a tile's sums of `unit` channels take: 1 where no slice cuts a unit, 2 where
        neighbouring slices share one, 0 where more would, which nothing supports."""
        last = self.block_n - (self.block_n - 1) // (8 * self.octets) * 8 * self.octets
        starts = {self.block_n, 8 * self.octets if 8 * self.octets < self.block_n else unit}
        if all(start % unit == 0 for start in starts):
            return 1
        return 2 if min(8 * self.octets, last) >= unit else 0

    def barriers_at(self, stages: int, r: int, s: int) -> int:
        """Past the pipeline and the slices, which share their memory unless persistent."""
        parts = self.pipeline_bytes(stages, r, s), self.slice_bytes()
        return sum(parts) if self.persistent else max(parts)

    def room(self, r: int = 1, s: int = 1, table_bytes: int = 0) -> int:
        """Stages that fit beside a table, at most MAX_STAGES."""
        most = MAX_STAGES[self.warpgroups]
        room = SMEM_BYTES[self.blocks_per_sm] - 8 - 16 * most - 32 * self.patch_stages
        room -= 4 * self.block_m + table_bytes
        return next((n for n in range(most, 0, -1) if self.barriers_at(n, r, s) <= room), 0)

    def most_stages(self, share: int, r: int = 1, s: int = 1, table_bytes: int = 0) -> int:
        """Of those that fit, at most RING and the K blocks of a block of the cluster; 0: none."""
        most = RING if self.persistent else max(share, 2)
        return min(self.room(r, s, table_bytes), most, RING)

    def fitted(self, share: int, r: int = 1, s: int = 1, table_bytes: int = 0) -> "Tile":
        """With `stages` filled in. ValueError when they do not fit the shared memory."""
        most = self.most_stages(share, r, s, table_bytes)
        if most < 1 or (self.stages or 0) > self.room(r, s, table_bytes):
            raise ValueError(
                f"{self}: a block may have {SMEM_BYTES[self.blocks_per_sm]} bytes of shared memory "
                f"(slices: {self.slice_bytes()}, a norm's table: {table_bytes}); use a smaller tile"
            )
        return replace(self, stages=self.stages or most)

    def layout(self, r: int = 1, s: int = 1) -> tuple[int, int]:
        """(where the barriers lie, bytes of shared memory) of a fitted tile."""
        assert self.stages is not None
        bars = self.barriers_at(self.stages, r, s)
        sums = 4 * self.block_m  # pixels that each row of threads counts
        return bars, bars + 16 * self.stages + 32 * self.patch_stages + 8 + sums

    def table_bytes(self, batch: int, blocks: int, taps: int, groups: int) -> int:
        """Of a norm: float32 scales and shifts of the channels in a block's part of K, and its
        groups' statistics. A persistent block takes tiles of every image."""
        images = batch if self.persistent else 1
        depth = min(-(-self.share(blocks) // taps) + (self.split > 1), -(-blocks // taps))
        return 16 + images * depth * (1024 if self.quantises else 512) + 8 * groups

    def variables(self, r: int = 1, s: int = 1) -> dict[str, int | bool]:
        """Template variables of a fitted tile."""
        assert self.stages is not None
        return {
            "WARPGROUPS": self.warpgroups,
            "BLOCK_N": self.block_n,
            "SPLIT": self.split,
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "PERSISTENT": self.persistent,
            "BARS": self.layout(r, s)[0],
        }

    def share(self, blocks: int) -> int:
        """The most K blocks that one block of the cluster has.

        Raises:
            ValueError: a block of the cluster would have none.
        """
        if blocks < self.split:
            raise ValueError(f"{self}: {blocks} K blocks cannot be split over {self.split}")
        return -(-blocks // self.split)

    def grid(self, tiles_x: int, *tiles: int) -> tuple[int, ...]:
        """Of a launch over tiles_x x tiles[0] x ... tiles."""
        if self.persistent:
            return (min(math.prod((tiles_x, *tiles)), MULTIPROCESSORS),)
        return (tiles_x * self.split, *tiles)

    def clocks(self, tiles: int, blocks: int, pixel_bytes: float) -> float:
        """Estimated clocks of `tiles` tiles of `blocks` K blocks.

        pixel_bytes: bytes of A that a K block loads. A K block takes the longest of its products,
        of shared memory's work (wgmma reads A and B, TMA writes them) and of its loads.
        """
        area = self.warpgroups * self.block_n
        loaded = pixel_bytes + 128 * self.block_n
        read = 4 * self.warpgroups * (2048 + 32 * self.block_n)
        step = max(2 * PRODUCTS * area, READS * read + WRITES * loaded, LOAD * loaded)
        own = TILE_AREA * area + (0 if self.persistent else TILE)
        if self.split > 1:
            own += SPLIT * self.split + SPLIT_AREA * area
        depth = -(-blocks // self.split)
        if self.blocks_per_sm == 2:
            turns = -(-tiles // (2 * MULTIPROCESSORS))
            together = min(2, -(-tiles // MULTIPROCESSORS))
            return LAUNCH + turns * (together * depth * step + TWO_BLOCKS * own)
        start = TILE if self.persistent else 0
        return LAUNCH + start + -(-tiles // RESIDENT[self.split]) * (own + depth * step)


# (warpgroups, block_n): what the registers of a consumer thread hold.
SHAPES = [(w, n) for w in (1, 2, 3) for n in (32, 48, 64, 80, 96, 112, 128, 160)]
SHAPES += [(w, n) for w in (1, 2) for n in (40, 56, 72, 88, 104, 192, 256)]
PLAIN_WIDTHS = (40, 56, 72, 88, 104)  # timed without a norm on load and in 16 bits only

# Columns of a tile without spills, by consumer warpgroups beside the normalising one
NORM_WIDEST = {1: 256, 2: 192, 3: 128}

# The same of tiles that add e4m3's short sums to float32 ones after every PROMOTE K blocks
PROMOTED_WIDEST, PROMOTE = {1: 192, 2: 128, 3: 96}, 9


def choose_tile(
    batch: int,
    p: int,
    q: int,
    outputs: int,
    blocks: int,
    r: int,
    s: int,
    stride: int,
    unit: int = 0,
    groups: int = 0,
    fp8: bool = False,
    short: int = 0,
) -> Tile:
    """The tile for `blocks` K blocks: as measured on this card, else by the least estimated time.

    Args:
        batch, p, q, outputs: of the output; batch counts the four parities of an upsampled image.
        unit: channels of a sum, 0: no sums; not every tile can make them.
        groups: of the input's norm, 0: none; it needs a patch and a table of the channels.
        fp8: e4m3 operands, 128 channels a K block.
        short: of the K blocks, those of a shortcut; they come after the others.
    """
    shape = (batch, p, q, outputs, blocks, r, s, stride)

    def clocks(tile: Tile) -> float:
        tiles = -(-q // 8) * -(-p // (8 * tile.warpgroups)) * batch * -(-outputs // tile.block_n)
        loaded = tile.pixel_bytes(r, s) / (r * s if tile.patch else 1)
        return tile.clocks(tiles, blocks, loaded)

    names = ("batch", "p", "q", "outputs", "blocks", "r", "s", "stride", "unit", "groups")
    key: dict[str, int] = dict(zip(names, (*shape, unit, groups), strict=True))
    if short:
        key["short"] = short
    fits = functools.partial(fitting, batch, blocks, r, s, stride, unit, groups, fp8, bool(short))
    return tuning.tile_for("conv2d_fp8" if fp8 else "conv2d", key, fits, clocks)


@functools.lru_cache(maxsize=256)
def fitting(
    batch: int, blocks: int, r: int, s: int, stride: int, unit: int, groups: int, fp8: bool,
    short: bool = False,
) -> tuple[Tile, ...]:  # fmt: skip
    """The tiles that compute such a convolution, then the same with other rings."""
    found = candidates(blocks, r, s, stride, patch=bool(groups))
    if groups or fp8:
        found = [t for t in found if t.block_n not in PLAIN_WIDTHS]
    found = [t for t in found if not unit or t.sum_slots(unit)]
    if groups and not fp8:
        found = [replace(t, patches=3) for t in found]
    if fp8:
        fits = (t for t in found if t.block_n <= PROMOTED_WIDEST[t.warpgroups])
        fits = (t for t in fits if t.blocks_per_sm == 1)
        found = [replace(t, promote=PROMOTE, quantises=bool(groups)) for t in fits]
    found = [t for t in found if not groups or _normalises(t, batch, blocks, r, s, groups)]
    if short:
        # A patch of the shortcut serves one K block: with two in flight its loads are all that
        # counts (the 880m's step took 161 us more than with shortcuts of their own).
        found = [t for t in found if t.patch and not t.persistent]
        deep = [replace(t, patches=n) for n in SHORT_PATCHES for t in found]
        found = [t for t in deep if t.most_stages(n := t.share(blocks), r, s) >= min(6, n)]
    others = [
        replace(t, stages=n)
        for t in found
        for n in RINGS
        if n <= min(t.room(r, s), t.share(blocks)) and n != t.most_stages(t.share(blocks), r, s)
    ]
    return (*found, *others)


def _normalises(tile: Tile, batch: int, blocks: int, r: int, s: int, groups: int) -> bool:
    """Whether a tile leaves registers and shared memory to a warpgroup that normalises."""
    if not tile.patch or tile.blocks_per_sm > 1 or tile.block_n > NORM_WIDEST[tile.warpgroups]:
        return False
    if tile.promote and tile.block_n > 128:
        return False
    share = tile.share(blocks)
    table_bytes = tile.table_bytes(batch, blocks, r * s, groups)
    return tile.most_stages(share, r, s, table_bytes) >= min(3, share)


def candidates(blocks: int, r: int, s: int, stride: int, patch: bool = False) -> list[Tile]:
    """Every tile whose registers and shared memory fit; patch: also where one tap reads it."""
    patch = stride == 1 and (patch or r * s > 1)
    found = []
    for groups, block_n in SHAPES:
        tiles = [Tile(groups, block_n, n, patch=patch) for n in range(1, min(blocks, 8) + 1)]
        tiles.append(replace(tiles[0], persistent=True))
        if groups == 1 and block_n <= 160:
            tiles.append(replace(tiles[0], blocks_per_sm=2))
        for tile in tiles:
            share = tile.share(blocks)
            if tile.most_stages(share, r, s) >= min(3, share):
                found.append(tile)
    return found
