"""Which tile of ptx/conv2d.sm90a.ptx.j2 a convolution gets."""

from dataclasses import replace

from mirage_hello.kernels import tuning
from mirage_hello.kernels.product_sm90a import Tile

# (warpgroups, block_n): what the registers of a consumer thread hold.
SHAPES = [(w, n) for w in (1, 2, 3) for n in (32, 48, 64, 80, 96, 112, 128, 160)]
SHAPES += [(2, 192), (2, 256), (1, 256), (1, 192)]

# Columns of a tile without spills, by consumer warpgroups beside the normalising one
NORM_WIDEST = {1: 256, 2: 192, 3: 128}

# The same of tiles that add e4m3's short sums to float32 ones after every PROMOTE K blocks
PROMOTED_WIDEST, PROMOTE = {1: 192, 2: 128, 3: 96}, 4

# Where a sweep on an H200 found a better tile than the estimate, by choose_tile's arguments.
MEASURED = {
    (1, 16, 16, 1280, 180, 3, 3, 1): Tile(2, 96, 4, patch=True),  # 16.9 us; 64x80 split 2: 18.2
    (1, 8, 8, 1280, 180, 3, 3, 1): Tile(1, 64, 5, patch=True),  # 8.5 us; 64x48 split 4: 9.2
}


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
) -> Tile:
    """The tile for `blocks` K blocks: as measured on this card, else by the least estimated time.

    Args:
        batch, p, q, outputs: of the output; batch counts the four parities of an upsampled image.
        unit: channels of a sum, 0: no sums; not every tile can make them.
        groups: of the input's norm, 0: none; it needs a patch and a table of the channels.
        fp8: e4m3 operands, 128 channels a K block.
    """
    shape = (batch, p, q, outputs, blocks, r, s, stride)

    def fitting() -> list[Tile]:
        found = candidates(blocks, r, s, stride, patch=bool(groups))
        found = [t for t in found if not unit or t.sum_slots(unit)]
        if groups and not fp8:
            found = [replace(t, patches=3) for t in found]
        if fp8:
            fits = (t for t in found if t.block_n <= PROMOTED_WIDEST[t.warpgroups])
            fits = (t for t in fits if t.blocks_per_sm == 1)
            found = [replace(t, promote=PROMOTE, quantises=bool(groups)) for t in fits]
        return [t for t in found if not groups or _normalises(t, batch, blocks, r, s, groups)]

    def clocks(tile: Tile) -> float:
        if tile == MEASURED.get(shape):
            return 0.0
        tiles = -(-q // 8) * -(-p // (8 * tile.warpgroups)) * batch * -(-outputs // tile.block_n)
        loaded = tile.pixel_bytes(r, s) / (r * s if tile.patch else 1)
        return tile.clocks(tiles, blocks, loaded)

    names = ("batch", "p", "q", "outputs", "blocks", "r", "s", "stride", "unit", "groups")
    key = dict(zip(names, (*shape, unit, groups), strict=True))
    return tuning.tile_for("conv2d_fp8" if fp8 else "conv2d", key, fitting, clocks)


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
