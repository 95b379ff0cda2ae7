"""One batch of clips as a film: any frame of them, on CUDA by replaying one captured rendering.

A frame is 2000 to 17000 launches, which the host needs longer for than the device. The frame's
number is a tensor, so the same graph draws every frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mirage_hello.model.capture import Captured, Tensors
from mirage_hello.model.data.city import City
from mirage_hello.model.data.worlds import Shot, Worlds


class Film:
    """Frames of fixed clips in fixed styles.

    Args:
        worlds, clips, styles: as for `Worlds.render`.
    """

    def __init__(self, worlds: Worlds, clips: City, styles: Sequence[str] | None) -> None:
        self.worlds, self.clips, self.styles = worlds, clips, styles
        device = clips.seeds.device
        self.numbers = torch.zeros(len(clips.seeds), dtype=torch.int32, device=device)
        self.captured = Captured(device, torch.Generator(device))

    def frame(self, number: int) -> Shot:
        """Frame `number` of every clip; the caller owns it."""
        self.numbers.fill_(number)
        try:
            fields, _ = self.captured("frame", self.render)
        except RuntimeError as error:  # of the capture, or of what a capture forbids
            if not self.captured.enabled:
                raise
            self.captured.enabled = False
            print(f"frames are drawn launch by launch, which is slower: {error}", flush=True)
            fields, _ = self.render()
        return Shot(**fields)

    def render(self) -> tuple[Tensors, Tensors]:
        return vars(self.worlds.render(self.clips, self.numbers, self.styles)), {}
