"""Samples during training: a held-out world, closed loop, input | output | truth.

A PNG sheet, which needs nothing, and a video where PyAV is installed.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.data.city import HELD_OUT
from mirage_hello.model.data.demo_clip import to_bytes, write_video
from mirage_hello.model.data.png import png
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import WorldConfig, Worlds
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.rollout import Rollout
from mirage_hello.model.training.config import TrainConfig

DECODED = 12  # frames of an autoencoder's sheet


def sheet(columns: list[Tensor]) -> Tensor:
    """Frames [N, 3, H, W] in [-1, 1] each, side by side, one row for each of N: uint8 [., ., 3]."""
    return to_bytes(torch.cat(list(torch.cat(columns, 3)), 1).clamp(-1, 1)).cpu()


def write_sample(
    stem: Path,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    config: TrainConfig,
    device: torch.device,
    steps: int = 2,
) -> None:
    """One row a style; in the sheet early, middle and last frame of `sample_frames`, each as three
    columns: input view, output, truth.

    Args:
        stem: path of the files without suffix.
    """
    styles = list(STYLES)
    worlds = Worlds(WorldConfig(config.size, config.size, config.supersample, motion=False), device)
    clips = worlds.clips([HELD_OUT + 2] * len(styles))
    training, dtype = denoiser.training, denoiser.unet.conv_in.weight.dtype
    autoencoder = copy.deepcopy(autoencoder).to(dtype)
    numbers = list(range(len(styles)))
    streams = Rollout(denoiser, autoencoder, numbers, config.size, config.size, steps=steps)
    frames, columns, last = [], [], config.sample_frames - 1
    for t in range(config.sample_frames):
        shot = worlds.render(clips, [40 + t] * len(styles), styles)
        now = [shot.view, streams.push(shot.view), shot.target]
        frames.append(sheet(now))
        columns += now if t in (min(2, last), last // 2, last) else []
    denoiser.train(training)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".png").write_bytes(png(sheet(columns)))
    if importlib.util.find_spec("av") is not None:
        write_video(stem.with_suffix(".mp4"), frames)


@torch.no_grad()
def write_decoded(stem: Path, autoencoder: Autoencoder, frames: Tensor) -> None:
    """A sheet of frames (uint8 [N, 3, H, W]) above what the autoencoder makes of them."""
    dtype = autoencoder.encoder.conv_in.weight.dtype
    stride = max(1, len(frames) // DECODED)
    picked = (frames[stride // 2 :: stride][:DECODED].float() / 127.5 - 1).split(len(STYLES) + 1)
    rows = []
    for part in picked:
        rows.append(torch.cat(list(part), 2))
        rows.append(torch.cat(list(autoencoder(part.to(dtype)).float()), 2))
    width = max(row.shape[2] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, width - row.shape[2])) for row in rows]
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".png").write_bytes(png(to_bytes(torch.cat(rows, 1).clamp(-1, 1)).cpu()))
