"""Rows of the model: unet_step and (in `frames`) frame.

Every way of running is timed in one process, in turn:
    torch-eager     the torch backend, NHWC, called op by op (the registry's dispatch included,
                    at most 3 us an op)
    cuda-graph      the same captured in one CUDA graph
    diffusers-eager, diffusers-graph
                    diffusers' UNet2DConditionModel with the same weights, where it is installed
    torch-compile   torch.compile(fullgraph=True, mode="reduce-overhead"), its compile time kept
    ours            the best kernel for each op (policy "auto") in one CUDA graph; the row itself
Parity: error against the float32 model (float64 for a float32 row), which may be at most 2 x that
of the plain model in the row's dtype.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mirage_hello.kernels import forget_choices, use
from mirage_hello.kernels.parity import exact_float32
from mirage_hello.model import build

from . import diffusers_peers
from .case import Draw
from .harness import Function, Timing, measure
from .rows import STEP_SECONDS, Begin, Options, Outcome

MODEL_SECONDS = 180.0  # building the largest model, selecting and proving its kernels
FACTOR = 8  # pixels to latents


@dataclass(frozen=True)
class Unit:
    """One row of the model, measured by `run(begin, lost)`."""

    where: dict[str, str]
    run: Callable[[Begin, Any], Outcome]


def units(group: str, options: Options, limits: dict[str, Any]) -> Iterator[Unit]:
    """What a group of the model measures: "unet_step" or "frame"."""
    from . import frames

    dtype = model_dtype(options)
    models = Models(options)
    height, width = options.size
    name = f"{options.preset} {width}x{height}"
    if group == "unet_step":
        where = {"op": group, "case": name, "dtype": dtype}
        yield Unit(where, _unet_step(where, models, limits))
        return
    for steps in options.steps:
        case = f"{name} {steps} step{'s' if steps > 1 else ''}"
        where = {"op": group, "case": case, "dtype": dtype}
        yield Unit(where, frames.frame_row(where, models, steps))


def model_dtype(options: Options) -> str:
    """bfloat16 on a GPU, float32 on a CPU, or the one dtype asked for."""
    if options.dtypes:
        return options.dtypes[0]
    return "bfloat16" if options.device == "cuda" else "float32"


class Models:
    """The models of one process, each built when it is first needed, from one seed."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.dtype = getattr(torch, model_dtype(options))
        is_float32 = self.dtype == torch.float32
        self.reference_dtype = torch.float64 if is_float32 else torch.float32

    def _build(self, dtype: torch.dtype):
        return build(self.options.preset, self.options.seed, dtype, self.options.device)

    @cached_property
    def plain(self):
        """(denoiser, autoencoder) in the row's dtype: eager, graph and ours share the weights."""
        return self._build(self.dtype)

    @cached_property
    def compiled(self):
        """A second pair, for torch.compile."""
        return self._build(self.dtype)

    @cached_property
    def diffusers(self):
        """diffusers' U-Net with the weights of `plain`, and its autoencoder."""
        return diffusers_peers.denoiser(self.plain[0]), self.plain[1]

    @cached_property
    def image_to_image(self):
        """The U-Net for torch.compile with TAESD's shape of autoencoder."""
        return self.compiled[0], diffusers_peers.TinyAutoencoder(self.compiled[1])

    @cached_property
    def reference(self):
        """The pair in float32, or in float64 where the row is in float32."""
        return self._build(self.reference_dtype)


@contextlib.contextmanager
def chosen_kernels() -> Iterator[dict[str, list[str]]]:
    """Collects op -> kernels that `auto` chooses within the block, from the registry's log."""
    chosen: dict[str, list[str]] = {}

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and len(record.args) == 3:
                op, _, kernel = map(str, record.args)
                if kernel not in chosen.setdefault(op, []):
                    chosen[op].append(kernel)

    log, collector = logging.getLogger("mirage_hello"), Collector()
    level = log.level
    log.addHandler(collector)
    log.setLevel(logging.INFO)
    forget_choices()  # a cached choice is not logged again
    try:
        yield chosen
    finally:
        log.removeHandler(collector)
        log.setLevel(level)


def under(policy: str, function: Function) -> Function:
    """`function` with the ops following `policy`."""

    def run() -> Tensor:
        with use(policy):
            return function()

    return run


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64; infinite where anything is not finite."""
    out, truth = out.double(), truth.double()
    error = ((out - truth).norm() / truth.norm()).item()
    return error if error == error else float("inf")


# ------------------------------------------------------------------------------- U-Net step


def _unet_step(where: dict[str, str], models: Models, limits: dict[str, Any]):
    """One call of the U-Net: time embedding, cross-attention keys and the network, batch 1."""

    def run(begin: Begin, lost: Any) -> Outcome:
        begin("build and parity", MODEL_SECONDS)
        options, dtype = models.options, models.dtype
        unet = models.plain[0].unet
        inputs = unet_inputs(unet.config, options, dtype)
        plain = under("torch", lambda: unet(*inputs))
        ours = under("auto", lambda: unet(*inputs))
        with torch.no_grad(), chosen_kernels() as chosen:
            truth = _unet_truth(models, options)
            plain_error, error = relative_error(plain(), truth), relative_error(ours(), truth)
            with use("torch"), FlopCounterMode(display=False) as counter:
                unet(*inputs)
        allowed = 2 * plain_error
        parity = {"error": error, "allowed": allowed, "plain_error": plain_error}
        if not error <= allowed:
            return model_failure(where, parity)
        contenders: dict[str, Function] = {"torch-eager": plain, "ours": ours}
        extra: dict[str, Any] = {"parity": parity, "kernels": chosen}
        plainly = {"torch-eager"}
        if diffusers_peers.available():
            contenders["diffusers-eager"] = theirs = _diffusers_step(models, inputs)
            plainly.add("diffusers-eager")
        if options.device == "cuda":
            contenders["cuda-graph"] = plain
            if diffusers_peers.available():
                contenders["diffusers-graph"] = theirs
            if "torch-compile" not in lost:
                begin("torch-compile", compile_seconds(options))
                compiled, extra["compile_seconds"] = _compiled_step(models, inputs)
                contenders["torch-compile"] = compiled
                plainly.add("torch-compile")
        begin("timing", STEP_SECONDS)
        timings = measure(contenders, options.device, effort=options.effort, plainly=plainly)
        extra["prepared_us"] = _prepared_us(unet, inputs, options)
        weight_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
        work = counter.get_total_flops(), weight_bytes
        return Outcome(rows=[model_row(where, timings, work, limits) | extra])

    return run


def _diffusers_step(models: Models, inputs: tuple[Tensor, ...]) -> Function:
    """The step by diffusers' own modules, with the same weights."""
    x, timesteps, context, level = inputs
    unet = models.diffusers[0].unet
    return lambda: unet(x, unet.noise_biases(timesteps, level), unet.context_keys(context))


def _prepared_us(unet: Any, inputs: tuple[Tensor, ...], options: Options) -> dict[str, Any]:
    """The network alone, as a stream runs it: what depends on the noise level and on the prompt
    was computed before. Ours, and torch's kernels in a CUDA graph.
    """
    x, timesteps, context, level = inputs
    with torch.no_grad():
        biases, keys = unet.noise_biases(timesteps, level), unet.context_keys(context, lasting=True)
        network = {
            "ours": under("auto", lambda: unet(x, biases, keys)),
            "cuda-graph": under("torch", lambda: unet(x, biases, keys)),
        }
        timings = measure(network, options.device, effort=options.effort)
    return {name: timing.percentiles_us for name, timing in timings.items()}


def unet_inputs(config: Any, options: Options, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, timesteps, context and history noise of one step; the same values in every dtype."""
    height, width = (side // FACTOR for side in options.size)
    draw = Draw(options.device, torch.float32, options.seed)
    x = draw.image(1, config.in_channels, height, width)
    context = draw.normal(1, config.context_tokens, config.context_dim)
    level = torch.tensor([0.05], device=options.device)
    timesteps = torch.tensor([601.0], device=options.device)
    return x.to(dtype), timesteps, context.to(dtype), level


def _unet_truth(models: Models, options: Options) -> Tensor:
    unet = models.reference[0].unet
    with use("torch"), exact_float32():
        return unet(*unet_inputs(unet.config, options, models.reference_dtype))


def _compiled_step(models: Models, inputs: tuple[Tensor, ...]) -> tuple[Function, float]:
    """The step under torch.compile with its own CUDA graphs, and the seconds to get there."""
    compiled = torch.compile(models.compiled[0].unet, fullgraph=True, mode="reduce-overhead")
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(3):  # compiles, warms up, records its graph
            compiled(*inputs)
    torch.cuda.synchronize()
    # The next replay overwrites what a replay returned, so the output is copied; 64 KiB.
    return lambda: compiled(*inputs).clone(), time.perf_counter() - started


def compile_seconds(options: Options) -> float:
    """What torch.compile may take: never more than half of what is left of the budget."""
    return max(30.0, min(options.compile_seconds, 0.5 * (options.deadline - time.time())))


# ------------------------------------------------------------------------------------ rows


def model_row(
    where: dict[str, str],
    timings: dict[str, Timing],
    work: tuple[int, int],
    limits: dict[str, Any],
) -> dict[str, Any]:
    """The row of "ours", with the other ways as its peers; work is (FLOPs, bytes)."""
    ours = timings["ours"]
    flops, moved = work
    rates = limits["matrix_tflops"]
    matrix_us = flops / rates.get(where["dtype"], rates["float32"]) * 1e-6
    bound_us = max(matrix_us, moved / limits["copy_gbps"] * 1e-3)
    return {
        **where,
        "backend": "auto",
        "time_us": ours.percentiles_us,
        "tflops": flops / ours.median_us * 1e-6,
        "gbps": moved / ours.median_us * 1e-3,
        "fraction_of_ceiling": bound_us / ours.median_us,
        "peers": {name: t.median_us for name, t in timings.items() if name != "ours"},
        "kernel": f"{where['op']}/auto",
        "cache": "hot",
        "how": ours.how,
        "calls": ours.calls,
        "flops": flops,
        "bytes": moved,
        "samples_us": [round(sample, 3) for sample in ours.samples_us],
        "peer_how": {name: t.how for name, t in timings.items() if name != "ours"},
    }


def model_failure(where: dict[str, str], parity: dict[str, float]) -> Outcome:
    reason = f"error {parity['error']:.2e} of {parity['allowed']:.2e} allowed"
    failure = {**where, "backend": "auto", "kernel": f"{where['op']}/auto", "reason": reason}
    return Outcome(failures=[failure])
