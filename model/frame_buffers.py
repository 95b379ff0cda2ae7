"""The buffers of one size of frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirage_hello.kernels import Policy
from mirage_hello.model.autoencoder import FACTOR
from mirage_hello.model.bus import Bus
from mirage_hello.model.memory import ContextMemory
from mirage_hello.model.plan import Plan
from mirage_hello.model.unet import UNetConfig


@dataclass
class FrameBuffers:
    """All that a frame of one size reads and writes; the addresses never change."""

    frame_in: Tensor  # uint8 [1, H, W, 3]
    frame_out: Tensor  # uint8 [1, H, W, 3]
    draws: Tensor  # float32, all of a frame's noise; the next two are views of it
    noise: Tensor  # [steps, 1, 4, h, w]: the start, then what few_step adds
    memory_noise: Tensor  # [1, 4 (K + 1), h, w]
    kept: Tensor  # float32 [4 h w]: what the next frame keeps of this one's start noise
    memory: ContextMemory
    bus: Bus
    plan: Plan | None = None
    policy: Policy | None = None  # under which the plan was made, None before
    begun: bool = False  # whether there was a frame, whose noise the next one goes on from

    @staticmethod
    def allocate(
        size: tuple[int, int],
        steps: int,
        unet: UNetConfig,
        dtype: torch.dtype,
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> FrameBuffers:
        """Buffers for frames of `size` (height, width) pixels, zeroed, used on `stream`."""
        height, width = size
        h, w = -(-height // FACTOR), -(-width // FACTOR)
        frame_in, frame_out = (
            torch.zeros(1, height, width, 3, dtype=torch.uint8, device=device) for _ in range(2)
        )
        one = unet.latent_channels * h * w
        start = steps * one
        # One buffer, so that one launch draws everything, and float32 in every dtype of the model,
        # so that a bfloat16 run can be compared with a float32 run of the same seed.
        draws = torch.zeros(start + unet.memory_channels * h * w, device=device)
        noise = draws[:start].view(steps, 1, h, w, -1).permute(0, 1, 4, 2, 3)
        memory_noise = draws[start:].view(1, h, w, -1).permute(0, 3, 1, 2)
        memory = ContextMemory(1, unet.latent_channels, h, w, unet.history, dtype, device)
        bus = Bus(frame_in, frame_out, stream)
        kept = torch.zeros(one, device=device)
        return FrameBuffers(frame_in, frame_out, draws, noise, memory_noise, kept, memory, bus)

    def draw(self, generator: torch.Generator, correlation: float) -> None:
        """The next frame's noise, with the start noise as `samplers.next_noise` of the last."""
        start = self.draws[: len(self.kept)]
        goes_on, self.begun = self.begun and correlation > 0, True
        if goes_on:
            torch.mul(start, correlation, out=self.kept)
        self.draws.normal_(generator=generator)
        if goes_on:
            torch.add(self.kept, start, alpha=(1 - correlation**2) ** 0.5, out=start)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frame_in.shape[1], self.frame_in.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the bus and the plan's arena."""
        tensors = (self.frame_in, self.frame_out, self.draws, self.kept)
        return sum(t.numel() * t.element_size() for t in tensors) + self.memory.nbytes


def check_frame(frame: np.ndarray | Tensor) -> None:
    """Raises TypeError: not uint8. ValueError: not [H, W, 3]."""
    if frame.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"push: the frame must be uint8 (got {frame.dtype})")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(
            f"push: the frame must be [H, W, 3], RGB (got {list(frame.shape)}); "
            "convert grey or alpha before"
        )


def pad(frames: Tensor) -> Tensor:
    """[1, H, W, 3] padded to multiples of 8 by repeating the last row and column."""
    for dim in (1, 2):
        missing = -frames.shape[dim] % FACTOR
        if missing:
            last = frames.narrow(dim, frames.shape[dim] - 1, 1)
            repeats = [-1, -1, -1, -1]
            repeats[dim] = missing
            frames = torch.cat([frames, last.expand(repeats)], dim)
    return frames
