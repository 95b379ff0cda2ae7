"""linear, geglu and variants on Hopper: what ptx/linear.sm90a.ptx.j2 takes, checked.

`linear_launch` launches it, `linear_tile` chooses its tile.
"""

from dataclasses import replace

from torch import Tensor, float8_e4m3fn, float32

from mirage_hello.kernels.call import Call
from mirage_hello.kernels.linear_launch import Product, program
from mirage_hello.kernels.linear_tile import (
    WIDTHS,
    Tile,
    candidates,
    choose_softmax_tile,
    choose_tile,
)
from mirage_hello.kernels.row_sums import RowSums, row_statistics

__all__ = [
    "WIDTHS",
    "RowSums",
    "Tile",
    "candidates",
    "choose_softmax_tile",
    "choose_tile",
    "geglu_sm90a",
    "linear_sm90a",
    "linear_summed",
    "normed",
    "program",
    "scaled",
    "scaled_summed",
    "softmaxed",
    "supports",
]

MAX_DEPTH = 4096  # of a row that a warp of row_statistics holds in registers


def linear_sm90a(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See ops.linear; `tile` overrides the choice."""
    return Product("linear", x, weight, bias, residual).launch(tile)[0]


def linear_summed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    copy_scale: float | None = None,
) -> tuple[Tensor, RowSums]:
    """(ops.linear, the sums of its rows), for layer_norm_linear's `sums`.

    copy_scale: beside the output its copy e4m3(out / copy_scale), in the sums' `copy`.

    Raises:
        ValueError: what `supports` refuses of linear.
    """
    _check("linear_summed", "linear", x, weight, bias, residual, 8)
    return _summed(Product("linear", x, weight, bias, residual, copy_scale=copy_scale), tile)


def geglu_sm90a(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """See ops.geglu; a tile of block_n holds block_n / 2 columns of h and the same of the gate."""
    return Product("geglu", x, weight, bias).launch(tile)[0]


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
    factor: Tensor | None = None,
) -> Tensor:
    """linear or geglu of rstd (x weight^T - mean s) + b; columns: [N, 2] float32, (s, b).

    out_scale: the output is e4m3(value / out_scale); without residual.
    sums: of x, by the linear that made it; None: a kernel of its own takes mean and rstd.
    factor: float32 [1], of e4m3 x and weight what their products are multiplied by; with sums.

    Raises:
        ValueError: what `supports` refuses of linear, K above MAX_DEPTH, sums of other rows.
    """
    name = f"layer_norm_{op}"
    _check(name, op, x, weight, columns, residual, 16 if factor is not None else 8)
    _check_norm(name, op, x, sums, factor)
    if out_scale is not None and (residual is not None or len(columns) % 32 or out_scale <= 0):
        raise ValueError(
            f"{name}: e4m3 output needs N a multiple of 16, no residual and a scale above "
            f"0 (got weight {tuple(weight.shape)}, scale {out_scale})"
        )
    statistics = row_statistics(x, eps) if sums is None else None
    given = (op, x, weight, columns, residual, statistics, sums, eps, factor)
    return Product(*given, out_scale=out_scale).launch(tile)[0]


def softmaxed(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    width: int,
    eps: float,
    sums: RowSums | None = None,
    tile: Tile | None = None,
    factor: Tensor | None = None,
    out_scale: float | None = None,
) -> Tensor:
    """2^y / sum of 2^y over every `width` neighbouring columns of y = `normed`("linear", ...).

    A column whose addend is -1e30 has no part in it.

    Raises:
        ValueError: as `normed`; N no multiple of width, width no multiple of 8 or above 256, or
            one of which no tile, or not the given one, holds whole softmaxes.
    """
    n = len(weight)
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
    _check("softmaxed", "linear", x, weight, columns, None, 16 if factor is not None else 8)
    _check_norm("softmaxed", "linear", x, sums, factor)
    statistics = row_statistics(x, eps) if sums is None else None
    given = ("linear", x, weight, columns, None, statistics, sums, eps, factor)
    product = Product(*given, out_scale=out_scale, softmax=width)
    kinds = product.fp8, out_scale is not None
    return product.launch(tile or choose_softmax_tile(*product.shape, width, *kinds))[0]


def scaled(
    x: Tensor, weight: Tensor, columns: Tensor, residual: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """f (x weight^T) + b + residual of float8_e4m3fn; columns: [N, 2] float32, (f, b).

    Raises:
        ValueError: K not a multiple of 16, or what `supports` refuses of linear.
    """
    _check("linear_fp8", "linear", x, weight, columns, residual, 16)
    return Product("linear", x, weight, columns, residual).launch(tile)[0]


def scaled_summed(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    residual: Tensor | None,
    tile: Tile | None = None,
    copy_scale: float | None = None,
) -> tuple[Tensor, RowSums]:
    """(`scaled`, the sums of its rows), as linear_summed.

    Raises:
        ValueError: as `scaled`.
    """
    _check("linear_fp8", "linear", x, weight, columns, residual, 16)
    return _summed(Product("linear", x, weight, columns, residual, copy_scale=copy_scale), tile)


def _summed(product: Product, tile: Tile | None) -> tuple[Tensor, RowSums]:
    if product.copy_scale is not None and not product.copy_scale > 0:
        raise ValueError(
            f"linear_summed: copy_scale must be above 0 (got {product.copy_scale}); calibrate it"
        )
    out, sums = replace(product, summed=True).launch(tile)
    assert sums is not None
    return out, sums


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


def _check_norm(name: str, op: str, x: Tensor, sums: RowSums | None, factor: Tensor | None) -> None:
    depth = x.shape[-1]
    if not 0 < depth <= MAX_DEPTH:
        raise ValueError(
            f"{name}: K must be 1 to {MAX_DEPTH} (got {depth}); use layer_norm, then {op}"
        )
    eight = x.dtype == float8_e4m3fn
    if eight != (factor is not None) or (eight and sums is None):
        raise ValueError(
            f"{name}: x of e4m3, sums of it and a factor go together (got {x.dtype}, "
            f"{'no ' * (sums is None)}sums, {'no ' * (factor is None)}factor)"
        )
    if sums is None:
        return
    values, expected = sums.values, (x.numel() // depth, -(-depth // sums.width), 2)
    fits = values.shape == expected and values.dtype == float32
    if not fits or not values.is_contiguous() or values.device != x.device:
        raise ValueError(
            f"{name}: sums of {sums.width} columns must be contiguous float32 {expected} on "
            f"{x.device} (got {values.dtype} {tuple(values.shape)}, strides {values.stride()}, on "
            f"{values.device}); have x's linear make them"
        )


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
