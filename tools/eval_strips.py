"""Pictures of an evaluation: input, output and truth side by side, as a PNG and two short clips."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mirage_hello.model.data.demo_clip import to_bytes, write_video
from mirage_hello.model.data.png import png
from mirage_hello.model.evaluation import EvalConfig

LONG_CLIP = 120  # most frames of the clip of the long run, which is shown in larger steps
CUTS_CLIP = 72  # frames in a row of the run with cuts: flicker shows where none is left out
FPS = 12


def halved(picture: Tensor) -> Tensor:
    """uint8 [H, W, 3] at half the size, where that leaves 128 pixels a frame: files stay small."""
    height, width, _ = picture.shape
    if width < 3 * 256:
        return picture
    pairs = picture.view(height // 2, 2, width // 2, 2, 3).float()
    return pairs.mean((1, 3)).round().byte()


class Strips:
    """Collects frames of the first seed of each style of one candidate.

    Args:
        config: of the evaluation; stem: path without suffix of the files.
    """

    def __init__(self, config: EvalConfig, stem: Path) -> None:
        self.config, self.stem = config, stem
        self.stride = max(config.every, config.frames // LONG_CLIP)
        self.last: tuple[int, Tensor] | None = None
        self.long: list[Tensor] = []
        self.cuts: list[Tensor] = []

    def keep(self, frame: int, view: Tensor, output: Tensor, truth: Tensor) -> None:
        """A frame of the long run, one row a style: input | output | truth."""
        picture = self.picture(view, output, truth)
        self.last = frame, picture  # the one before is forgotten: a PNG shows the end
        if len(self.long) * self.stride <= frame:
            self.long.append(picture)

    def keep_cuts(self, frame: int, view: Tensor, output: Tensor, truth: Tensor) -> None:
        """A frame of the run with cuts; the first ones make a clip."""
        if frame < CUTS_CLIP:
            self.cuts.append(self.picture(view, output, truth))

    def picture(self, view: Tensor, output: Tensor, truth: Tensor) -> Tensor:
        picked = slice(0, None, self.config.seeds)
        columns = torch.cat((view[picked], output[picked], truth[picked]), 3)
        return halved(to_bytes(torch.cat(list(columns), 1))).cpu()

    def write(self) -> dict[str, str]:
        """Write the files; their names by what they show. Clips need PyAV and are else left."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        names = {}
        if self.last:
            frame, picture = self.last
            path = self.stem.with_name(f"{self.stem.name}.png")
            path.write_bytes(png(picture))
            names[f"frame {frame}"] = path.name
        for label, clip, ending in (("clip", self.long, ""), ("cuts", self.cuts, "-cuts")):
            path = self.stem.with_name(f"{self.stem.name}{ending}.mp4")
            try:
                names[label] = path.name if clip and write_video(path, clip, FPS, crf=28) else ""
            except ImportError:
                names[label] = ""
        return names
