"""The buffers of one size of frames, and the way in and out of the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.kernels import Policy
from mirage_hello.model.autoencoder import FACTOR
from mirage_hello.model.memory import ContextMemory
from mirage_hello.model.plan import Plan
from mirage_hello.model.unet import UNetConfig

IN_FLIGHT = 2  # frames: one is computed while its neighbours are on the bus


@dataclass
class FrameBuffers:
    """All that a frame of one size reads and writes; the addresses never change."""

    frame_in: Tensor  # uint8 [1, H, W, 3]
    frame_out: Tensor  # uint8 [1, H, W, 3]
    draws: Tensor  # float32, all of a frame's noise; the next two are views of it
    noise: Tensor  # [steps, 1, 4, h, w]: the start, then what few_step adds
    memory_noise: Tensor  # [1, 4 (K + 1), h, w]
    memory: ContextMemory
    bus: Bus
    plan: Plan | None = None
    policy: Policy | None = None  # under which the plan was made, None before

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
        frame_in, frame_out = (
            torch.zeros(1, height, width, 3, dtype=torch.uint8, device=device) for _ in range(2)
        )
        start = steps * unet.latent_channels * h * w
        # One buffer, so that one launch draws everything, and float32 in every dtype of the model,
        # so that a bfloat16 run can be compared with a float32 run of the same seed.
        draws = torch.zeros(start + unet.memory_channels * h * w, device=device)
        noise = draws[:start].view(steps, 1, h, w, -1).permute(0, 1, 4, 2, 3)
        memory_noise = draws[start:].view(1, h, w, -1).permute(0, 3, 1, 2)
        memory = ContextMemory(1, unet.latent_channels, h, w, unet.history, dtype, device)
        bus = Bus(frame_in, frame_out)
        return FrameBuffers(frame_in, frame_out, draws, noise, memory_noise, memory, bus)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frame_in.shape[1], self.frame_in.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the bus and the plan's arena."""
        tensors = (self.frame_in, self.frame_out, self.draws)
        return sum(t.numel() * t.element_size() for t in tensors) + self.memory.nbytes


@dataclass(eq=False)
class _Slot:
    """One frame on its way: pinned memory and its staging copy on the device, both directions."""

    host_in: Tensor
    host_out: Tensor
    staged_in: Tensor
    staged_out: Tensor
    uploaded: Any  # torch.cuda.Event
    computed: Any
    downloaded: Any


class Bus:
    """Frames in and out: at most two under way, each direction on a copy stream of its own.

    The graph reads and writes `frame_in` and `frame_out`; staging copies on the device (1.5 MB at
    512x512: about 1 us each) free them at once, so that the next frame can come while this one is
    computed, and the last one leave. On a CPU there is nothing to overlap and nothing is staged.
    """

    def __init__(self, frame_in: Tensor, frame_out: Tensor, staged: bool | None = None) -> None:
        self._frame_in, self._frame_out = frame_in, frame_out
        self._free: list[_Slot] = []
        self._under_way: deque[tuple[_Slot | None, type, Tensor | None]] = deque()
        self._staged = frame_in.is_cuda if staged is None else staged
        if self._staged:
            self._up, self._down = (torch.cuda.Stream(frame_in.device) for _ in range(2))
            self._free = [_slot(frame_in) for _ in range(IN_FLIGHT)]
            for copies in (self._up, self._down):  # after whatever the memory was used for before
                copies.wait_stream(torch.cuda.current_stream())

    @property
    def under_way(self) -> int:
        """Frames taken and not collected."""
        return len(self._under_way)

    def bring(self, frame: np.ndarray | Tensor) -> _Slot | None:
        """Queue the way of a frame into `frame_in`; the slot goes to `take`."""
        if isinstance(frame, Tensor) and frame.device == self._frame_in.device:
            self._frame_in[0].copy_(frame)
            return None
        if not self._staged:
            np.copyto(self._frame_in[0].numpy(), frame)  # any strides, also read-only arrays
            return None
        slot = self._free[-1]
        if isinstance(frame, Tensor):
            slot.host_in[0].copy_(frame)
        else:
            np.copyto(slot.host_in[0].numpy(), frame)
        with torch.cuda.stream(self._up):
            slot.staged_in.copy_(slot.host_in, non_blocking=True)
            slot.uploaded.record()
        slot.uploaded.wait()
        self._frame_in.copy_(slot.staged_in)
        return slot

    def take(self, slot: _Slot | None, kind: type) -> None:
        """Queue the way of `frame_out` to the caller, as `kind`: np.ndarray or Tensor."""
        if slot is None:
            self._under_way.append((None, kind, self._frame_out[0].clone()))
            return
        self._free.remove(slot)
        slot.staged_out.copy_(self._frame_out)
        slot.computed.record()
        with torch.cuda.stream(self._down):
            slot.computed.wait()
            slot.host_out.copy_(slot.staged_out, non_blocking=True)
            slot.downloaded.record()
        self._under_way.append((slot, kind, None))

    def collect(self) -> Any:
        """The oldest frame under way, once it is here; owned by the caller."""
        slot, kind, result = self._under_way.popleft()
        if slot is not None:
            slot.downloaded.synchronize()
            result = slot.host_out[0].clone()
            self._free.append(slot)
        assert result is not None
        if result.is_cuda:  # made on the stream's own CUDA stream, used on the caller's
            result.record_stream(torch.cuda.current_stream(result.device))
        return result if issubclass(kind, Tensor) else result.numpy()


def _slot(frame: Tensor) -> _Slot:
    # Empty: nothing that a copy stream would have to wait for is queued for this memory.
    pinned = [torch.empty_like(frame, device="cpu", pin_memory=frame.is_cuda) for _ in range(2)]
    staged = [torch.empty_like(frame) for _ in range(2)]
    return _Slot(*pinned, *staged, *(torch.cuda.Event() for _ in range(3)))


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
