"""The calls of a function that ask for tiles, recorded as they are made.

It runs once, op by op, with every function that has tiles wrapped: in the registry, and where
layers call it by name. What it is called with is copied, once for each key that it asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import (
    conv2d_fp8,
    conv2d_fused,
    conv2d_sm90a,
    forget_choices,
    group_norm_apply,
    linear_sm90a,
    ops,
    tuning,
)
from mirage_hello.kernels.parity import Parity, judge

from .tune import Run, copied, requests


def held_against_its_own(run: Run, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Parity]:
    """A judge by the output of the tile in use: another order of sums moves a rounding, no more."""

    @functools.cache
    def truth() -> Tensor:
        with torch.no_grad():
            out = run(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def held(out: Tensor) -> Parity:
        plain = truth()
        if out.dtype == torch.float8_e4m3fn:  # steps of 1/8: another order of sums crosses a few
            return rounded(out.float(), plain.float())
        return judge(out, plain, plain.double())

    return held


def rounded(out: Tensor, plain: Tensor) -> Parity:
    """Of values that were e4m3: 1 % of the norm, and no value further than one step."""
    difference = (out - plain).double()
    error = (difference.norm() / plain.double().norm().clamp_min(1e-30)).item()
    steps = (difference.abs() / plain.abs().clamp_min(2.0**-6)).max().item()
    return Parity(error, 0.01, steps, 0.13)


@contextlib.contextmanager
def recorded() -> Iterator[dict[tuple[str, str], tuple[Run, tuple, dict[str, Any]]]]:
    """Collects (op, key) -> the first call that asks it, its tensors copied."""
    calls: dict[tuple[str, str], tuple[Run, tuple, dict[str, Any]]] = {}

    def recording(run: Run) -> Run:
        @functools.wraps(run)
        def noted(*args: Any, **kwargs: Any) -> Any:
            for request in requests(run, args, kwargs):
                if (request.op, request.key) not in calls:
                    copies = tuple(map(copied, args)), {k: copied(v) for k, v in kwargs.items()}
                    calls[request.op, request.key] = (run, *copies)
            return run(*args, **kwargs)

        return noted

    patch = unittest.mock.patch
    with contextlib.ExitStack() as stack:
        fused = recording(conv2d_sm90a.conv2d_fused_sm90a)  # by name, and in a table
        for module in (conv2d_sm90a, conv2d_fp8):
            stack.enter_context(patch.object(module, "conv2d_fused_sm90a", fused))
        stack.enter_context(patch.dict(conv2d_fused.BACKENDS, ptx=fused))
        apply = recording(group_norm_apply.group_norm_apply)
        stack.enter_context(patch.object(group_norm_apply, "group_norm_apply", apply))
        for name in (
            "normed",
            "scaled",
            "softmaxed",
            "linear_summed",
            "scaled_summed",
        ):  # called by name
            run = recording(getattr(linear_sm90a, name))
            stack.enter_context(patch.object(linear_sm90a, name, run))
        for op in ops:
            kernels = [
                dataclasses.replace(k, run=recording(k.run)) if tuning.has_tiles(k.run) else k
                for k in op.kernels
            ]
            stack.enter_context(patch.object(op, "kernels", kernels))
        forget_choices()
        yield calls
    forget_choices()
