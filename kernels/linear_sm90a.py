"""linear and geglu on Hopper: the launch of ptx/linear.sm90a.ptx.j2 and the choice of its tile."""

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from mirage_hello.kernels.call import Call
from mirage_hello.kernels.product_sm90a import SHORT_NAME, Tile
from mirage_hello.ptx import loader

# (warpgroups, block_n): what the registers of a consumer thread hold.
SHAPES = [(w, n) for w in (1, 2) for n in (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)]
SHAPES += [(3, n) for n in (64, 80, 96, 112, 128, 160)]


def linear_sm90a(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See ops.linear; `tile` overrides the choice."""
    n = weight.shape[0]
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    tile = tile or choose_tile(x.shape[:-1].numel(), n, weight.shape[1])
    return _launch("linear", x, weight, (bias, residual, out), n, tile.block_n, tile)


def geglu_sm90a(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """See ops.geglu; a tile of block_n holds block_n / 2 columns of h and the same of the gate.

    Raises:
        ValueError: a tile that splits K; the gate is not linear in the parts.
    """
    n = weight.shape[0] // 2
    if tile and tile.split > 1:
        raise ValueError(f"geglu: the tile must not split K (got {tile})")
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    tile = tile or choose_tile(x.shape[:-1].numel(), n, weight.shape[1], gated=True)
    return _launch("geglu", x, weight, (bias, out), n, tile.block_n // 2, tile)


def _launch(
    op: str, x: Tensor, weight: Tensor, tensors: tuple, n: int, columns: int, tile: Tile
) -> Tensor:
    """`tensors` ends with the output; a tile stores `columns` of its n columns."""
    out = tensors[-1]
    if out.numel() == 0:
        return out
    rows, depth = out.numel() // n, weight.shape[1]
    blocks = -(-depth // 64)
    tile = tile.fitted(tile.share(blocks))
    short = SHORT_NAME[x.dtype]
    row_bytes = (depth * x.element_size(),)
    maps = (
        loader.tensor_map(x, (64, tile.block_m), dims=(depth, rows), strides=row_bytes),
        loader.tensor_map(weight, (64, columns)),
    )
    tiles = (-(-rows // tile.block_m), -(-n // columns))
    persistent = (math.prod(tiles), tiles[0]) if tile.persistent else ()
    program(op, tile, short).launch(
        f"{op}_{short}",
        grid=tile.grid(*tiles),
        block=(128 * (tile.warpgroups + 1),),
        args=(*maps, *tensors, n, *persistent, blocks, rows),
        smem_bytes=tile.layout()[1],
    )
    return out


def program(op: str, tile: Tile, dtype: str) -> loader.Program:
    """The program of a fitted tile."""
    return loader.program("linear.sm90a", OP=op, dtype=dtype, **tile.variables())


@functools.cache
def choose_tile(rows: int, n: int, depth: int, gated: bool = False) -> Tile:
    """The tile with the least estimated time; see docs/convolution.md."""
    blocks = -(-depth // 64)

    def clocks(tile: Tile) -> float:
        columns = tile.block_n // 2 if gated else tile.block_n
        tiles = -(-rows // tile.block_m) * -(-n // columns)
        return tile.clocks(tiles, blocks, tile.block_m * 128)

    return min(candidates(blocks, gated), key=clocks)


def candidates(blocks: int, gated: bool = False) -> list[Tile]:
    """Every tile whose registers and shared memory fit."""
    found = []
    for groups, block_n in SHAPES:
        if gated and block_n % 16:
            continue
        splits = 1 if gated else min(blocks, 8)
        tiles = [Tile(groups, block_n, n) for n in range(1, splits + 1)]
        tiles.append(replace(tiles[0], persistent=True))
        if groups == 1 and block_n <= 160:
            tiles.append(replace(tiles[0], blocks_per_sm=2))
        for tile in tiles:
            share = tile.share(blocks)
            if tile.most_stages(share) >= min(3, share):
                found.append(tile)
    return found


def supports(call: Call) -> str | None:
    """What the tensor maps need; None when all is there."""
    args = call.args
    rows, depth = args["weight"].shape
    n = rows // 2 if call.op == "geglu" else rows
    for name, size in (("K", depth), ("N", n)):
        if size % 8 or size == 0:
            return f"{name} must be a multiple of 8 (got {size})"
    for name in ("x", "weight", "bias", "residual"):
        spec = args.get(name)
        if spec is not None and not spec.is_contiguous:
            return f"{name} must be contiguous (got strides {spec.stride})"
        if spec is not None and not spec.aligned16:
            return f"{name} must start on a 16-byte boundary"
    if args["x"].numel // depth >= 2**31:
        return f"x must have fewer than 2^31 rows (got {args['x'].numel // depth})"
    return None
