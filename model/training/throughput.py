"""Frames per second of the renderer and of each training stage on this machine, as JSON.

    python -m mirage_hello.model.training.throughput out/throughput.json
    torchrun --nproc-per-node 2 -m mirage_hello.model.training.throughput out/two.json

Utilisation is the arithmetic of the networks (forward once, backward twice) over the time and the
device's dense bf16 peak; renderer, optimiser and moving average count as time but not as work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mirage_hello.kernels import use
from mirage_hello.model.capture import WARM_UP
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import WorldConfig, Worlds
from mirage_hello.model.presets import build
from mirage_hello.model.training.autoencoder_stage import AutoencoderStage
from mirage_hello.model.training.config import TrainConfig, changed, preset
from mirage_hello.model.training.norms import fused_norms
from mirage_hello.model.training.optimise import in_half
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.video_stage import VideoStage

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, data sheets
CLIPS = 16


def seconds(step: Callable[[], Any], device: torch.device, count: int) -> float:
    """Mean seconds of a step over `count`; before, its graph is captured."""
    for _ in range(WARM_UP + 2 if device.type == "cuda" else 2):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count


def renderer(config: TrainConfig, device: torch.device, count: int) -> dict[str, float]:
    """Rendered frames per second for each style, view and truth together."""
    fused = config.fused and device.type == "cuda"
    world = WorldConfig(config.size, config.size, config.supersample, fused=fused)
    worlds = Worlds(world, device)
    clips = worlds.clips(list(range(CLIPS)))
    rates = {}
    for style in STYLES:
        each = seconds(partial(worlds.render, clips, [9] * CLIPS, [style] * CLIPS), device, count)
        rates[style] = CLIPS / each
    return rates


@torch.no_grad()
def forward_gflop(config: TrainConfig) -> tuple[float, float]:
    """Arithmetic of one forward of one frame: (autoencoder, video model), counted on the CPU."""
    denoiser, autoencoder = build(config.model)
    denoiser.requires_grad_(False)
    autoencoder.requires_grad_(False)
    side = config.size // 8
    with use("torch"):
        with FlopCounterMode(display=False) as first:
            autoencoder(torch.zeros(1, 3, config.size, config.size))
        channels = denoiser.unet.config.latent_channels
        memory = denoiser.unet.config.memory_channels
        with FlopCounterMode(display=False) as second:
            denoiser(
                torch.zeros(1, channels, side, side), torch.ones(1),
                torch.zeros(1, channels + memory, side, side), denoiser.unet.style(0).detach(),
                torch.zeros(1),
            )  # fmt: skip
    return first.get_total_flops() / 1e9, second.get_total_flops() / 1e9


def measure(config: TrainConfig, count: int = 10) -> dict[str, Any]:
    """All the numbers of one configuration."""
    workers = Workers(config)
    device = workers.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    found: dict[str, Any] = {"device": name, "ranks": workers.ranks, "size": config.size}
    found["compile"], found["torch"] = config.compile, torch.__version__
    own = config.fused and in_half(config, workers.ranks)
    with use("torch"), fused_norms(device, own):
        found["rendered_frames_per_s"] = renderer(config, device, count)
        autoencoder_gflop, video_gflop = forward_gflop(config)
        denoiser, autoencoder = build(config.model)
        # A pool of two refreshes: the measured steps draw from it and render no more.
        config = changed(config, {"refresh_every": 10**9, "autoencoder_refresh_every": 10**9})
        config = changed(config, {"pool_clips": 2 * config.refresh_clips})
        # Half of the batch are live streams, with 1.5 evaluations each beside the training.
        evaluations = 3 + 1.5 * config.live_share
        for make, batch, gflop in (
            (lambda: AutoencoderStage(config, autoencoder, workers), config.autoencoder_batch,
             3 * autoencoder_gflop),
            (lambda: VideoStage(config, denoiser, autoencoder, workers), config.batch,
             evaluations * video_gflop),
        ):  # fmt: skip
            stage = make()
            stage.start()
            each = seconds(partial(stage.step, 0, 0.5), device, count)
            frames = batch * workers.ranks / each
            found[stage.name] = {"steps_per_s": 1 / each, "frames_per_s": frames}
            if peak:
                tflops = gflop * batch / each / 1e3
                found[stage.name] |= {"tflops": tflops, "utilisation": tflops / peak}
    workers.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="throughput", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--preset", default="shipped")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--count", type=int, default=20)
    arguments = parser.parse_args()
    values = dict(item.split("=", 1) for item in arguments.set)
    found = measure(changed(preset(arguments.preset), values), arguments.count)
    if int(os.environ.get("RANK", "0")):
        return 0
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    arguments.path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
