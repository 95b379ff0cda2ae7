"""The calls of one step and one frame of the model that ask for tiles, recorded as they are made.

A step runs once, op by op, with every function that has tiles wrapped: in the registry, and where
layers call it by name. What it is called with is copied, once for each key that it asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
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
    use,
)
from mirage_hello.kernels.parity import Parity, judge
from mirage_hello.model import FrameStream, fp8

from . import model
from .rows import Options
from .tune import Called, Run, copied, requests


def model_calls(options: Options) -> list[Called]:
    """Every call of one step of the model that asks for a tile, once for each key: in the model's
    dtype, and then in e4m3 where a layer can multiply in it."""
    models = model.Models(options)
    unet = models.plain[0].unet
    inputs = model.unet_inputs(unet.config, options, models.dtype)
    with torch.no_grad(), use("auto"):
        with fp8.noted() as maxima:  # before: the self-tests of the kernels make calls of their own
            unet(*inputs)
        biases = unet.noise_biases(*inputs[1::2])
        stream = FrameStream(*models.plain, graph=False)
        frame = np.zeros((*options.size, 3), np.uint8)
        stream.push_eagerly(frame)
        with recorded() as calls:
            unet(*inputs)
            stream.push_eagerly(frame)  # prepared conditions, the autoencoder
            fp8.use(unet, fp8.scales_for(unet, maxima))
            unet(inputs[0], biases, unet.context_keys(inputs[2], lasting=True))
            fp8.use(unet, {})
    return [
        Called({"op": op, "case": key, "dtype": model.model_dtype(options)}, run, args, kwargs,
               held_against_its_own(run, args, kwargs))
        for (op, key), (run, args, kwargs) in calls.items()
    ]  # fmt: skip


def held_against_its_own(run: Run, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Parity]:
    """A judge by the output of the tile in use: another order of sums moves a rounding, no more."""

    @functools.cache
    def truth() -> Tensor:
        with torch.no_grad():
            out = run(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    return lambda out: judge(out, truth(), truth().double())


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
