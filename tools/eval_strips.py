"""Pictures of an evaluation: input, output and truth side by side, as PNG strips and one clip."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mirage_hello.model.data.demo_clip import to_bytes, write_video
from mirage_hello.model.data.png import png
from mirage_hello.model.evaluation import EvalConfig

CLIP_FRAMES = 240  # most frames of the clip; long runs are shown in larger steps


def halved(picture: Tensor) -> Tensor:
    """uint8 [H, W, 3] at half the size, where that leaves 128 pixels a frame: clips stay small."""
    height, width, _ = picture.shape
    if width < 3 * 256:
        return picture
    pairs = picture.view(height // 2, 2, width // 2, 2, 3).float()
    return pairs.mean((1, 3)).round().byte()


class Strips:
    """Collects frames of the first seed of each style while a long run goes.

    Args:
        config: of the evaluation; stem: path without suffix of the files.
    """

    def __init__(self, config: EvalConfig, stem: Path) -> None:
        self.config, self.stem = config, stem
        self.stride = max(config.every, -(-config.frames // CLIP_FRAMES))
        self.shown = [f for f in (100, 1000) if f < config.frames - 1] + [config.frames - 1]
        self.pictures: dict[int, Tensor] = {}
        self.clip: list[Tensor] = []

    def keep(self, frame: int, view: Tensor, output: Tensor, truth: Tensor) -> None:
        """One row a style: input | output | truth."""
        picked = slice(0, None, self.config.seeds)
        due = self.shown and frame >= self.shown[0] - self.config.every
        if not due and frame % self.stride >= self.config.every:
            return
        columns = torch.cat((view[picked], output[picked], truth[picked]), 3)
        picture = to_bytes(torch.cat(list(columns), 1)).cpu()
        if due:
            self.pictures[frame] = picture
            self.shown = [f for f in self.shown if f - self.config.every > frame]
        if frame % self.stride < self.config.every:
            self.clip.append(halved(picture))

    def write(self) -> dict[str, str]:
        """Write the files; their names by what they show. The clip needs PyAV and is else left."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        names = {}
        for frame, picture in self.pictures.items():
            path = self.stem.with_name(f"{self.stem.name}-{frame:05d}.png")
            path.write_bytes(png(picture))
            names[f"frame {frame}"] = path.name
        try:
            path = self.stem.with_name(f"{self.stem.name}.mp4")
            write_video(path, self.clip, fps=12, crf=26)
            names["clip"] = path.name
        except ImportError:
            names["clip"] = ""
        return names
