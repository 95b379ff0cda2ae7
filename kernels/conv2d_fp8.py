"""conv2d_fp8: convolution on e4m3 tensors, an explicit choice on Hopper.

    out = act(x_scale w_scale[o] conv(x, weight) + bias + channel_bias + residual), bfloat16

x carries one scale, found once by `calibrate` over a clip; the weight has one for each output
channel. Not an op of the registry: nothing chooses it for you, since its error is that of 3
mantissa bits: 2.6 to 3.0 % of an output's norm on random inputs, against 0.17 % in bfloat16.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels.conv2d_fused import Shortcut, check, check_call, check_shortcut
from mirage_hello.kernels.conv2d_norm import Norm
from mirage_hello.kernels.conv2d_sm90a import conv2d_fused_sm90a
from mirage_hello.kernels.conv2d_tiles import Tile

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # finite value of e4m3


@dataclass(frozen=True)
class Weight:
    """A quantised weight: values e4m3 [O, C, R, S], channels-last; scales float32 [O]."""

    values: Tensor
    scales: Tensor


def quantise_weight(weight: Tensor) -> Weight:
    """values = weight / scales[o], scales[o] = max |weight[o]| / 448.

    Args:
        weight: [O, C, R, S], C a multiple of 16.

    Raises:
        ValueError: C is no multiple of 16, which TMA's strides need.
    """
    if weight.shape[1] % 16:
        raise ValueError(f"conv2d_fp8: C must be a multiple of 16 (got {weight.shape[1]}); pad it")
    scales = weight.float().abs().amax((1, 2, 3)).clamp_min(1e-12) / LARGEST
    values = quantise(weight, scales[:, None, None, None])
    return Weight(values.contiguous(memory_format=torch.channels_last), scales)


def quantise(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale rounded to e4m3, clamped to what it holds; the layout of x."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def calibrate(clip: Iterable[Tensor], headroom: float = 1.0) -> float:
    """One scale for an activation: headroom * max |x| / 448 over a clip.

    Args:
        clip: the activation at every frame, any shapes.
        headroom: above 1 where later frames may be larger; values past the range are clamped.

    Raises:
        ValueError: an empty clip, or one of zeros.
    """
    largest = max((x.abs().max().item() for x in clip), default=0.0)
    if not 0 < largest < float("inf"):
        raise ValueError(
            f"conv2d_fp8: the clip's largest value must be finite and above 0 (got {largest})"
        )
    return headroom * largest / LARGEST


def conv2d_fp8(
    x: Tensor,
    weight: Weight,
    x_scale: float,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: reference.Padding = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    upsample: bool = False,
    norm: Norm | None = None,
    unit: int = 0,
    activation: str | None = None,
    tile: Tile | None = None,
    copy: tuple[Tensor, float] | None = None,
    shortcut: Shortcut | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out = act(x_scale w_scale[o] conv(cat([x, skip]), weight) + bias + channel_bias + residual).

    Args:
        x, skip: e4m3 [B, C, H, W] and [B, C', H, W], channels-last, C and C' multiples of 16; both
            with x_scale. With a norm: bfloat16, and x_scale is that of the normalised input, which
            is rounded to e4m3 in shared memory: nothing else is quantised.
        weight: of quantise_weight.
        bias [O], channel_bias [B, O], residual [B, O, P, Q]: bfloat16, as in ops.conv2d.
        norm, unit, activation: as in conv2d_fused.
        tile: overrides the choice.
        shortcut: as in conv2d_fused, of e4m3 tensors; its products count x_scale w_scale[o] too, so
            its inputs' scales are in its weight; D and D' multiples of 16.
        copy: None, or an e4m3 tensor like out and its scale: it takes e4m3(out / scale), saturated.

    Returns:
        (out, sums): bfloat16 [B, O, P, Q], channels-last, and the sums of conv2d_fused.

    Raises:
        TypeError: x is not e4m3, or with a norm not bfloat16. Else as conv2d_fused.
        ValueError: a copy that is not like out, or its scale not above 0.

    Numerics: products exact; wgmma keeps about 14 bits of their sums, which are added in float32
        after every few K blocks (`Tile.promote`).
    """
    expected = E4M3 if norm is None else torch.bfloat16
    if x.dtype != expected:
        advice = "use quantise" if norm is None else "a norm reads bfloat16"
        raise TypeError(f"conv2d_fp8: x must be {expected} (got {x.dtype}); {advice}")
    values = {
        "x": x, "weight": weight.values, "bias": bias, "stride": stride, "padding": padding,
        "channel_bias": channel_bias, "residual": residual, "skip": skip, "upsample": upsample,
    }  # fmt: skip
    check_call("conv2d_fp8", values, on_ptx=True)
    check(x, weight.values, skip, norm, unit, activation)
    if shortcut is not None:
        check_shortcut(values, shortcut, norm, on_ptx=True)
        if any(t.shape[1] % 16 for t in shortcut.inputs):
            sizes = [t.shape[1] for t in shortcut.inputs]
            raise ValueError(f"conv2d_fp8: a shortcut's channels must be multiples of 16 ({sizes})")
    if copy is not None:
        _check_copy(*copy, (x.shape[0], len(weight.values)), x.device)
    return conv2d_fused_sm90a(
        x, weight.values, bias, stride, padding, channel_bias, residual, skip, upsample,
        norm=norm, unit=unit, activation=activation, scales=weight.scales,
        x_scale=x_scale, tile=tile, copy=copy, shortcut=shortcut,
    )  # fmt: skip


def _check_copy(copy: Tensor, scale: float, start: tuple[int, int], device: torch.device) -> None:
    fits = copy.dtype == E4M3 and tuple(copy.shape[:2]) == start and copy.device == device
    if not fits or not copy.is_contiguous(memory_format=torch.channels_last) or not scale > 0:
        raise ValueError(
            f"conv2d_fp8: a copy must be e4m3 [{start[0]}, {start[1]}, P, Q], channels-last, on "
            f"{device}, with a scale above 0 (got {copy.dtype} {list(copy.shape)}, {scale})"
        )


def conv2d_fp8_torch(x: Tensor, weight: Weight, x_scale: float, *args: Any) -> Tensor:
    """ops.conv2d's reference on the dequantised tensors, in float64; args follow the weight's."""
    wide = weight.values.double() * weight.scales.double()[:, None, None, None]

    def exact(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.double() * (x_scale if value.dtype == E4M3 else 1.0)

    return reference.conv2d(exact(x), wide, *map(exact, args))
