"""conv2d on Hopper: the launch of ptx/conv2d.sm90a.ptx.j2."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirage_hello.kernels.call import Call, TensorSpec
from mirage_hello.kernels.conv2d_norm import Norm, merged_early, norm_args
from mirage_hello.kernels.conv2d_tiles import Tile, candidates, choose_tile
from mirage_hello.ptx import loader
from mirage_hello.reference import Padding, sides

__all__ = ["candidates", "choose_tile", "conv2d_fused_sm90a", "conv2d_sm90a", "program", "supports"]

SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16"}


class Shortcut(NamedTuple):
    """A 1x1 convolution that is added: weight [O, D + D', 1, 1] of cat([x, skip]), [B, D, P, Q] and
    [B, D', P, Q] or None, all channels-last, D and D' multiples of 8 (e4m3: of 16)."""

    x: Tensor
    weight: Tensor
    skip: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.skip is None else (self.x, self.skip)


def conv2d_sm90a(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    upsample: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """See ops.conv2d; `tile` overrides the choice."""
    args = (x, weight, bias, stride, padding, channel_bias, residual, skip, upsample)
    return conv2d_fused_sm90a(*args, tile=tile)[0]


def conv2d_fused_sm90a(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    upsample: bool = False,
    norm: Norm | None = None,
    unit: int = 0,
    activation: str | None = None,
    scales: Tensor | None = None,
    x_scale: float = 1.0,
    shortcut: Shortcut | None = None,
    tile: Tile | None = None,
    copy: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See conv2d_fused.conv2d_fused; `tile` overrides the choice.

    scales: float32 [O], of an e4m3 weight; x is e4m3 too, in units of x_scale, and out bfloat16.
        With a norm x is bfloat16, and e4m3 once it is normalised.
    copy: an e4m3 tensor like out, which takes e4m3(out / scale), and that scale.

    Raises:
        ValueError: a tile whose slices are narrower than a unit; a norm with another stride than 1;
            a copy of another shape than out.
    """
    if norm is not None and stride != 1:
        raise ValueError(
            f"conv2d_fused: a norm reads patches, which need stride 1 (got {stride}); normalise in "
            "a pass of its own"
        )
    fp8, dtype = scales is not None, torch.bfloat16 if scales is not None else x.dtype
    (batch, channels, height, width), (outputs, _, r, s) = x.shape, weight.shape
    up = 2 if upsample else 1
    before, after = sides(padding)
    p, q = ((up * n + before + after - t) // stride + 1 for n, t in ((height, r), (width, s)))
    out = torch.empty(
        (batch, outputs, p, q), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
    if copy is not None and copy[0].shape != out.shape:
        raise ValueError(
            f"conv2d_fp8: a copy must be like out, {list(out.shape)} (got {list(copy[0].shape)})"
        )
    inputs, depth = (x,) if skip is None else (x, skip), 128 if fp8 else 64
    tapped = r * s * sum(-(-t.shape[1] // depth) for t in inputs)
    short = sum(-(-t.shape[1] // depth) for t in shortcut.inputs) if shortcut else 0
    blocks = tapped + short
    grid_p, grid_q = (height, width) if upsample else (p, q)
    shape = (batch * up**2, grid_p, grid_q, outputs, blocks, r, s, stride)
    tile = tile or choose_tile(*shape, unit, 0 if norm is None else norm.groups, fp8, short)
    norm = norm and merged_early(norm, x)
    tile = replace(tile, quantises=fp8 and norm is not None)
    table_bytes = tile.table_bytes(batch, blocks, r * s, norm.groups) if norm else 0
    tile = tile.fitted(tile.share(blocks), r, s, table_bytes)
    rows = 8 * tile.warpgroups
    tiles_x, tiles_y = -(-grid_q // 8), -(-grid_p // rows)
    parts = tiles_x * tiles_y * up * up * tile.row_parts * _slots(tile, unit)
    sums = None
    if unit:
        sums = torch.empty((batch, parts, outputs // unit, 4), device=x.device)
    if out.numel() == 0:
        return out, sums
    box = (8 + s - 1, rows + r - 1, 1) if tile.patch else (8 * stride, rows * stride, 1)
    maps = (*(_pixels(t, box, stride) for t in inputs), _taps(weight, tile.block_n))
    if shortcut:
        maps += (*(_pixels(t, (8, rows, 1), 1) for t in shortcut.inputs),)
        maps += (loader.tensor_map(shortcut.weight.flatten(1), (depth, tile.block_n)),)
    tiles = (tiles_x, tiles_y * batch, -(-outputs // tile.block_n) * up * up)
    name = SHORT_NAME[dtype]
    norm_silu = None if norm is None else norm.silu
    variant = skip is not None, upsample, unit, activation == "silu", norm_silu, fp8
    beside = len(shortcut.inputs) if shortcut else 0
    program(tile, r, s, stride, name, *variant, beside, copy is not None).launch(
        f"conv2d_{name}",
        grid=tile.grid(*tiles),
        block=(128 * (tile.warpgroups + (2 if norm else 1)),),
        args=(
            *maps, *((scales, x_scale) if fp8 else ()), bias, channel_bias, residual,
            *((sums, parts) if unit else ()), out,
            *(() if copy is None else (copy[0], 1 / copy[1])), outputs,
            *((math.prod(tiles), *tiles[:2]) if tile.persistent else (tiles_x,) if unit else ()),
            blocks, p, q, tiles_y, before, channels,
            *((tapped, shortcut.x.shape[1]) if shortcut else ()),
            *(norm_args(norm, x, skip, batch if tile.persistent else 1) if norm else ()),
            *((1 / x_scale,) if tile.quantises else ()),
        ),
        smem_bytes=tile.layout(r, s)[1] + table_bytes,
    )  # fmt: skip
    return out, sums


def _slots(tile: Tile, unit: int) -> int:
    slots = tile.sum_slots(unit) if unit else 1
    if slots == 0:
        raise ValueError(
            f"conv2d: {tile} cannot sum {unit} channels: its slices have {8 * tile.octets} columns "
            "or fewer; use a tile with a smaller split"
        )
    return slots


def program(
    tile: Tile,
    r: int,
    s: int,
    stride: int,
    dtype: str,
    skip: bool = False,
    upsample: bool = False,
    unit: int = 0,
    silu: bool = False,
    norm_silu: bool | None = None,
    fp8: bool = False,
    shortcut: int = 0,
    copied: bool = False,
) -> loader.Program:
    """The program of a fitted tile; norm_silu: whether SiLU follows the norm, None without one;
    shortcut: tensors that a 1x1 convolution beside this one reads."""
    return loader.program(
        "conv2d.sm90a", R=r, S=s, STRIDE=stride, SKIP=skip, UPSAMPLE=upsample,
        PATCH=tile.patch, PATCH_STAGES=tile.patch_stages, dtype=dtype, SUMS=unit,
        SUM_SLOTS=_slots(tile, unit), SILU=silu, NORM=norm_silu is not None,
        NORM_SILU=bool(norm_silu), FP8=fp8, PROMOTE=tile.promote, SHORTCUT=shortcut,
        COPY=copied,
        **tile.variables(r, s),
    )  # fmt: skip


def _pixels(x: Tensor, box: tuple[int, ...], stride: int) -> loader.TensorMap:
    """[B, H, W, C] in memory as {C, W, H, B}, every stride-th pixel; 128 B of channels."""
    b, c, h, w = x.shape
    box = (128 // x.element_size(), *box)
    row = c * x.element_size()
    strides = (row, w * row, h * w * row)
    steps = (1, stride, stride, 1)
    return loader.tensor_map(x, box, element_strides=steps, dims=(c, w, h, b), strides=strides)


def _taps(weight: Tensor, block_n: int) -> loader.TensorMap:
    """[O, R, S, C] in memory as {C, R S, O}, boxes of one tap."""
    o, c, r, s = weight.shape
    row = c * weight.element_size()
    dims, strides = (c, r * s, o), (row, r * s * row)
    box = (128 // weight.element_size(), 1, block_n)
    return loader.tensor_map(weight, box, dims=dims, strides=strides)


def supports(call: Call) -> str | None:
    """What the tensor maps and the tile need; None when all is there."""
    args = call.args
    outputs, _, r, s = args["weight"].shape
    sizes = {"C": args["x"].shape[1], "O": outputs}
    if args["skip"] is not None:
        sizes["skip's C"] = args["skip"].shape[1]
    for name, size in sizes.items():
        if size % 8:
            return f"{name} must be a multiple of 8 (got {size})"
    padding = sides(args["padding"])
    if args["upsample"] and (r, s, args["stride"], *padding) != (3, 3, 1, 1, 1):
        got = f"{r}x{s}, stride {args['stride']}, padding {args['padding']}"
        return f"upsample needs a 3x3 window, stride 1, padding 1 (got {got})"
    for name in ("x", "weight", "residual", "skip"):
        if not _channels_last(args[name]):
            return f"{name} must be channels-last (got strides {args[name].stride})"
    for name in ("x", "weight", "bias", "channel_bias", "residual", "skip"):
        if args[name] is not None and not args[name].aligned16:
            return f"{name} must start on a 16-byte boundary"
    if args["channel_bias"] is not None and not args["channel_bias"].is_contiguous:
        return f"channel_bias must be contiguous (got strides {args['channel_bias'].stride})"
    if args["bias"] is not None and not args["bias"].is_contiguous:
        return f"bias must be contiguous (got stride {args['bias'].stride})"
    if r * s > 25 or args["stride"] > 4:
        return f"window must be at most 25 taps, stride at most 4 (got {r}x{s}, {args['stride']})"
    return _refuses_size(args)


def _channels_last(spec: Any) -> bool:
    return not isinstance(spec, TensorSpec) or spec.is_channels_last


def _refuses_size(args: Any) -> str | None:
    batch, _, height, _ = args["x"].shape
    if -(-height // 8) * batch > 65535:
        return f"B * ceil(H / 8) must be at most 65535 (got B={batch}, H={height})"
    return None
