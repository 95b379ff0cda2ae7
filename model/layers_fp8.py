"""Convolutions in e4m3, each of an input that its producer rounded.

Behind a GroupNorm the pass that normalises rounds (`convolve`); where no norm stands between, the
convolution that made the image left a copy of it in e4m3 (`convolve_raw`, and shortcuts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirage_hello.kernels import conv2d_fp8, conv2d_fused, group_norm_apply
from mirage_hello.model import fp8
from mirage_hello.model.derived import derived
from mirage_hello.model.images import Eight, Image, Shortcut
from mirage_hello.model.ways import ways


def convolve(
    x: Image,
    conv: nn.Conv2d,
    statistics: conv2d_fused.Norm,
    skip: Image | None,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Shortcut | None,
    unit: int,
    scale: float,
) -> Image:
    """The convolution in e4m3: the pass that normalises its input rounds it too."""
    bias, beside = conv.bias, None
    if shortcut is None:

        def make() -> tuple[Tensor, ...]:
            with torch.no_grad():
                weight = conv2d_fp8.quantise_weight(conv.weight)
            return weight.values, weight.scales

        weight = conv2d_fp8.Weight(*derived(conv, (conv.weight,), make))
    else:
        weight, beside, bias = _beside(shortcut, conv, scale)
    h = group_norm_apply.group_norm_apply(
        x.pixels, statistics, skip and skip.pixels, out_scale=scale
    )
    out, sums = conv2d_fp8.conv2d_fp8(
        h, weight, scale, bias, conv.stride[0], int(conv.padding[0]), channel_bias, residual,
        unit=unit, copy=(copy := copy_of(conv, h.shape)), shortcut=beside,
    )  # fmt: skip
    return Image(out, sums, copy and Eight(*copy), conv)


def convolve_raw(
    x: Image,
    conv: nn.Conv2d,
    skip: Image | None,
    upsample: bool,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    unit: int,
) -> Image | None:
    """The convolution in e4m3 of what no norm reads; None: an input has no copy in e4m3."""
    inputs = eights(x, skip)
    if inputs is None:
        return None

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            weight = conv2d_fp8.quantise_weight(_in_units(conv.weight, inputs))
        return weight.values, weight.scales

    weight = conv2d_fp8.Weight(*derived(conv, (conv.weight,), make, _number(inputs)))
    stride, padding = conv.stride[0], int(conv.padding[0])
    batch, _, *sides = inputs[0].values.shape
    shape = (batch, 0, *((2 * n if upsample else -(-n // stride)) for n in sides))
    out, sums = conv2d_fp8.conv2d_fp8(
        inputs[0].values, weight, 1.0, conv.bias, stride, padding, channel_bias, residual,
        inputs[1].values if skip is not None else None, upsample, unit=unit,
        copy=(copy := copy_of(conv, shape)),
    )  # fmt: skip
    return Image(out, sums, copy and Eight(*copy), conv)


def _beside(
    shortcut: Shortcut, conv: nn.Conv2d, scale: float
) -> tuple[conv2d_fp8.Weight, conv2d_fused.Shortcut, Tensor | None]:
    """The weight of a convolution whose input has this scale, its shortcut as the kernel takes it,
    with the same scale for each output channel, and the two biases as one."""
    inputs = eights(shortcut.x, shortcut.skip)
    assert inputs is not None
    biases = tuple(c.bias for c in (conv, shortcut.conv) if c.bias is not None)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide, short = conv.weight.float(), _in_units(shortcut.conv.weight, inputs) / scale
            rows = torch.cat([wide.flatten(1), short.flatten(1)], 1)
            both = conv2d_fp8.quantise_weight(rows[:, :, None, None])
            values, others = both.values.flatten(1).split([wide[0].numel(), short.shape[1]], 1)
            layout = torch.channels_last
            values = values.reshape(wide.shape).contiguous(memory_format=layout)
            others = others.reshape(short.shape).contiguous(memory_format=layout)
            bias = [torch.stack([b.float() for b in biases]).sum(0).to(biases[0].dtype)]
        return (values, others, both.scales, *(bias if biases else ()))

    sources = (conv.weight, shortcut.conv.weight, *biases)
    values, others, scales, *bias = derived(conv, sources, make, scale + _number(inputs))
    skip = inputs[1].values if len(inputs) > 1 else None
    beside = conv2d_fused.Shortcut(inputs[0].values, others, skip)
    return conv2d_fp8.Weight(values, scales), beside, bias[0] if bias else None


def eights(x: Image, skip: Image | None) -> list[Eight] | None:
    """The copies in e4m3 of what is read without a norm; None: not all of them are there."""
    images = [x] if skip is None else [x, skip]
    found = [image.eight for image in images if image.eight is not None]
    return found if ways().e4m3_raw and len(found) == len(images) else None


def _in_units(weight: Tensor, inputs: list[Eight]) -> Tensor:
    """A weight [O, C + C', R, S] in float32 with each input's scale in its channels."""
    parts = weight.float().split([eight.values.shape[1] for eight in inputs], 1)
    return torch.cat([w * i.scale for w, i in zip(parts, inputs, strict=True)], 1)


def _number(inputs: list[Eight]) -> float:
    """What `derived` knows scales by."""
    return sum((i + 1) * eight.scale for i, eight in enumerate(inputs))


def copy_of(conv: nn.Conv2d, shape: Sequence[int]) -> tuple[Tensor, float] | None:
    """Memory for the copy in e4m3 of this layer's output, shape [B, anything, P, Q], and its scale;
    None: nothing reads it in e4m3."""
    scale = fp8.output_scale_of(conv) if ways().e4m3_raw else None
    if scale is None or conv.out_channels % 16:
        return None
    shape = (shape[0], conv.out_channels, *shape[2:])
    device, layout = conv.weight.device, torch.channels_last
    copy = torch.empty(shape, dtype=conv2d_fp8.E4M3, device=device, memory_format=layout)
    return copy, scale
