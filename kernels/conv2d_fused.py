"""conv2d_fused: conv2d whose input is normalised while it is read and whose output leaves with the
statistics that the next GroupNorm needs.

    out = act(conv(silu(group_norm(cat([x, skip])))) + bias + channel_bias + residual)

with a shortcut: + a 1x1 convolution of other tensors, whose K blocks follow the others' (Shortcut).

A U-Net is a chain of these. Neither the normalised tensor nor a pass for its statistics exists: a
convolution writes `sums` of its output, the next one merges those of its inputs and normalises each
input patch in shared memory, between the load and the products.

sums  float32 [B, S, C / unit, 4]: (count, mean, M2, 0) of `unit` neighbouring channels over part s
      of the image's pixels; M2 is the sum of squared deviations from that mean. Parts are whatever
      tiles the producer had, some may be empty (count 0).  They merge, in any grouping, as

          n = sum n_s,  mean = sum n_s mean_s / n,  M2 = sum M2_s + n_s (mean_s - mean)^2

A GroupNorm whose groups are multiples of `unit` channels, and skips whose widths are, can be made
of them: 10 serves every GroupNorm(32) of Stable Diffusion's U-Net, concatenated skips included.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import conv2d, conv2d_sm90a
from mirage_hello.kernels.call import Call, TensorSpec, device_arch
from mirage_hello.kernels.conv2d_norm import Norm
from mirage_hello.kernels.conv2d_sm90a import Shortcut


def conv2d_fused(
    x: Tensor,
    weight: Tensor,
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
    shortcut: Shortcut | None = None,
    backend: str = "ptx",
) -> tuple[Tensor, Tensor | None]:
    """out = act(conv(silu(group_norm(cat([x, skip])))) + bias + channel_bias + residual), and sums.

    Args:
        x, weight, bias, stride, padding, channel_bias, residual, skip, upsample: as ops.conv2d.
        norm: of the input, or None: read as it is.
        unit: channels that share a sum, even, a divisor of O; 0: no sums.
        activation: "silu" or None; of the output, before its sums.
        shortcut: (x [B, D, H, W], weight [O, D + D', 1, 1], skip or None), added like a residual;
            not with a norm, a skip, upsample or a window other than 3x3 with padding 1.
        backend: "ptx" (compute capability 9.0; CPU tensors run in the emulator) or "torch".

    Returns:
        (out, sums): [B, O, P, Q] like x, and float32 [B, S, O / unit, 4] of out as it is rounded
        (None where unit is 0).

    Raises:
        TypeError, ValueError: as ops.conv2d; what the PTX kernel does not take; sums that do not
            fit the groups; an unknown backend or activation.
    """
    run = BACKENDS.get(backend)
    if run is None:
        known = ", ".join(BACKENDS)
        raise ValueError(f"conv2d_fused: unknown backend {backend!r}; choose one of {known}")
    values = {
        "x": x, "weight": weight, "bias": bias, "stride": stride, "padding": padding,
        "channel_bias": channel_bias, "residual": residual, "skip": skip, "upsample": upsample,
    }  # fmt: skip
    check_call("conv2d_fused", values, on_ptx=backend == "ptx")
    check(x, weight, skip, norm, unit, activation)
    if shortcut is not None:
        check_shortcut(values, shortcut, norm, on_ptx=backend == "ptx")
    return run(
        x, weight, bias, stride, padding, channel_bias, residual, skip, upsample,
        norm=norm, unit=unit, activation=activation, shortcut=shortcut,
    )  # fmt: skip


def check_call(op: str, values: Mapping[str, Any], on_ptx: bool) -> None:
    """What ops.conv2d checks of its arguments, and where `on_ptx` what its kernel needs.

    e4m3 tensors stand for bfloat16 ones: their scales are the caller's to check.
    """
    specs = {n: TensorSpec.of(v) if isinstance(v, Tensor) else v for n, v in values.items()}
    for name, spec in specs.items():
        if isinstance(spec, TensorSpec) and spec.dtype == torch.float8_e4m3fn:
            specs[name] = replace(spec, dtype=torch.bfloat16)
    conv2d.check(specs)
    if not on_ptx:
        return
    x = specs["x"]
    if x.dtype not in conv2d_sm90a.SHORT_NAME:
        raise TypeError(
            f"{op}: backend ptx takes bfloat16 or float16 (got {x.dtype}); convert x and weight, "
            "or choose backend 'torch'"
        )
    arch = device_arch(x.device)
    if arch not in ("cpu", "meta", "sm_90a"):
        raise ValueError(
            f"{op}: backend ptx needs compute capability 9.0 (got {arch}); choose backend 'torch'"
        )
    reason = conv2d_sm90a.supports(Call("conv2d", specs, x.device, x.dtype, arch, False, False))
    if reason:
        raise ValueError(f"{op}: {reason}; choose backend 'torch', or ops.conv2d")


def check(
    x: Tensor, weight: Tensor, skip: Tensor | None, norm: Norm | None, unit: int, act: str | None
) -> None:
    """What ops.conv2d does not check: units, groups and sums that fit each other."""
    outputs = weight.shape[0]
    if act not in (None, "silu"):
        raise ValueError(f"conv2d_fused: activation must be 'silu' or None (got {act!r})")
    if unit < 0 or unit % 2 or (unit and outputs % unit):
        raise ValueError(
            f"conv2d_fused: unit must be even and divide O (got unit={unit}, O={outputs}); "
            "10 serves GroupNorm(32) of 320, 640 and 1280 channels"
        )
    if norm is None:
        return
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels % norm.groups:
        raise ValueError(
            f"conv2d_fused: C must be a multiple of groups (got C={channels}, "
            f"groups={norm.groups}); choose another groups"
        )
    width, parts = channels // norm.groups, [(x, norm.sums)]
    if skip is not None:
        if norm.skip_sums is None:
            raise ValueError("conv2d_fused: a skip needs norm.skip_sums; have its producer sum it")
        parts.append((skip, norm.skip_sums))
    units = {tensor.shape[1] / sums.shape[2] for tensor, sums in parts}
    if len(units) > 1 or width % units.pop():
        found = ", ".join(f"{sums.shape[2]} sums of {t.shape[1]} channels" for t, sums in parts)
        raise ValueError(
            f"conv2d_fused: groups of {width} channels need sums of one divisor of that (got "
            f"{found}); choose another unit"
        )


def check_shortcut(
    values: Mapping[str, Any], shortcut: Shortcut, norm: Norm | None, on_ptx: bool
) -> None:
    """A 1x1 convolution of the output's size, beside a plain 3x3 one."""
    x, weight = values["x"], values["weight"]
    window = (*weight.shape[2:], values["stride"], *reference.sides(values["padding"]))
    if norm or values["skip"] is not None or values["upsample"] or window != (3, 3, 1, 1, 1):
        raise ValueError(
            "conv2d_fused: a shortcut stands beside a 3x3 convolution of one tensor, stride 1, "
            f"padding 1, without norm and upsample (got window, stride, padding {window}); call "
            "it by itself and give its output as residual"
        )
    short = {"x": shortcut.x, "weight": shortcut.weight, "skip": shortcut.skip}
    more = {"bias": None, "channel_bias": None, "residual": None, "upsample": False}
    check_call("conv2d_fused", {**short, **more, "stride": 1, "padding": 0}, on_ptx)
    expected = (x.shape[0], *x.shape[2:], weight.shape[0], x.dtype)
    got = (shortcut.x.shape[0], *shortcut.x.shape[2:], len(shortcut.weight), shortcut.x.dtype)
    if got != expected or shortcut.weight.shape[2:] != (1, 1):
        raise ValueError(
            f"conv2d_fused: a shortcut must be 1x1 with B, H, W, O, dtype {expected} (got {got}, "
            f"weight {tuple(shortcut.weight.shape)})"
        )


# torch


def sums_torch(x: Tensor, unit: int) -> Tensor:
    """float32 [B, 1, C / unit, 4]: (count, mean, M2, 0) of `unit` channels over the whole image."""
    values = x.reshape(x.shape[0], x.shape[1] // unit, -1).float()
    mean = values.mean(-1)
    m2 = (values - mean[..., None]).square().sum(-1)
    count = torch.full_like(mean, values.shape[-1])
    return torch.stack([count, mean, m2, torch.zeros_like(mean)], -1)[:, None]


def scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    """(a, b), float32 [B, C + C']: group_norm(x) = a x + b, of the merged sums."""
    found = [norm.sums] if norm.skip_sums is None else [norm.sums, norm.skip_sums]
    batch, channels = norm.sums.shape[0], norm.weight.numel()
    units = [merged(s) for s in found]
    count, mean, m2 = torch.cat(units, 1).reshape(batch, norm.groups, -1, 3).unbind(-1)
    total = count.sum(-1, keepdim=True)
    centre = (count * mean).sum(-1, keepdim=True) / total
    variance = (m2 + count * (mean - centre).square()).sum(-1, keepdim=True) / total
    each = channels // norm.groups
    rstd = (variance + norm.eps).rsqrt().repeat(1, 1, each).reshape(batch, channels)
    scale = rstd * norm.weight.float()
    return scale, norm.bias.float() - centre.repeat(1, 1, each).reshape(batch, channels) * scale


def merged(sums: Tensor) -> Tensor:
    """[B, S, U, 4] to [B, U, 3]: (count, mean, M2) over all parts."""
    count, mean, m2, _ = sums.unbind(-1)
    total = count.sum(1)
    centre = (count * mean).sum(1) / total
    return torch.stack([total, centre, (m2 + count * (mean - centre[:, None]).square()).sum(1)], -1)


def conv2d_fused_torch(
    x: Tensor,
    weight: Tensor,
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
    shortcut: Shortcut | None = None,
) -> tuple[Tensor, Tensor | None]:
    """conv2d_fused by torch's operations, one after the other; sums of one part."""
    if norm is not None:
        x = x if skip is None else torch.cat([x, skip], 1)
        skip = None
        scale, shift = (t[:, :, None, None] for t in scale_and_shift(norm))
        x = (x * scale + shift).to(x.dtype)
        x = F.silu(x) if norm.silu else x
    args = (stride, padding, channel_bias, residual, skip, upsample)
    out = reference.conv2d(x, weight, bias, *args)
    if shortcut is not None:
        out = out + F.conv2d(torch.cat(shortcut.inputs, 1), shortcut.weight)
    out = F.silu(out) if activation == "silu" else out
    return out, sums_torch(out, unit) if unit else None


# PTX: kernels/conv2d_sm90a.py launches ptx/conv2d.sm90a.ptx.j2

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "ptx": conv2d_sm90a.conv2d_fused_sm90a,
    "torch": conv2d_fused_torch,
}
