"""linear, geglu and variants on Hopper: the launch and the tile of ptx/linear.sm90a.ptx.j2."""

from dataclasses import replace

import torch
from torch import Tensor

from mirage_hello.kernels import tuning
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.linear_tile import SMEM_BYTES, Tile
from mirage_hello.kernels.row_sums import RowSums, row_statistics
from mirage_hello.ptx import loader

__all__ = [
    "RowSums",
    "Tile",
    "candidates",
    "choose_tile",
    "geglu_sm90a",
    "linear_sm90a",
    "linear_summed",
    "supports",
]

SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3"}
MAX_DEPTH = 4096  # of a row that a warp of row_statistics holds in registers
WIDTHS = (32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256)


def linear_sm90a(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See ops.linear; `tile` overrides the choice."""
    return _launch("linear", x, weight, bias, residual, tile)[0]


def linear_summed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, RowSums]:
    """(ops.linear, the sums of its rows), for layer_norm_linear's `sums`.

    Raises:
        ValueError: what `supports` refuses of linear.
    """
    _check("linear_summed", "linear", x, weight, bias, residual, 8)
    out, sums = _launch("linear", x, weight, bias, residual, tile, summed=True)
    assert sums is not None
    return out, sums


def geglu_sm90a(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """See ops.geglu; a tile of block_n holds block_n / 2 columns of h and the same of the gate."""
    return _launch("geglu", x, weight, bias, None, tile)[0]


def normed(
    op: str,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    residual: Tensor | None,
    eps: float,
    tile: Tile | None = None,
    out_scale: float | None = None,
    sums: RowSums | None = None,
) -> Tensor:
    """linear or geglu of rstd (x weight^T - mean s) + b; columns: [N, 2] float32, (s, b).

    out_scale: the output is e4m3(value / out_scale); without residual.
    sums: of x, by the linear that made it; None: a kernel of its own takes mean and rstd.

    Raises:
        ValueError: what `supports` refuses of linear, K above MAX_DEPTH, sums of other rows.
    """
    _check(f"layer_norm_{op}", op, x, weight, columns, residual, 8)
    _check_norm(f"layer_norm_{op}", op, x, sums)
    if out_scale is not None and (residual is not None or len(columns) % 32 or out_scale <= 0):
        raise ValueError(
            f"layer_norm_{op}: e4m3 output needs N a multiple of 16, no residual and a scale above "
            f"0 (got weight {tuple(weight.shape)}, scale {out_scale})"
        )
    if sums is None:
        statistics = row_statistics(x, eps)
        return _launch(op, x, weight, columns, residual, tile, statistics, out_scale)[0]
    return _launch(op, x, weight, columns, residual, tile, None, out_scale, (sums, eps))[0]


def softmaxed(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    width: int,
    eps: float,
    sums: RowSums | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """2^y / sum of 2^y over every `width` neighbouring columns of y = `normed`("linear", ...).

    A column whose addend is -1e30 has no part in it.

    Raises:
        ValueError: as `normed`; N no multiple of width, width no multiple of 8 or above 256, or
            one of which no tile, or not the given one, holds whole softmaxes.
    """
    n, depth = weight.shape
    if width % 8 or not 0 < width <= 256 or n % width:
        raise ValueError(
            f"softmaxed: width must be a multiple of 8 up to 256 that divides N (got {width}, "
            f"N={n}); pad the columns"
        )
    held = [block_n for block_n in WIDTHS if block_n % width == 0]
    if not held or (tile is not None and (tile.split > 1 or tile.block_n not in held)):
        raise ValueError(
            f"softmaxed: {tile or 'no tile'} holds whole softmaxes of {width} columns; choose a "
            f"tile that is not split, of a width in {held}, or pad the columns"
        )
    _check("softmaxed", "linear", x, weight, columns, None, 8)
    _check_norm("softmaxed", "linear", x, sums)
    tile = tile or choose_softmax_tile(x.numel() // depth, n, -(-depth // 64), width)
    statistics = row_statistics(x, eps) if sums is None else None
    merged = None if sums is None else (sums, eps)
    return _launch(
        "linear", x, weight, columns, None, tile, statistics, merged=merged, softmax=width
    )[0]


def choose_softmax_tile(rows: int, n: int, blocks: int, width: int) -> Tile:
    """As choose_tile, among the tiles that hold whole softmaxes."""

    def fits(tile: Tile) -> bool:
        return tile.split == 1 and tile.block_n % width == 0

    return tuning.tile_for(
        "linear_softmax",
        {"m": rows, "n": n, "blocks": blocks, "width": width},
        lambda: [tile for tile in candidates(blocks, norm=True) if fits(tile)],
        lambda tile: tile.clocks(rows, n, blocks),
    )


def scaled(
    x: Tensor, weight: Tensor, columns: Tensor, residual: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """f (x weight^T) + b + residual of float8_e4m3fn; columns: [N, 2] float32, (f, b).

    Raises:
        ValueError: K not a multiple of 16, or what `supports` refuses of linear.
    """
    _check("linear_fp8", "linear", x, weight, columns, residual, 16)
    return _launch("linear", x, weight, columns, residual, tile)[0]


def _check(
    name: str,
    op: str,
    x: Tensor,
    weight: Tensor,
    columns: Tensor | None,
    residual: Tensor | None,
    depth_multiple: int,
) -> None:
    rows, depth = weight.shape
    n = rows // 2 if op == "geglu" else rows
    if n % 8 or n == 0 or depth % depth_multiple or x.shape[-1] != depth:
        raise ValueError(
            f"{name}: N must be a multiple of 8, K of {depth_multiple} and that of x "
            f"(got x {tuple(x.shape)}, weight {tuple(weight.shape)})"
        )
    for what, t in (("x", x), ("weight", weight), ("columns", columns), ("residual", residual)):
        if t is not None and (not t.is_contiguous() or t.data_ptr() % 16):
            raise ValueError(f"{name}: {what} must be contiguous and start on 16 bytes; clone it")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: weight must have x's dtype (got {weight.dtype} and {x.dtype})")
    expected = (*x.shape[:-1], n)
    if residual is not None and residual.shape != expected:
        raise ValueError(
            f"{name}: residual must be {expected} (got {tuple(residual.shape)}); it is added to "
            "the result"
        )


def _check_norm(name: str, op: str, x: Tensor, sums: RowSums | None) -> None:
    depth = x.shape[-1]
    if not 0 < depth <= MAX_DEPTH:
        raise ValueError(
            f"{name}: K must be 1 to {MAX_DEPTH} (got {depth}); use layer_norm, then {op}"
        )
    if sums is None:
        return
    values, expected = sums.values, (x.numel() // depth, -(-depth // sums.width), 2)
    fits = values.shape == expected and values.dtype == torch.float32
    if not fits or not values.is_contiguous() or values.device != x.device:
        raise ValueError(
            f"{name}: sums of {sums.width} columns must be contiguous float32 {expected} on "
            f"{x.device} (got {values.dtype} {tuple(values.shape)}, strides {values.stride()}, on "
            f"{values.device}); have x's linear make them"
        )


def _launch(
    op: str,
    x: Tensor,
    weight: Tensor,
    vector: Tensor | None,
    residual: Tensor | None,
    tile: Tile | None,
    statistics: Tensor | None = None,
    out_scale: float | None = None,
    merged: tuple[RowSums, float] | None = None,
    summed: bool = False,
    softmax: int = 0,
) -> tuple[Tensor, RowSums | None]:
    """The output and, where `summed`, the sums of its rows.

    vector: the bias, or (factor, addend) of each column. softmax: columns of one, 0: none.
    statistics: of x's rows; `merged`: their sums and eps instead.
    """
    norm = statistics is not None or merged is not None
    gated, fp8 = op == "geglu", x.dtype == torch.float8_e4m3fn
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    quantised = out_scale is not None
    dtype = torch.float8_e4m3fn if quantised else torch.bfloat16 if fp8 else x.dtype
    out = torch.empty(*x.shape[:-1], n, dtype=dtype, device=x.device)
    rows, depth = out.numel() // n, weight.shape[1]
    per_block = 128 // x.element_size()
    blocks = -(-depth // per_block)
    tile = tile or choose_tile(op, rows, n, blocks, norm, fp8, quantised)
    problem = tile.problem(gated, norm, quantised)
    if problem or blocks < tile.split:
        problem = problem or f"{blocks} K blocks cannot be split over {tile.split}"
        raise ValueError(f"{op}: {tile}: {problem}; choose another tile")
    sums = None
    if summed:
        width = tile.width(gated)
        values = torch.empty(rows, -(-n // width), 2, dtype=torch.float32, device=x.device)
        sums = RowSums(values, width)
    if out.numel() == 0:
        return out, sums
    tiles, tiles_x = tile.tiles(rows, n, gated)
    tile = tile.fitted(tile.loads(tiles, blocks), gated, norm or fp8, residual is not None)
    x_rows, weight_rows = tile.boxes(gated)
    pitch = (depth * x.element_size(),)
    maps = (
        loader.tensor_map(x, (per_block, x_rows), dims=(depth, rows), strides=pitch),
        loader.tensor_map(weight, (per_block, weight_rows)),
    )
    reciprocal = -(-(2**63) // tiles_x)
    of_x = (merged[0].values, merged[1]) if merged else (statistics,)
    added = (*of_x, residual, sums and sums.values)
    short = SHORT_NAME[x.dtype]
    scale = () if out_scale is None else (1.0 / out_scale,)
    options = norm or fp8, residual is not None, quantised
    merging = merged[0].variables(depth) if merged else {}
    program(op, tile, short, norm, *options[1:], summed, softmax, **merging).launch(
        f"{op}{'_norm' * norm}{'_softmax' * bool(softmax)}{'_to_e4m3' * quantised}_{short}",
        grid=(tile.grid(tiles),),
        block=(tile.threads,),
        args=(
            *maps, vector, *(a for a in added if a is not None), reciprocal, out, n, rows, blocks,
            tiles, tiles_x, *scale,
        ),
        smem_bytes=tile.layout(tile.stages or 1, gated, *options)["BYTES"],
    )  # fmt: skip
    return out, sums


def program(
    op: str,
    tile: Tile,
    dtype: str,
    norm: bool = False,
    residual: bool = False,
    quantised: bool = False,
    summed: bool = False,
    softmax: int = 0,
    **merging: int | str,
) -> loader.Program:
    """The program of a fitted tile; `merging`: RowSums.variables of a norm's input."""
    variables = tile.variables(op == "geglu", norm or dtype == "e4m3", residual, quantised)
    variables |= {"ROW_SUMS": summed, "SOFTMAX": softmax, "SUM_PARTS": 0, **merging}
    return loader.program("linear.sm90a", OP=op, dtype=dtype, NORM=norm, **variables)


def choose_tile(
    op: str,
    rows: int,
    n: int,
    blocks: int,
    norm: bool = False,
    fp8: bool = False,
    quantised: bool = False,
) -> Tile:
    """The measured tile of this shape, else the one with the least estimated time (docs/linear.md).

    Args:
        op: linear or geglu.
        rows, n: of the output.
        blocks: K blocks of 128 bytes.
        norm: shares its measurements with the plain op: the product is the same.
        fp8, quantised: variants that are tuned under names of their own.
    """
    gated = op == "geglu"
    return tuning.tile_for(
        op + ("_fp8" if fp8 else "") + ("_to_e4m3" if quantised else ""),
        {"m": rows, "n": n, "blocks": blocks},
        lambda: candidates(blocks, gated, norm, quantised),
        lambda tile: tile.clocks(rows, n, blocks, gated),
    )


def candidates(
    blocks: int, gated: bool = False, norm: bool = False, quantised: bool = False
) -> list[Tile]:
    """Every tile whose registers and shared memory fit."""
    found = []
    for block_n in WIDTHS:
        tiles = [Tile(1, block_n), Tile(2, block_n), Tile(1, block_n, 2)]
        tiles += [Tile(2, block_n, m, pingpong=True) for m in (1, 2)]
        tiles += [Tile(g, block_n, split=s) for g in (1, 2) for s in range(2, min(blocks, 8) + 1)]
        tiles += [replace(t, shared=s) for t in tiles if t.split == 1 for s in ("weight", "x")]
        tiles = [t for t in tiles if not t.problem(gated, norm, quantised)]
        found += [t for t in tiles if _fits(t, blocks, gated, norm)]
    return found


def _fits(tile: Tile, blocks: int, gated: bool, norm: bool) -> bool:
    """Whether three stages fit beside a residual, or as many as there are K blocks."""
    stages = min(3, max(2, -(-blocks // tile.split)))
    needed = tile.layout(stages, gated, norm, residual=not gated)["BYTES"]
    return needed <= SMEM_BYTES


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
