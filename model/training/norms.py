"""GroupNorm (and SiLU) with a backward in channels-last memory, as one Triton kernel each way.

PyTorch's kernels read and write NCHW: in channels-last memory each call copies its input and its
output, and SiLU is a pass of its own. On an H200 that was a third of a training step of `tiny`.

One program does a sample: two passes over its pixels, all channels at once, so that loads are whole
rows. Group sums are made of channel sums by a product with the 0/1 matrix of their groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.kernels import ops

ELEMENTS = 8192  # of a tile: 16 a thread with 16 warps, five tiles in its 128 registers


@triton.jit
def over_groups(values, padded: tl.constexpr, each: tl.constexpr, groups: tl.constexpr):
    """Sums over the channels of each group, given back to the channels: [C] -> [C]."""
    group = tl.arange(0, padded) // each
    one_hot = (group[:, None] == tl.arange(0, groups)[None, :]).to(tl.float32)
    sums = tl.sum(values[:, None] * one_hot, 0)
    return tl.sum(one_hot * sums[None, :], 1)


@triton.jit
def forward_kernel(
    x, weight, bias, out, stats, pixels, eps,
    channels: tl.constexpr, padded: tl.constexpr, groups: tl.constexpr, silu: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """x, out bf16 [B, pixels, channels]; stats float32 [B, 2, channels]: mean and 1 / deviation."""
    sample = tl.program_id(0)
    c, p = tl.arange(0, padded), tl.arange(0, block)
    real = c < channels
    each: tl.constexpr = channels // groups
    first = sample.to(tl.int64) * pixels * channels

    # Reduce
    total = tl.zeros([block, padded], tl.float32)
    squares = tl.zeros([block, padded], tl.float32)
    for start in range(0, pixels, block):
        at = start + p
        inside = (at < pixels)[:, None] & real[None, :]
        v = tl.load(x + first + at[:, None] * channels + c[None, :], inside, 0.0).to(tl.float32)
        total += v
        squares += v * v
    count = pixels * each
    mean = over_groups(tl.sum(total, 0), padded, each, groups) / count
    square = over_groups(tl.sum(squares, 0), padded, each, groups) / count
    scale = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    tl.store(stats + sample * 2 * channels + c, mean, real)
    tl.store(stats + sample * 2 * channels + channels + c, scale, real)

    # Compute
    gain = tl.load(weight + c, real, 0.0).to(tl.float32) * scale
    shift = tl.load(bias + c, real, 0.0).to(tl.float32) - mean * gain
    for start in range(0, pixels, block):
        at = start + p
        inside = (at < pixels)[:, None] & real[None, :]
        place = first + at[:, None] * channels + c[None, :]
        y = tl.load(x + place, inside, 0.0).to(tl.float32) * gain[None, :] + shift[None, :]
        if silu:
            y = y / (1 + tl.exp(-y))
        tl.store(out + place, y.to(out.dtype.element_ty), inside)


@triton.jit
def slope(x, grad, place, inside, mean, scale, w, b, silu: tl.constexpr):
    """(normalised x, gradient of weight x + bias) of a tile."""
    v = tl.load(x + place, inside, 0.0).to(tl.float32)
    g = tl.load(grad + place, inside, 0.0).to(tl.float32)
    hat = (v - mean[None, :]) * scale[None, :]
    if silu:
        y = hat * w[None, :] + b[None, :]
        s = 1 / (1 + tl.exp(-y))
        g = g * s * (1 + y * (1 - s))
    return tl.where(inside, hat, 0.0), g


@triton.jit
def backward_kernel(
    x, grad, weight, bias, stats, grad_x, parts, pixels, batch,
    channels: tl.constexpr, padded: tl.constexpr, groups: tl.constexpr, silu: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """dx = r (w g - mean(w g) - hat mean(w g hat)); parts float32 [2, B, channels]: dw and db."""
    sample = tl.program_id(0)
    c, p = tl.arange(0, padded), tl.arange(0, block)
    real = c < channels
    each: tl.constexpr = channels // groups
    first = sample.to(tl.int64) * pixels * channels
    mean = tl.load(stats + sample * 2 * channels + c, real, 0.0)
    scale = tl.load(stats + sample * 2 * channels + channels + c, real, 0.0)
    w = tl.load(weight + c, real, 0.0).to(tl.float32)
    b = tl.load(bias + c, real, 0.0).to(tl.float32)

    # Reduce
    total = tl.zeros([block, padded], tl.float32)
    products = tl.zeros([block, padded], tl.float32)
    for start in range(0, pixels, block):
        at = start + p
        inside = (at < pixels)[:, None] & real[None, :]
        place = first + at[:, None] * channels + c[None, :]
        hat, g = slope(x, grad, place, inside, mean, scale, w, b, silu)
        total += g
        products += g * hat
    of_bias, of_weight = tl.sum(total, 0), tl.sum(products, 0)
    tl.store(parts + sample * channels + c, of_weight, real)
    tl.store(parts + (batch + sample) * channels + c, of_bias, real)
    count = pixels * each
    middle = over_groups(of_bias * w, padded, each, groups) / count
    along = over_groups(of_weight * w, padded, each, groups) / count

    # Compute
    for start in range(0, pixels, block):
        at = start + p
        inside = (at < pixels)[:, None] & real[None, :]
        place = first + at[:, None] * channels + c[None, :]
        hat, g = slope(x, grad, place, inside, mean, scale, w, b, silu)
        dx = scale[None, :] * (w[None, :] * g - middle[None, :] - hat * along[None, :])
        tl.store(grad_x + place, dx.to(grad_x.dtype.element_ty), inside)


class GroupNorm(torch.autograd.Function):
    """silu(GroupNorm(x)), or without the SiLU: x [B, C, H, W], channels-last."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        batch, channels, height, width = x.shape
        out = torch.empty_like(x)
        stats = x.new_empty(batch, 2, channels, dtype=torch.float32)
        ctx.form = (channels, triton.next_power_of_2(channels), groups, silu)
        ctx.block = min(ELEMENTS // ctx.form[1], triton.next_power_of_2(height * width))
        forward_kernel[(batch,)](
            x, weight, bias, out, stats, height * width, eps, *ctx.form, ctx.block, num_warps=16
        )
        ctx.save_for_backward(x, weight, bias, stats)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, weight, bias, stats = ctx.saved_tensors
        batch, channels, height, width = x.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        parts = x.new_empty(2, batch, channels, dtype=torch.float32)
        backward_kernel[(batch,)](
            x, grad, weight, bias, stats, grad_x, parts, height * width, batch, *ctx.form,
            ctx.block, num_warps=16,
        )  # fmt: skip
        of_weight, of_bias = parts.sum(1).to(weight.dtype)
        return grad_x, of_weight, of_bias, None, None, None


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool):
    """The kernels; x is brought into channels-last memory where it is not."""
    x = x.contiguous(memory_format=torch.channels_last)
    return GroupNorm.apply(x, weight, bias, groups, eps, silu)


def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device; None if they agree with torch's there."""
    torch.manual_seed(0)
    for channels, side in ((64, 32), (96, 16), (224, 16), (160, 4), (320, 8)):
        x = torch.randn(16, channels, side, side, device=device, dtype=torch.bfloat16)
        w, b, g = torch.randn(channels), torch.randn(channels), torch.randn(x.shape)
        given = [t.to(device, torch.bfloat16) for t in (w, b, g)]
        results = []
        for own in (True, False):
            dtype = torch.bfloat16 if own else torch.float32
            leaf, weight, bias = (t.to(dtype).detach().requires_grad_() for t in (x, *given[:2]))
            try:
                if own:
                    y = group_norm(leaf, 32, weight, bias, 1e-5, True)
                else:
                    y = torch.nn.functional.silu(torch.group_norm(leaf, 32, weight, bias, 1e-5))
                y.backward(given[2].to(dtype))
            except Exception as error:  # a compiler's errors have no common class
                return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            found = (y.detach(), leaf.grad, weight.grad, bias.grad)
            results.append([t.float() for t in found if t is not None])
        for mine, truth in zip(*results, strict=True):
            off = float((mine - truth).abs().max() / truth.abs().max())
            if not off < 0.02:
                return f"{channels} channels differ by {off:.1%}"
    return None


@contextlib.contextmanager
def fused_norms(device: torch.device, wanted: bool) -> Iterator[None]:
    """Within the block, the networks' GroupNorms on this CUDA device in bfloat16 are these."""
    wanted = wanted and device.type == "cuda"
    reason = refusal(device) if wanted else None
    if reason is not None:
        print(f"GroupNorm is torch's, which is slower: the kernels failed ({reason})", flush=True)
    if not wanted or reason is not None:
        yield
        return
    with installed(device):
        yield


@contextlib.contextmanager
def installed(device: torch.device) -> Iterator[None]:
    """Within the block, ops.group_norm and ops.group_norm_silu are the kernels where they fit."""
    kept = {name: getattr(ops, name) for name in ("group_norm", "group_norm_silu")}

    def replaced(name: str):
        def run(
            x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
            eps: float = 1e-5, skip: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            fits = x.device.type == device.type and x.dtype == torch.bfloat16 and x.dim() == 4
            if fits and weight is not None and bias is not None:
                joined = x if skip is None else torch.cat((x, skip), 1)
                return group_norm(joined, groups, weight, bias, eps, name == "group_norm_silu")
            return kept[name](x, groups, weight, bias, eps, skip)

        return run

    try:
        for name in kept:
            setattr(ops, name, replaced(name))
        yield
    finally:
        for name, op in kept.items():
            setattr(ops, name, op)
