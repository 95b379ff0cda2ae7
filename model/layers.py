"""Layers over images: each call is fused as far as the kernels here reach.

Without a gradient, in half precision and where the policy leads to the sm_90a kernels, a
convolution leaves the sums that the next GroupNorm needs (kernels/conv2d_fused.py), which then
reads its input once, or not at all where the next convolution normalises what it loads. Everywhere
else the same layer is a chain of registry ops. `rows` has the layers of the transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_hello.kernels import conv2d_fused, group_norm_apply, ops
from mirage_hello.model import fp8, layers_fp8
from mirage_hello.model.derived import derived
from mirage_hello.model.images import Image, Shortcut
from mirage_hello.model.ways import fused_backend, ways

CHANNELS = 8  # TMA moves 16 bytes: channels of a convolution come in multiples of 8


def convolve(
    x: Image,
    conv: nn.Conv2d,
    norm: nn.GroupNorm | None = None,
    *,
    skip: Image | None = None,
    upsample: bool = False,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    unit: int = 0,
    norm_silu: bool = True,
    shortcut: Shortcut | None = None,
) -> Image:
    """act(conv(silu(norm(cat([x, skip])))) + channel_bias + residual), as one launch where it can.

    Args:
        x, skip: what is convolved, side by side along the channels.
        conv, norm: the parameters; without a norm x is read as it is.
        upsample: double the image first, nearest neighbour.
        channel_bias: [B, O]. residual: [B, O, P, Q].
        silu: of the result. unit: channels that share a sum in the result; 0: no sums.
        norm_silu: whether SiLU follows the norm.
        shortcut: added, in the place of a residual.
    """
    backend = fused_backend(x.pixels)
    if norm is None:
        _note_outputs(x, skip)
        if backend == "ptx" and not silu and shortcut is None and fp8.in_use(conv):
            raw = layers_fp8.convolve_raw(x, conv, skip, upsample, channel_bias, residual, unit)
            if raw is not None:
                return raw
    if shortcut is not None:
        _note_outputs(shortcut.x, shortcut.skip)
    if shortcut is not None and not _folds_shortcut(backend, x, conv, shortcut):
        residual = convolve(shortcut.x, shortcut.conv, skip=shortcut.skip).pixels
        shortcut = None
    statistics = None
    stride, padding = conv.stride[0], int(conv.padding[0])
    if backend is not None and unit and not leaves_sums(x.pixels, conv, 2 if upsample else 1):
        unit = 0
    if norm is not None:
        if backend is not None:
            scale = fp8.scale_of(conv) if backend == "ptx" else None
            if scale is not None or conv.kernel_size[0] in ways().on_load:
                statistics = statistics_of(x, skip, norm, norm_silu)
            if statistics is not None and scale is not None:
                more = (channel_bias, residual, shortcut, unit, scale)
                return layers_fp8.convolve(x, conv, statistics, skip, *more)
        if statistics is None:
            x, skip = normalise(x, norm, skip, norm_silu), None
            fp8.note(conv, x.pixels)
    weight, bias = (conv.weight, conv.bias) if backend is None else padded(conv)
    pixels, outputs = _pad_channels(x.pixels, weight, skip), conv.out_channels
    args = (stride, padding, channel_bias, residual, skip and skip.pixels, upsample)
    beside = None
    if shortcut is not None:
        beside, bias = _beside(shortcut, conv)
    if backend is None or not (statistics or silu or unit or beside):
        out = _first_channels(ops.conv2d(pixels, weight, bias, *args), outputs)
        return Image(ops.silu(out) if silu else out, maker=conv)
    out, sums = conv2d_fused.conv2d_fused(
        pixels, weight, bias, *args, norm=statistics, unit=unit,
        activation="silu" if silu else None, shortcut=beside, backend=backend,
    )  # fmt: skip
    return Image(_first_channels(out, outputs), sums, maker=conv)


def _folds_shortcut(backend: str | None, x: Image, conv: nn.Conv2d, shortcut: Shortcut) -> bool:
    """Whether a shortcut's 1x1 convolution becomes more of K of this one; in e4m3 of copies."""
    if backend is None or not ways().shortcuts or 3 in ways().on_load:
        return False
    if fp8.in_use(conv):
        multiplies = backend == "ptx" and fp8.scale_of(conv) is not None and x.sums is not None
        return multiplies and layers_fp8.eights(shortcut.x, shortcut.skip) is not None
    window = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    return window == (3, 1, 1) and conv.out_channels % CHANNELS == 0


def _beside(shortcut: Shortcut, conv: nn.Conv2d) -> tuple[conv2d_fused.Shortcut, Tensor | None]:
    """The shortcut as the kernel takes it, and the two biases as one."""
    biases = tuple(c.bias for c in (conv, shortcut.conv) if c.bias is not None)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (torch.stack([b.float() for b in biases]).sum(0).to(biases[0].dtype),)

    bias = derived(shortcut.conv, biases, make)[0] if biases else None
    skip = None if shortcut.skip is None else shortcut.skip.pixels
    return conv2d_fused.Shortcut(shortcut.x.pixels, shortcut.conv.weight, skip), bias


def leaves_sums(x: Tensor, conv: nn.Conv2d, enlarged: int = 1) -> bool:
    """Whether a convolution of x, enlarged so many times, leaves sums of what it makes."""
    batch, _, *sides = x.shape
    rows, columns = (-(-n * enlarged // conv.stride[0]) for n in sides)
    # What normalises and rounds for a convolution in e4m3 takes sums.
    return batch * rows * columns >= ways().sums_from or fp8.in_use(conv)


def _note_outputs(*images: Image | None) -> None:
    """While a clip is calibrated: the largest value of images that are read without a norm."""
    for image in images:
        if image is not None and image.maker is not None:
            fp8.note_output(image.maker, image.pixels)


def normalise(x: Image, norm: nn.GroupNorm, skip: Image | None = None, silu: bool = True) -> Image:
    """silu(GroupNorm(cat([x, skip]))), of the sums where their producers left them."""
    backend = fused_backend(x.pixels)
    statistics = statistics_of(x, skip, norm, silu) if backend else None
    if statistics is not None:
        apply = group_norm_apply.torch_form
        if backend == "ptx":
            apply = group_norm_apply.group_norm_apply
        return Image(apply(x.pixels, statistics, skip and skip.pixels))
    op = ops.group_norm_silu if silu else ops.group_norm
    args = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    return Image(op(x.pixels, *args) if skip is None else op(x.pixels, *args, skip.pixels))


def statistics_of(
    x: Image, skip: Image | None, norm: nn.GroupNorm, silu: bool = True
) -> conv2d_fused.Norm | None:
    """The norm with the sums of its input; None where a producer left none."""
    if x.sums is None or (skip is not None and skip.sums is None):
        return None
    skip_sums = None if skip is None else skip.sums
    return conv2d_fused.Norm(
        x.sums, norm.num_groups, norm.weight, norm.bias, skip_sums, norm.eps, silu
    )


def padded(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with zeros up to multiples of 8 channels in and out: 28 -> 320 is 32 -> 320,
    320 -> 4 is 320 -> 8, and both run on the tensor cores."""
    weight, bias = conv.weight, conv.bias
    missing_out, missing_in = -conv.out_channels % CHANNELS, -conv.in_channels % CHANNELS
    if not missing_out and not missing_in:
        return weight, bias

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide = F.pad(weight, (0, 0, 0, 0, 0, missing_in, 0, missing_out))
            wide = wide.contiguous(memory_format=torch.channels_last)
            return (wide,) if bias is None else (wide, F.pad(bias, (0, missing_out)))

    made = derived(conv, (weight,) if bias is None else (weight, bias), make)
    return made[0], made[1] if len(made) > 1 else None


def _first_channels(x: Tensor, count: int) -> Tensor:
    return x if x.shape[1] == count else x[:, :count]


def _pad_channels(x: Tensor, weight: Tensor, skip: Image | None) -> Tensor:
    missing = weight.shape[1] - x.shape[1] - (0 if skip is None else skip.pixels.shape[1])
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
