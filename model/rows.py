"""Layers over rows of tokens: the transformers' products, fused as far as the kernels here reach.

Where `ways.fused_backend` says so, a LayerNorm is folded into the linear layer behind it, which
takes mean and spread from sums that the rows' producer left (kernels/layer_norm_linear.py); a
prompt's keys and values are folded with the weights around them (kernels/prompt_attention.py); and
the last two products of a transformer are one. Where a layer was calibrated (`fp8`), the producer
of its rows leaves a copy of them in e4m3 beside those sums, and the layer multiplies that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirage_hello.kernels import (
    conv2d_fp8,
    conv2d_fused,
    group_norm_apply,
    layer_norm_linear,
    linear_fp8,
    linear_sm90a,
    ops,
    prompt_attention,
)
from mirage_hello.kernels.row_sums import RowSums
from mirage_hello.model import fp8, row_weights
from mirage_hello.model.images import Eight, Image
from mirage_hello.model.layers import convolve, leaves_sums, normalise, statistics_of
from mirage_hello.model.layers_fp8 import copy_of
from mirage_hello.model.ways import fused_backend, ways


class Tokens(NamedTuple):
    """Rows [B, N, C], and the sums that their producer left for a LayerNorm, or None."""

    rows: Tensor
    sums: RowSums | None = None


class Keys(NamedTuple):
    """Keys and values [B, L, 2 C] of the conditioning tokens for one cross-attention, what
    `prompt_attention.fold` made of them, or None, and that in e4m3, or None."""

    keys_values: Tensor
    prompt: prompt_attention.Prompt | None = None
    eight: prompt_attention.Fp8Prompt | None = None

    def tensors(self) -> list[Tensor]:
        """All there are."""
        found = [self.keys_values]
        if self.prompt is not None:
            found += [self.prompt.scores, self.prompt.columns, self.prompt.values]
        if self.eight is not None:
            scores, values = self.eight.scores, self.eight.values
            found += [scores.weight, scores.columns, scores.factor, values.weight, values.columns]
        return found


def project_in(x: Image, conv: nn.Conv2d, norm: nn.GroupNorm, reader: nn.Linear) -> Tokens:
    """conv(norm(x)) of a 1x1 convolution, without SiLU, its pixels as rows; reader: the layer
    behind the LayerNorm that reads them, here and below."""
    backend = fused_backend(x.pixels)
    statistics = statistics_of(x, None, norm, silu=False) if backend else None
    if backend == "ptx" and statistics is not None:
        scale, copy_scale = fp8.scale_of(conv), _copy_scale(reader)
        if scale is not None and copy_scale is not None:
            q = group_norm_apply.group_norm_apply(x.pixels, statistics, out_scale=scale)
            packed = row_weights.packed(conv, conv.weight.flatten(1), conv.bias, scale)
            return Tokens(*linear_fp8.linear_fp8_summed(_rows(q), packed, None, copy_scale))
    if statistics is not None and 1 in ways().on_load:
        return Tokens(_rows(convolve(x, conv, norm, norm_silu=False).pixels))
    h = _rows(normalise(x, norm, silu=False).pixels)
    fp8.note(conv, h)
    return _linear(h, conv.weight.flatten(1), conv.bias, reader=reader)


def project(x: Tokens, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """linear(layer_norm(x)), x [B, N, K]."""
    if x.sums is not None and x.sums.copy is not None:
        return linear_fp8.layer_norm_linear_fp8(
            x.sums, row_weights.fp8_folded(linear, norm), norm.eps
        )
    fp8.note(linear, x.rows)
    backend = _folds(x.rows, linear.in_features, linear.out_features)
    if backend is None:
        rows = ops.layer_norm(x.rows, norm.weight, norm.bias, norm.eps)
        return ops.linear(rows, linear.weight, linear.bias)
    folded = row_weights.folded(linear, norm)
    if backend == "ptx":
        return layer_norm_linear.layer_norm_linear(x.rows, folded, eps=norm.eps, sums=x.sums)
    return layer_norm_linear.layer_norm_linear_torch(x.rows, folded, eps=norm.eps)


def project_out(heads: Tensor, linear: nn.Linear, h: Tokens, reader: nn.Linear) -> Tokens:
    """h + linear(heads)."""
    return _linear(heads.flatten(2), linear.weight, linear.bias, h.rows, reader=reader)


def fold_prompt(
    keys_values: Tensor, to_q: nn.Linear, out: nn.Linear, norm: nn.LayerNorm, heads: int
) -> Keys:
    """The keys and values, and where kernels here take it and it pays the prompt folded: two
    products of heads x width columns in the place of q, attention and the projection out."""
    tokens, channels = keys_values.shape[1], to_q.in_features
    width = prompt_attention.width_of(tokens)
    small = width is not None and heads * width <= 2 * channels
    if not small or len(keys_values) > 1 or _folds(keys_values, channels, channels, True) != "ptx":
        return Keys(keys_values)
    if not prompt_attention.proven(keys_values.device, keys_values.dtype):
        return Keys(keys_values)
    with torch.no_grad():
        prompt = prompt_attention.fold(
            norm.weight, norm.bias, to_q.weight, keys_values[0], out.weight, heads
        )
        scale = _copy_scale(to_q)
        if scale is None or heads * prompt.width % 16:
            return Keys(keys_values, prompt)
        return Keys(keys_values, prompt, prompt_attention.quantise(prompt, scale, out.bias))


def attend_prompt(
    h: Tokens,
    keys: Keys,
    to_q: nn.Linear,
    out: nn.Linear,
    norm: nn.LayerNorm,
    reader: nn.Linear,
) -> Tokens | None:
    """h + out(attention) of a folded prompt; None: it is not folded, or not to be used."""
    if keys.prompt is None:
        return None
    if fused_backend(h.rows, "attention") != "ptx" or not ways().prompts:
        return None
    if keys.eight is not None and h.sums is not None and h.sums.copy is not None:
        p = prompt_attention.probabilities_fp8(h.sums, keys.eight, norm.eps)
        scale = _copy_scale(reader)
        return Tokens(*linear_fp8.linear_fp8_summed(p, keys.eight.values, h.rows, scale))
    fp8.note(to_q, h.rows)
    p = prompt_attention.probabilities(h.rows, keys.prompt, norm.eps, h.sums)
    return _linear(p, keys.prompt.values, out.bias, h.rows, reader=reader)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    reader: nn.Linear,
) -> Tokens:
    """x weight^T + bias + residual, with sums where a LayerNorm folded into its reader wants them,
    and a copy in e4m3 where that multiplies in it."""
    if _folds(x, len(weight), reader.out_features) == "ptx" and ways().row_sums:
        scale = _copy_scale(reader)
        return Tokens(*linear_sm90a.linear_summed(x, weight, bias, residual, copy_scale=scale))
    return Tokens(ops.linear(x, weight, bias, residual=residual))


def gated(x: Tokens, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """geglu(layer_norm(x)), x [B, N, K]."""
    fp8.note(linear, x.rows)
    backend = _folds(x.rows, linear.in_features, linear.out_features)
    if backend is None:
        rows = ops.layer_norm(x.rows, norm.weight, norm.bias, norm.eps)
        return ops.geglu(rows, linear.weight, linear.bias)
    folded = row_weights.folded(linear, norm)
    if backend == "ptx":
        return layer_norm_linear.layer_norm_geglu(x.rows, folded, norm.eps, sums=x.sums)
    return layer_norm_linear.layer_norm_geglu_torch(x.rows, folded, norm.eps)


def feed_forward(h: Tokens, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """h + out(geglu(layer_norm(h)))."""
    scale = fp8.scale_of(out)
    x = None if scale is None else _gated_fp8(h, gate, norm, scale)
    if x is None or scale is None:
        x = gated(h, gate, norm)
        fp8.note(out, x)
        return ops.linear(x, out.weight, out.bias, residual=h.rows)
    return linear_fp8.linear_fp8(x, row_weights.packed(out, out.weight, out.bias, scale), h.rows)


def _gated_fp8(h: Tokens, gate: nn.Linear, norm: nn.LayerNorm, scale: float) -> Tensor | None:
    """e4m3(geglu(layer_norm(h)) / scale); None: not with the kernels of this place."""
    if _folds(h.rows, gate.in_features, gate.out_features, always=True) != "ptx":
        return None
    if h.sums is not None and h.sums.copy is not None:
        eight = row_weights.fp8_folded(gate, norm)
        return linear_fp8.layer_norm_geglu_fp8(h.sums, eight, scale, norm.eps)
    return layer_norm_linear.layer_norm_geglu(
        h.rows, row_weights.folded(gate, norm), norm.eps, out_scale=scale, sums=h.sums
    )


def feed_forward_out(
    h: Tokens, x: Image, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm, proj: nn.Conv2d,
    unit: int,
) -> Image | None:  # fmt: skip
    """x + proj(h + out(g)), g = geglu(layer_norm(h)), as x + [proj out, proj] [g, h]: one product
    where there were two, and one rounding less. None: as two, another way.
    """
    backend, width = fused_backend(h.rows), h.rows.shape[-1]
    if backend is None or width % 8 or width < ways().merges_from:
        return None
    if not unit or not leaves_sums(x.pixels, proj):
        unit = 0
    scale = fp8.scale_of(out)
    if scale is not None or fp8.in_use(out):
        return None if scale is None else _feed_forward_out_fp8(h, x, gate, out, norm, proj, unit)
    g = gated(h, gate, norm)
    fp8.note(out, g)
    weight, bias = row_weights.merged(out, proj)
    args = (1, 0, None, x.pixels, _pixels(h.rows, x))
    if not unit:
        return Image(ops.conv2d(_pixels(g, x), weight, bias, *args), maker=proj)
    return Image(
        *conv2d_fused.conv2d_fused(_pixels(g, x), weight, bias, *args, unit=unit, backend=backend),
        maker=proj,
    )


def _feed_forward_out_fp8(
    h: Tokens, x: Image, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm, proj: nn.Conv2d,
    unit: int,
) -> Image | None:  # fmt: skip
    """The same of g and h in e4m3; their scales are in the weight, so that they may differ."""
    scale, h_scale = fp8.scale_of(out), _copy_scale(gate)
    copy = None if h.sums is None else h.sums.copy
    if scale is None or h_scale is None or copy is None or not ways().e4m3_merges:
        return None
    g = _gated_fp8(h, gate, norm, scale)
    if g is None:
        return None
    weight, bias = row_weights.merged_fp8(out, proj, (scale, h_scale))
    image, sums = conv2d_fp8.conv2d_fp8(
        _pixels(g, x), weight, 1.0, bias,
        residual=x.pixels, skip=_pixels(copy, x), unit=unit,
        copy=(eight := copy_of(proj, x.pixels.shape)),
    )  # fmt: skip
    return Image(image, sums, eight and Eight(*eight), proj)


def _copy_scale(reader: nn.Linear) -> float | None:
    """The scale of the rows' copy in e4m3 for this layer behind a LayerNorm; None: it reads the
    rows themselves."""
    return fp8.scale_of(reader) if ways().e4m3_rows else None


def _folds(x: Tensor, depth: int, columns: int, always: bool = False) -> str | None:
    """How a LayerNorm is folded into the layer [columns, depth] behind it. The kernel takes K in
    blocks of 64; the gate halves N."""
    backend = None if depth % 64 or columns % 16 else fused_backend(x, "linear")
    if backend is None or always:
        return backend
    least = ways().folds_q_from if columns == depth else ways().folds_from
    return backend if depth >= least else None


def _rows(pixels: Tensor) -> Tensor:
    """[B, C, H, W], channels-last, as [B, HW, C]: a view."""
    return pixels.permute(0, 2, 3, 1).flatten(1, 2)


def _pixels(rows: Tensor, like: Image) -> Tensor:
    """[B, HW, C] as [B, C, H, W], channels-last: a view."""
    return rows.unflatten(1, like.pixels.shape[2:]).permute(0, 3, 1, 2)
