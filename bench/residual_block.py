"""residual_block: GroupNorm+SiLU, convolution with the time bias, GroupNorm+SiLU, convolution + x.

Stable Diffusion's block at equal widths, batch 1, NHWC, named as its convolutions are in conv2d.py.
FLOPs: two 3x3 convolutions of 2 C^2 9 S^2 each. Bytes: x and the result C S^2, both filters 9 C^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import ops
from mirage_hello.kernels.parity import exact_float32, in_float64, judge

from . import peers
from .case import Draw
from .harness import Function, measure
from .model import (
    MODEL_SECONDS,
    Unit,
    chosen_kernels,
    compile_seconds,
    model_dtype,
    model_failure,
    model_row,
    under,
)
from .rows import STEP_SECONDS, Begin, Options, Outcome

CASES = ((320, 64), (640, 32), (1280, 16))  # (channels, size) of Stable Diffusion's
SMALL = ((32, 16),)


def units(options: Options, limits: dict[str, Any]) -> Iterator[Unit]:
    """A row for each block; the small one on a CPU."""
    for channels, size in CASES if options.device == "cuda" else SMALL:
        case = f"{channels}->{channels} @{size}"
        where = {"op": "residual_block", "case": case, "dtype": model_dtype(options)}
        yield Unit(where, _measured(where, channels, size, options, limits))


def _block(fn: Any, x: Tensor, bias: Tensor, w1: Tensor, w2: Tensor, norm: Tensor, b: Tensor):
    """conv(silu(norm(conv(silu(norm(x))) + bias))) + x, by the functions of `fn`."""
    h = fn.group_norm_silu(x, 32, norm, b, 1e-5)
    h = fn.conv2d(h, w1, b, 1, 1, bias, None)
    h = fn.group_norm_silu(h, 32, norm, b, 1e-5)
    return fn.conv2d(h, w2, b, 1, 1, None, x)


def _measured(
    where: dict[str, str], channels: int, size: int, options: Options, limits: dict[str, Any]
):
    """GroupNorm+SiLU, conv + time bias, GroupNorm+SiLU, conv + residual; batch 1, NHWC."""

    def run(begin: Begin, lost: Any) -> Outcome:
        begin("build and parity", MODEL_SECONDS)
        inputs = _block_inputs(Draw(options.device, dtype, options.seed), channels, size)
        reference = {op: getattr(ops, op).reference for op in ("group_norm_silu", "conv2d")}
        plain = under("torch", lambda: _block(ops, *inputs))
        ours = under("auto", lambda: _block(ops, *inputs))
        with torch.no_grad(), exact_float32(), chosen_kernels() as chosen:
            truth = _block(SimpleNamespace(**reference), *in_float64(inputs))
            parity = judge(ours(), plain(), truth)
        numbers = {"error": parity.error, "allowed": parity.allowed}
        if not parity.passed:
            return model_failure(where, numbers)
        eager = SimpleNamespace(**peers.EAGER)
        contenders: dict[str, Function] = {
            "torch-eager": lambda: _block(eager, *inputs),
            "ours": ours,
        }
        if options.device == "cuda" and "torch-compile" not in lost:
            begin("torch-compile", compile_seconds(options))
            compiled = torch.compile(
                lambda *args: _block(eager, *args), fullgraph=True, dynamic=False
            )
            with torch.no_grad():
                compiled(*inputs)
            contenders["torch-compile"] = lambda: compiled(*inputs)
        begin("timing", STEP_SECONDS)
        timings = measure(contenders, options.device, effort=options.effort)
        flops = 2 * 2 * channels**2 * 9 * size**2
        moved = (2 * channels * size**2 + 2 * 9 * channels**2) * dtype.itemsize
        row = model_row(where, timings, (flops, moved), limits)
        return Outcome(rows=[row | {"parity": numbers, "kernels": chosen, "layout": "nhwc"}])

    dtype = getattr(torch, where["dtype"])
    return run


def _block_inputs(draw: Draw, channels: int, size: int) -> tuple[Tensor, ...]:
    """x, time bias [1, C], the two filters, the norms' weight and the biases [C]."""
    scale = (9 * channels) ** -0.5
    return (
        draw.image(1, channels, size, size),
        draw.normal(1, channels),
        draw.image(channels, channels, 3, 3, scale=scale),
        draw.image(channels, channels, 3, 3, scale=scale),
        draw.normal(channels),
        draw.normal(channels),
    )
