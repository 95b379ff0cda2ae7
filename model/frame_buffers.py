"""What a captured frame reads and writes: buffers of one size, settings, and the way in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.kernels import Policy
from mirage_hello.model.autoencoder import FACTOR
from mirage_hello.model.denoiser import NoiseCondition
from mirage_hello.model.memory import ContextMemory
from mirage_hello.model.unet import UNetConfig


@dataclass
class FrameBuffers:
    """All that a frame of one size reads and writes; the addresses never change."""

    frame_in: Tensor  # uint8 [1, H, W, 3]
    frame_out: Tensor  # uint8 [1, H, W, 3]
    host_in: Tensor  # the same on the host: pinned, or frame_in itself on a CPU
    host_out: Tensor
    draws: Tensor  # float32, all of a frame's noise; the next two are views of it
    noise: Tensor  # [steps, 1, 4, h, w]: the start, then what few_step adds
    memory_noise: Tensor  # [1, 4 (K + 1), h, w]
    memory: ContextMemory
    graph: torch.cuda.CUDAGraph | None = None
    policy: Policy | None = None  # under which the graph was captured, None before

    @staticmethod
    def allocate(
        size: tuple[int, int],
        steps: int,
        unet: UNetConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> FrameBuffers:
        """Buffers for frames of `size` (height, width) pixels, zeroed."""
        height, width = size
        h, w = -(-height // FACTOR), -(-width // FACTOR)

        def frame(**kwargs: Any) -> Tensor:
            return torch.zeros(1, height, width, 3, dtype=torch.uint8, **kwargs)

        frame_in, frame_out = frame(device=device), frame(device=device)
        if device.type == "cuda":  # pinned: the copies run without a staging buffer of the driver
            host_in, host_out = frame(pin_memory=True), frame(pin_memory=True)
        else:
            host_in, host_out = frame_in, frame_out
        start = steps * unet.latent_channels * h * w
        # One buffer, so that one launch draws everything, and float32 in every dtype of the model,
        # so that a bfloat16 run can be compared with a float32 run of the same seed.
        draws = torch.zeros(start + unet.memory_channels * h * w, device=device)
        noise = draws[:start].view(steps, 1, h, w, -1).permute(0, 1, 4, 2, 3)
        memory_noise = draws[start:].view(1, h, w, -1).permute(0, 3, 1, 2)
        memory = ContextMemory(1, unet.latent_channels, h, w, unet.history, dtype, device)
        return FrameBuffers(
            frame_in, frame_out, host_in, host_out, draws, noise, memory_noise, memory
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.frame_in, self.frame_out, self.draws)
        return sum(t.numel() * t.element_size() for t in tensors) + self.memory.nbytes


@dataclass
class Settings:
    """What may change between two frames, on the device."""

    start: Tensor  # [1] float32: how much of the input frame is in the sampler's start
    sigmas: Tensor  # [steps + 1, 1] float32
    history_noise: Tensor  # [1] float32
    conditions: list[NoiseCondition]  # of each step
    keys: list[Tensor]  # of each transformer

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        steps = [t for c in self.conditions for t in (c.scales, *c.biases)]
        return [self.start, self.sigmas, self.history_noise, *steps, *self.keys]


def check_frame(frame: np.ndarray | Tensor) -> None:
    """Raises TypeError: not uint8. ValueError: not [H, W, 3]."""
    if frame.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"push: the frame must be uint8 (got {frame.dtype})")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(
            f"push: the frame must be [H, W, 3], RGB (got {list(frame.shape)}); "
            "convert grey or alpha before"
        )


def to_host(frame: np.ndarray | Tensor, buffer: Tensor) -> None:
    """Copy a frame of any kind into a host buffer [H, W, 3]."""
    if isinstance(frame, Tensor):
        buffer.copy_(frame)
    else:
        np.copyto(buffer.numpy(), frame)  # takes any strides, also read-only arrays


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
