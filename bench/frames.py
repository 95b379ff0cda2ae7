"""The `frame` rows: a clip pushed through FrameStream, uint8 in to uint8 out, every way there is.

One frame is timed on the host's clock from the call of `push` to its return, which waits for the
output frame: decode to the U-Net, all denoising steps and back, copies over the bus included. The
ways take turns in blocks of frames. torch-compile compiles encode, denoise and decode (fullgraph)
and is captured in the stream's own CUDA graph, which favours it over its reduce-overhead mode.
diffusers-eager and diffusers-graph have diffusers' U-Net with the same weights in the place of
ours. stream-diffusion is what StreamDiffusion (Kodaira et al., 2023) comes to at one step: image to
image through TAESD's shape of autoencoder and the same U-Net, compiled, in one CUDA graph.
cudnn-attention is ours with cuDNN's attention in the place of ours. Ours is also timed with a frame
under way (`run`): its rate, and what the host itself needs; and the microseconds of each kernel
family are listed for ours and for torch-compile.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.kernels.parity import ROUNDING, exact_float32
from mirage_hello.model import FrameStream

from . import bus, diffusers_peers, frame_profile
from .clip import played, read_clip
from .model import MODEL_SECONDS, Models, chosen_kernels, compile_seconds
from .rows import Begin, Options, Outcome

BLOCKS = 4  # each way runs a quarter of its frames, then the next way
# These run one frame in so many: they are slow, and their spread is not the question.
SHARES = {
    "torch-eager": 100,
    "diffusers-eager": 100,
    "cuda-graph": 25,
    "diffusers-graph": 25,
    "torch-compile": 10,
    "stream-diffusion": 10,
    "cudnn-attention": 10,
}
PARITY_FRAMES = 4
PROFILED_FRAMES = 10
RATE_FRAMES = 200
COUNTED_FRAMES = 600  # by the card's counters: 1.5 s
WARM_UP_FRAMES = 5
FRAME_SECONDS = 300.0


def frame_row(where: dict[str, str], models: Models, steps: int) -> Callable[..., Outcome]:
    """Measures the whole frame with `steps` denoising steps."""

    def run(begin: Begin, lost: Any) -> Outcome:
        options = models.options
        begin("build and parity", MODEL_SECONDS)
        clip, clip_name = read_clip(options)
        parity, chosen = _parity(models, steps, clip)
        outcome = Outcome()
        if not parity["error"] <= parity["allowed"]:
            outcome.failures.append(_failure(where, _numbers(parity)))
            return outcome
        begin("torch-compile", compile_seconds(options))
        streams, extra = _streams(models, steps, clip, with_compile="torch-compile" not in lost)
        begin("frames", FRAME_SECONDS)
        times_us = _run_clip(streams, clip, options)
        measured = {name: _percentiles(samples) for name, samples in times_us.items()}
        outcome.skipped += [where | reason for reason in extra.pop("left_out")]
        for name, peak_bytes in extra.pop("peak_bytes").items():
            measured[name]["peak_bytes"] = peak_bytes
        # Ours but for one kernel: no peer to be faster than.
        variants = {n: measured.pop(n) for n in ("cudnn-attention",) if n in measured}
        row = _row(where, measured, times_us["ours"]) | extra | {"parity": parity}
        row["variants"] = variants
        row |= {"kernels": chosen, "clip": clip_name, "steps": steps}
        ours = streams["ours"]
        row["under_way"] = bus.pipelined(ours, played(clip, 0, RATE_FRAMES))
        if options.device == "cuda" and "profile" not in lost:
            begin("profile", MODEL_SECONDS)
            counted = played(clip, 0, COUNTED_FRAMES)
            row["device_use"] = bus.device_use(lambda: bus.pipelined(ours, counted))
            row["host_us"] = bus.host_us(ours, played(clip, 0, RATE_FRAMES))
            row["host_us"]["threads"] = torch.get_num_threads()  # that copy a frame
            written = bus.just_written(played(clip, 0, RATE_FRAMES))
            row["host_us"]["just_written"] = bus.host_us(ours, written)
            pinned = [torch.from_numpy(frame).pin_memory() for frame in played(clip, 0, 8)]
            row["host_us"]["pinned"] = bus.host_us(ours, pinned * (RATE_FRAMES // 8))
            row["device"] = _device(streams, clip, row["under_way"]["us"])
            row["plan"] = {
                "launches": len(ours.record().launches),
                "arena_bytes": ours.plan.arena_bytes if ours.plan else 0,
                "peak_bytes": ours.record().peak_bytes,
            }
            row["transfers"] = bus.transfers(ours, played(clip, 0, PROFILED_FRAMES))
            if not row["transfers"]["only_the_frame"]:
                reason = f"more crosses the bus than the frame: {row['transfers']['per_frame'][0]}"
                outcome.failures.append(_failure(where, reason))
        outcome.rows.append(row)
        return outcome

    return run


def _parity(
    models: Models, steps: int, clip: np.ndarray
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Closed loop over the first frames: pictures against those of the reference model."""

    def pictures(pair: Any, policy: str) -> torch.Tensor:
        stream = FrameStream(*pair, steps=steps, policy=policy, graph=False)
        return torch.stack(
            [torch.from_numpy(stream.push(f)) for f in played(clip, 0, PARITY_FRAMES)]
        ).double()

    def error(out: torch.Tensor) -> float:
        return ((out - truth).norm() / truth.norm()).item()

    with exact_float32():
        truth = pictures(models.reference, "torch")
    plain_error = error(pictures(models.plain, "torch"))
    with chosen_kernels() as chosen:
        ours_error = error(pictures(models.plain, "auto"))
    allowed = 2 * plain_error + ROUNDING[torch.uint8]
    return {"error": ours_error, "allowed": allowed, "plain_error": plain_error}, chosen


def _streams(
    models: Models, steps: int, clip: np.ndarray, with_compile: bool
) -> tuple[dict[str, FrameStream], dict[str, Any]]:
    """A warm stream for each way, with its peak memory and the seconds that compiling took."""
    on_gpu = models.options.device == "cuda"
    ways = _ways(models, steps, on_gpu, with_compile and on_gpu)
    streams, peaks, extra = {}, {}, {}
    left_out: list[dict[str, str]] = []
    weights = sum(p.numel() * p.element_size() for m in models.plain for p in m.parameters())
    for name, make in ways.items():
        started = time.perf_counter()
        before = _reset_peak() if on_gpu else 0
        # cuDNN's wherever it takes the shape, else flash
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        forced = sdpa_kernel(backends, set_priority=True)
        try:
            with forced if name == "cudnn-attention" else contextlib.nullcontext():
                stream = make()
                for frame in played(clip, 0, WARM_UP_FRAMES):
                    stream.push(frame)
        except Exception as error:  # of a peer: somebody else's code must not cost the whole row
            if name == "ours":
                raise
            traceback.print_exc()
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            left_out.append({"peer": name, "reason": reason})
            continue
        streams[name] = stream
        if on_gpu:
            peaks[name] = torch.cuda.max_memory_allocated() - before + weights
        if name == "torch-compile":
            extra["compile_seconds"] = time.perf_counter() - started
    return streams, {**extra, "peak_bytes": peaks, "left_out": left_out}


def _ways(
    models: Models, steps: int, on_gpu: bool, with_compile: bool
) -> dict[str, Callable[[], FrameStream]]:
    """Name -> what makes the stream, in the order in which they are warmed up."""

    def torch_stream(pair: Any, graph: bool) -> FrameStream:
        return FrameStream(*pair, steps=steps, policy="torch", graph=graph, arena=False)

    ways: dict[str, Callable[[], FrameStream]] = {
        "torch-eager": lambda: torch_stream(models.plain, graph=False),
        "ours": lambda: FrameStream(*models.plain, steps=steps, policy="auto"),
    }
    if diffusers_peers.available():
        ways["diffusers-eager"] = lambda: torch_stream(models.diffusers, graph=False)
    if on_gpu:
        ways["cuda-graph"] = lambda: torch_stream(models.plain, graph=True)
        ways["cudnn-attention"] = lambda: FrameStream(
            *models.plain, steps=steps, policy={"attention": "torch"}
        )
    if on_gpu and diffusers_peers.available():
        ways["diffusers-graph"] = lambda: torch_stream(models.diffusers, graph=True)
    if with_compile:
        ways["torch-compile"] = lambda: torch_stream(compiled(*models.compiled), graph=True)
        if diffusers_peers.available() and steps == 1:
            ways["stream-diffusion"] = lambda: torch_stream(
                compiled(*models.image_to_image), graph=True
            )
    return ways


def _device(
    streams: dict[str, FrameStream], clip: np.ndarray, under_way_us: float
) -> dict[str, Any]:
    """Kernel families of ours and of torch-compile, from the profiler, which takes kernels apart
    that overlap without it. `idle_share` is 1 - (kernels' sum without the bus) / (a frame's period
    with another under way): what of the time the device waits where nothing watches it.
    """
    names = [name for name in ("ours", "torch-compile") if name in streams]
    found: dict[str, Any] = {
        n: frame_profile.profile(functools.partial(streams[n].push, clip[0])) for n in names
    }
    families = found["ours"]["families"]
    busy_us = sum(us for family, us in families.items() if "bus" not in family)
    return found | {"idle_share": 1 - min(busy_us / under_way_us, 1.0)}


def compiled(denoiser: Any, autoencoder: Any) -> tuple[Any, Any]:
    """The same two with their three networks compiled; once, whatever streams they serve."""
    for module, method in ((denoiser, "denoise"), (autoencoder, "encode"), (autoencoder, "decode")):
        if method not in vars(module):
            made = torch.compile(getattr(module, method), fullgraph=True, dynamic=False)
            setattr(module, method, made)
    return denoiser, autoencoder


def _reset_peak() -> int:
    """Forget the peak; returns the bytes allocated now (the other ways' models and buffers)."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _run_clip(
    streams: dict[str, FrameStream], clip: np.ndarray, options: Options
) -> dict[str, list[float]]:
    """Microseconds of each frame, block by block; stops between blocks when the time is up."""
    times_us: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(BLOCKS):
        for name, stream in streams.items():
            share = SHARES.get(name, 1) if len(streams) > 2 else 1
            count = max(5, options.frames // (BLOCKS * share))
            for frame in played(clip, len(times_us[name]), count):
                started = time.perf_counter()
                stream.push(frame)
                times_us[name].append((time.perf_counter() - started) * 1e6)
        if time.time() > options.deadline:
            break
    return times_us


def _percentiles(samples_us: list[float]) -> dict[str, float]:
    p10, p50, p90, p95, p99 = np.percentile(samples_us, (10, 50, 90, 95, 99))
    named = {"p10": p10, "p50": p50, "p90": p90, "p95": p95, "p99": p99}
    return {k: float(v) for k, v in named.items()} | {"frames": len(samples_us)}


def _row(
    where: dict[str, str], measured: dict[str, dict[str, Any]], samples_us: list[float]
) -> dict[str, Any]:
    ours = measured.pop("ours")
    return {
        **where,
        "backend": "auto",
        "time_us": {key: ours[key] for key in ("p10", "p50", "p90")},
        "tflops": None,
        "gbps": None,
        "fraction_of_ceiling": None,
        "peers": {name: times["p50"] for name, times in measured.items()},
        "kernel": "frame/auto",
        "cache": "hot",
        "how": "perf_counter around push",
        "frame_us": ours,
        "peer_frames": measured,
        "samples_us": [round(sample, 1) for sample in samples_us],
    }


def _failure(where: dict[str, str], reason: str) -> dict[str, Any]:
    return {**where, "backend": "auto", "kernel": "frame/auto", "reason": reason}


def _numbers(parity: dict[str, float]) -> str:
    return f"error {parity['error']:.2e} of {parity['allowed']:.2e} allowed"
