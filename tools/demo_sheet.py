"""One picture of a demo: frames of the input and of every style's video, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.model.data.png import png
from mirage_hello.tools.video_reader import Frame, VideoReader

MOMENTS = (0.15, 0.5, 0.95)  # of the clip: one row each
WIDTH = 256  # of a frame in the sheet


def frames_of(path: Path) -> list[Tensor]:
    """The frames of a video, scaled: uint8 [H, W, 3] each."""
    with VideoReader(path) as reader:
        return [scaled(torch.from_numpy(i.pixels)) for i in reader if isinstance(i, Frame)]


def scaled(frame: Tensor) -> Tensor:
    """uint8 [H, W, 3] at WIDTH pixels a row, by area."""
    height = max(1, round(frame.shape[0] * WIDTH / frame.shape[1]))
    image = frame.permute(2, 0, 1)[None].float()
    image = F.interpolate(image, (height, WIDTH), mode="bilinear", antialias=True)
    return image[0].round().clamp(0, 255).byte().permute(1, 2, 0)


def write_sheet(path: Path, videos: Sequence[Path]) -> None:
    """A PNG: one column a video, one row a moment of the shortest."""
    clips = [frames_of(video) for video in videos]
    last = min(len(clip) for clip in clips) - 1
    columns = [torch.cat([clip[round(m * last)] for m in MOMENTS]) for clip in clips]
    height = min(len(column) for column in columns)
    path.write_bytes(png(torch.cat([column[:height] for column in columns], 1)))
