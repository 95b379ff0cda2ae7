"""ContextMemory: the last K outputs and the first one since a cut, in buffers of fixed shape.

A captured CUDA graph replays fixed addresses, so every update is in place and none depends on a
value on the host. The ring is a shift: K outputs of 4 x 64 x 64 in bfloat16 are 128 KiB, less than
a microsecond to move, and the network always finds the newest output in the same channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mirage_hello.kernels import ops

LATENT_LIMIT = 6.0  # 12 sigma_data: no sane latent is cut, a runaway frame cannot feed on itself


class ContextMemory:
    """Ring of K outputs, newest first, and a sink frame; empty slots are 0 (as in history dropout).

    Args:
        batch, channels, height, width: of one output's latents [B, C, h, w].
        history: K.
        dtype, device: of the buffers.
    Attributes:
        history: [B, K C, h, w], newest output first; sink: [B, C, h, w]; count: [B] int64, outputs
        since the last reset. All channels-last, and the same storage for the object's life.
    """

    def __init__(
        self,
        batch: int,
        channels: int,
        height: int,
        width: int,
        history: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(batch, channels, height, width, history) < 1:
            raise ValueError(
                "ContextMemory: batch, channels, height, width and history must be at least 1 "
                f"(got {batch}, {channels}, {height}, {width} and {history})"
            )
        self.channels = channels

        def zeros(c: int) -> Tensor:
            buffer = torch.zeros(batch, c, height, width, dtype=dtype, device=device)
            return buffer.contiguous(memory_format=torch.channels_last)

        self.history = zeros(history * channels)
        self.sink = zeros(channels)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)

    @torch.no_grad()
    def push(self, latents: Tensor) -> None:
        """Remember an output [B, C, h, w]; it becomes the sink if it is the first since a reset."""
        if latents.shape != self.sink.shape:
            raise ValueError(
                f"ContextMemory: latents must be {list(self.sink.shape)} "
                f"(got {list(latents.shape)})"
            )
        latents = latents.to(self.sink.dtype).clamp(-LATENT_LIMIT, LATENT_LIMIT)
        # cat reads everything before copy_ writes: an overlapping copy would smear one output.
        self.history.copy_(torch.cat([latents, self.history[:, : -self.channels]], 1))
        first = (self.count == 0)[:, None, None, None]
        self.sink.copy_(torch.where(first, latents, self.sink))
        self.count.add_(1)

    def read(self, noise: Tensor, level: Tensor | float) -> Tensor:
        """memory + level * noise: [B, (K + 1) C, h, w], the history newest first, then the sink.

        noise is standard normal of that shape and the buffers' dtype; level is a float or [B]
        float32. The network is told the level: a history that it must not trust blindly is what
        keeps long runs from drifting (GameNGen 2024, section 3.2.1; DIAMOND 2024).
        """
        return ops.add_noise(torch.cat([self.history, self.sink], 1), noise, 1.0, level)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What happens to the memory within the block is forgotten."""
        state = (self.history, self.sink, self.count)
        before = [t.clone() for t in state]
        try:
            yield
        finally:
            for buffer, value in zip(state, before, strict=True):
                buffer.copy_(value)

    @torch.no_grad()
    def reset(self, cut: Tensor | None = None) -> None:
        """Forget everything, in place; with cut [B] bool on the device, only where it is True."""
        if cut is None:
            for buffer in (self.history, self.sink, self.count):
                buffer.zero_()
            return
        self.history.masked_fill_(cut[:, None, None, None], 0)
        self.sink.masked_fill_(cut[:, None, None, None], 0)
        self.count.masked_fill_(cut, 0)

    @property
    def nbytes(self) -> int:
        """Bytes held, constant from construction on."""
        return sum(b.numel() * b.element_size() for b in (self.history, self.sink, self.count))
