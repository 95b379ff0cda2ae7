"""Sample videos during training: a held-out world, closed loop, input | output | truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.data.city import HELD_OUT
from mirage_hello.model.data.demo_clip import to_bytes, write_video
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import WorldConfig, Worlds
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.rollout import Rollout
from mirage_hello.model.training.config import TrainConfig


def write_sample(
    path: Path,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    config: TrainConfig,
    device: torch.device,
    steps: int = 2,
) -> None:
    """One row a style, three columns: input view, output, truth; `sample_frames` frames."""
    styles = list(STYLES)
    worlds = Worlds(WorldConfig(config.size, config.size, config.supersample), device)
    clips = worlds.clips([HELD_OUT + 2] * len(styles))
    numbers = list(range(len(styles)))
    streams = Rollout(denoiser, autoencoder, numbers, config.size, config.size, steps=steps)

    def frames() -> Iterator[Tensor]:
        for t in range(config.sample_frames):
            shot = worlds.render(clips, [40 + t] * len(styles), styles)
            columns = torch.cat((shot.view, streams.push(shot.view), shot.target), 3)
            yield to_bytes(torch.cat(list(columns), 1).clamp(-1, 1))

    path.parent.mkdir(parents=True, exist_ok=True)
    training = denoiser.training
    write_video(path, frames())
    denoiser.train(training)
