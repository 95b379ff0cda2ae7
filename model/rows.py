"""Layers over rows of tokens: the transformers' products, fused as far as the kernels here reach.

Where `ways.fused_backend` says so, a LayerNorm is folded into the linear layer behind it, which
takes mean and spread from sums that the rows' producer left (kernels/layer_norm_linear.py); a
prompt's keys and values are folded with the weights around them (kernels/prompt_attention.py); and
the last two products of a transformer are one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirage_hello.kernels import (
    conv2d_fused,
    layer_norm_linear,
    linear_fp8,
    linear_sm90a,
    ops,
    prompt_attention,
)
from mirage_hello.kernels.row_sums import RowSums
from mirage_hello.model import fp8
from mirage_hello.model.derived import derived
from mirage_hello.model.layers import Image, convolve, leaves_sums, normalise
from mirage_hello.model.ways import fused_backend, ways


class Tokens(NamedTuple):
    """Rows [B, N, C], and the sums that their producer left for a LayerNorm, or None."""

    rows: Tensor
    sums: RowSums | None = None


class Keys(NamedTuple):
    """Keys and values [B, L, 2 C] of the conditioning tokens for one cross-attention, and what
    `prompt_attention.fold` made of them, or None."""

    keys_values: Tensor
    scores: Tensor | None = None
    columns: Tensor | None = None
    values: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All there are."""
        return [t for t in self if t is not None]


def project_in(x: Image, conv: nn.Conv2d, norm: nn.GroupNorm) -> Tokens:
    """conv(norm(x)) of a 1x1 convolution, without SiLU, its pixels as rows."""
    if fused_backend(x.pixels) and x.sums is not None and 1 in ways().on_load:
        h = convolve(x, conv, norm, norm_silu=False).pixels
        return Tokens(h.permute(0, 2, 3, 1).flatten(1, 2))
    h = normalise(x, norm, silu=False).pixels.permute(0, 2, 3, 1).flatten(1, 2)
    return _linear(h, conv.weight.flatten(1), conv.bias)


def project(x: Tokens, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """linear(layer_norm(x)), x [B, N, K]."""
    backend = _folds(x.rows, linear.in_features, linear.out_features)
    if backend is None:
        rows = ops.layer_norm(x.rows, norm.weight, norm.bias, norm.eps)
        return ops.linear(rows, linear.weight, linear.bias)
    folded = _folded(linear, norm)
    if backend == "ptx":
        return layer_norm_linear.layer_norm_linear(x.rows, folded, eps=norm.eps, sums=x.sums)
    return layer_norm_linear.layer_norm_linear_torch(x.rows, folded, eps=norm.eps)


def project_out(heads: Tensor, linear: nn.Linear, h: Tokens, readers: int) -> Tokens:
    """h + linear(heads); readers: columns of the layer behind the LayerNorm that reads it."""
    return _linear(heads.flatten(2), linear.weight, linear.bias, h.rows, readers)


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
    return Keys(keys_values, prompt.scores, prompt.columns, prompt.values)


def attend_prompt(
    h: Tokens, keys: Keys, out: nn.Linear, norm: nn.LayerNorm, heads: int
) -> Tokens | None:
    """h + out(attention) of a folded prompt; None: it is not folded, or not to be used."""
    if keys.scores is None or keys.columns is None or keys.values is None:
        return None
    if fused_backend(h.rows, "attention") != "ptx" or not ways().prompts:
        return None
    width = len(keys.scores) // heads
    prompt = prompt_attention.Prompt(keys.scores, keys.columns, keys.values, width)
    p = prompt_attention.probabilities(h.rows, prompt, norm.eps, h.sums)
    return _linear(p, keys.values, out.bias, h.rows, 8 * h.rows.shape[-1])


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    readers: int = 0,
) -> Tokens:
    """x weight^T + bias + residual, with sums where a LayerNorm folded into its reader wants them;
    readers: columns of that layer, 0: many."""
    width = len(weight)
    if _folds(x, width, readers or 3 * width) == "ptx" and ways().row_sums:
        return Tokens(*linear_sm90a.linear_summed(x, weight, bias, residual))
    return Tokens(ops.linear(x, weight, bias, residual=residual))


def gated(x: Tokens, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """geglu(layer_norm(x)), x [B, N, K]."""
    backend = _folds(x.rows, linear.in_features, linear.out_features)
    if backend is None:
        rows = ops.layer_norm(x.rows, norm.weight, norm.bias, norm.eps)
        return ops.geglu(rows, linear.weight, linear.bias)
    folded = _folded(linear, norm)
    if backend == "ptx":
        return layer_norm_linear.layer_norm_geglu(x.rows, folded, norm.eps, sums=x.sums)
    return layer_norm_linear.layer_norm_geglu_torch(x.rows, folded, norm.eps)


def feed_forward(h: Tokens, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """h + out(geglu(layer_norm(h)))."""
    foldable = _folds(h.rows, gate.in_features, gate.out_features, always=True)
    scale = fp8.scale_of(out) if foldable == "ptx" else None
    if scale is None:
        x = gated(h, gate, norm)
        fp8.note(out, x)
        return ops.linear(x, out.weight, out.bias, residual=h.rows)
    x = layer_norm_linear.layer_norm_geglu(
        h.rows, _folded(gate, norm), norm.eps, out_scale=scale, sums=h.sums
    )

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            packed = linear_fp8.pack(out.weight, scale, out.bias)
        return packed.weight, packed.columns

    sources = (out.weight,) if out.bias is None else (out.weight, out.bias)
    weight, columns = derived(out, sources, make, scale)
    packed = linear_fp8.Fp8Linear(weight, columns, scale)
    return linear_fp8.linear_fp8(x, packed, h.rows)


def feed_forward_out(
    h: Tokens, x: Image, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm, proj: nn.Conv2d,
    unit: int,
) -> Image | None:  # fmt: skip
    """x + proj(h + out(g)), g = geglu(layer_norm(h)), as x + [proj out, proj] [g, h]: one product
    where there were two, and one rounding less. None: as two, another way.
    """
    backend, width = fused_backend(h.rows), h.rows.shape[-1]
    if backend is None or width % 8 or fp8.in_use(out) or width < ways().merges_from:
        return None
    g = gated(h, gate, norm)
    fp8.note(out, g)
    weight, bias = _merged(out, proj)
    sides = x.pixels.shape[2:]
    pixels, skip = (t.unflatten(1, sides).permute(0, 3, 1, 2) for t in (g, h.rows))
    args = (1, 0, None, x.pixels, skip)
    if not unit or not leaves_sums(x.pixels, proj):
        return Image(ops.conv2d(pixels, weight, bias, *args))
    return Image(
        *conv2d_fused.conv2d_fused(pixels, weight, bias, *args, unit=unit, backend=backend)
    )


def _folds(x: Tensor, depth: int, columns: int, always: bool = False) -> str | None:
    """How a LayerNorm is folded into the layer [columns, depth] behind it. The kernel takes K in
    blocks of 64; the gate halves N."""
    backend = None if depth % 64 or columns % 16 else fused_backend(x, "linear")
    if backend is None or always:
        return backend
    least = ways().folds_q_from if columns == depth else ways().folds_from
    return backend if depth >= least else None


# Weights made of weights


def _folded(linear: nn.Linear, norm: nn.LayerNorm) -> layer_norm_linear.FoldedLinear:
    """The LayerNorm's weights folded into the linear layer's: diag(gamma) and beta."""
    gamma, beta, weight, bias = norm.weight, norm.bias, linear.weight, linear.bias
    sources = (gamma, beta, weight) if bias is None else (gamma, beta, weight, bias)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            folded = layer_norm_linear.fold(gamma, beta, weight, bias)
        return folded.weight, folded.columns

    return layer_norm_linear.FoldedLinear(*derived(linear, sources, make))


def _merged(out: nn.Linear, proj: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """[proj out, proj] as a 1x1 convolution's weight [C, 5 C, 1, 1], and proj(out's bias)."""
    sources = tuple(t for t in (out.weight, out.bias, proj.weight, proj.bias) if t is not None)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide = proj.weight.flatten(1).float()
            both = torch.cat([wide @ out.weight.float(), wide], 1).to(proj.weight.dtype)
            weight = both[:, :, None, None].contiguous(memory_format=torch.channels_last)
            parts = [] if out.bias is None else [wide @ out.bias.float()]
            parts += [] if proj.bias is None else [proj.bias.float()]
            if not parts:
                return (weight,)
            return weight, sum(parts[1:], parts[0]).to(proj.weight.dtype)

    made = derived(proj, sources, make)
    return made[0], made[1] if len(made) > 1 else None
