"""Weights made of weights for the layers over rows: folded, packed in e4m3, merged.

Each is kept with its module and follows it (`derived`): in place, so that captured graphs see it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirage_hello.kernels import conv2d_fp8, layer_norm_linear, linear_fp8
from mirage_hello.model import fp8
from mirage_hello.model.derived import derived


def folded(linear: nn.Linear, norm: nn.LayerNorm) -> layer_norm_linear.FoldedLinear:
    """The LayerNorm's weights folded into the linear layer's: diag(gamma) and beta."""
    gamma, beta, weight, bias = norm.weight, norm.bias, linear.weight, linear.bias
    sources = (gamma, beta, weight) if bias is None else (gamma, beta, weight, bias)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            folded = layer_norm_linear.fold(gamma, beta, weight, bias)
        return folded.weight, folded.columns

    return layer_norm_linear.FoldedLinear(*derived(linear, sources, make))


def fp8_folded(linear: nn.Linear, norm: nn.LayerNorm) -> linear_fp8.Fp8Folded:
    """`folded` in e4m3, of a layer that was calibrated."""
    gamma, beta, weight, bias = norm.weight, norm.bias, linear.weight, linear.bias
    sources = (gamma, beta, weight) if bias is None else (gamma, beta, weight, bias)
    scale = fp8.scale_of(linear)
    assert scale is not None

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            folded = layer_norm_linear.fold(gamma, beta, weight, bias)
            eight = linear_fp8.fold(folded, scale)
        return eight.weight, eight.columns, eight.factor

    return linear_fp8.Fp8Folded(*derived(linear, sources, make, scale))


def packed(
    layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None, scale: float
) -> linear_fp8.Fp8Linear:
    """A layer in e4m3 whose input has this scale; weight: its own, as a matrix."""

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            packed = linear_fp8.pack(weight, scale, bias)
        return packed.weight, packed.columns

    sources = (layer.weight,) if bias is None else (layer.weight, bias)
    values, columns = derived(layer, sources, make, scale)
    return linear_fp8.Fp8Linear(values, columns, scale)


def merged(out: nn.Linear, proj: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """[proj out, proj] as a 1x1 convolution's weight [C, 5 C, 1, 1], and proj(out's bias)."""

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            weight, bias = _merge(out, proj)
        return (weight.to(proj.weight.dtype), *bias)

    made = derived(proj, _weights(out, proj), make)
    return made[0], made[1] if len(made) > 1 else None


def merged_fp8(
    out: nn.Linear, proj: nn.Conv2d, scales: tuple[float, float]
) -> tuple[conv2d_fp8.Weight, Tensor | None]:
    """The same in e4m3. scales: of g and of h in [g, h], which are in the weight, so that they may
    differ: the convolution's own x_scale is 1."""

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide, bias = _merge(out, proj, scales)
            packed = conv2d_fp8.quantise_weight(wide)
        return (packed.values, packed.scales, *bias)

    made = derived(proj, _weights(out, proj), make, sum(scales))
    return conv2d_fp8.Weight(*made[:2]), made[2] if len(made) > 2 else None


def _weights(*layers: nn.Linear | nn.Conv2d) -> tuple[Tensor, ...]:
    return tuple(t for layer in layers for t in (layer.weight, layer.bias) if t is not None)


def _merge(
    out: nn.Linear, proj: nn.Conv2d, scales: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """([scales[0] proj out, scales[1] proj] in float32, (proj(out's bias),) in proj's dtype)."""
    wide = proj.weight.flatten(1).float()
    both = torch.cat([scales[0] * (wide @ out.weight.float()), scales[1] * wide], 1)
    weight = both[:, :, None, None].contiguous(memory_format=torch.channels_last)
    parts = [] if out.bias is None else [wide @ out.bias.float()]
    parts += [] if proj.bias is None else [proj.bias.float()]
    bias = (sum(parts[1:], parts[0]).to(proj.weight.dtype),) if parts else ()
    return weight, bias
