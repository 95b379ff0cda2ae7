"""The memory that a training sample sees: true past frames, then what run time does to them.

Three things keep a model that feeds on its own outputs from drifting, and each is here: noise of a
level that the model is told, corruptions that look like drift, and errors that the model itself
made. Memory channels are [B, (K + 1) C, h, w] as in `ContextMemory`: newest first, the sink last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.model.memory import LATENT_LIMIT
from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.pool import ClipPool


def true_memory(
    pool: ClipPool, clip: Tensor, time: Tensor, history: int, old_sink: Tensor
) -> Tensor:
    """Memory of true frames at a place of each clip.

    Args:
        clip, time: int64 [B]; frames before the clip's first are empty slots (0), as after a reset.
        old_sink: bool [B]: the sink is a far earlier frame of the same world, not the clip's first;
            only where the history is full, as at run time.

    Returns:
        [B, (K + 1) C, h, w], the pool's dtype.
    """
    slots = []
    for back in range(1, history + 1):
        earlier = time - back
        frame = pool.targets[clip, earlier.clamp_min(0)]
        slots.append(frame * (earlier >= 0)[:, None, None, None])
    first = pool.targets[clip, 0] * (time > 0)[:, None, None, None]
    far = (old_sink & (time >= history))[:, None, None, None]
    slots.append(torch.where(far, pool.sinks[clip], first))
    return torch.cat(slots, 1)


class ErrorBank:
    """Errors (output minus truth) of past roll-outs: a ring of [size, C, h, w]."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.errors = like.new_zeros(size, *like.shape[1:])
        self.count = torch.zeros((), dtype=torch.int64, device=like.device)  # ever added

    def add(self, errors: Tensor) -> None:
        """Keep these [n, C, h, w], over the oldest."""
        size = len(self.errors)
        errors = errors[:size].to(self.errors.dtype)
        at = (torch.arange(len(errors), device=errors.device) + self.count) % size
        self.errors[at] = errors
        self.count += len(errors)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, C, h, w]; zeros while the bank is empty."""
        held = self.count.clamp(1, len(self.errors))
        place = torch.rand(count, generator=generator, device=self.errors.device)
        return self.errors[(place * held).long()]

    def state_dict(self) -> dict:
        return {"errors": self.errors.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict) -> None:
        self.errors.copy_(state["errors"])
        self.count.copy_(state["count"])


def drifted(memory: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Corruptions that look like drift, the same for all frames of one memory.

    Latents are nearly linear in the colours of a patch, so a near-identity mixing of the channels
    with an offset is a gain, a tint and a change of saturation; then blur, and a shift of up to a
    quarter of a latent (2 pixels).
    """
    batch, total, height, width = memory.shape
    device = memory.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    frames = memory.float().view(batch, total // channels, channels, height, width)
    matrix = torch.eye(channels, device=device) + 0.06 * normal(batch, channels, channels)
    matrix = matrix * (1 + 0.1 * (2 * uniform(batch, 1, 1) - 1))
    offset = 0.06 * normal(batch, 1, channels, 1, 1)
    frames = torch.einsum("bcd,bkdhw->bkchw", matrix, frames) + offset
    flat = frames.reshape(batch, total, height, width)
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, 1)
    flat = torch.lerp(flat, blurred, uniform(batch, 1, 1, 1) ** 2 * 0.8)
    shift = 0.25 * (2 * uniform(batch, 2, 1, 1) - 1)
    for axis, offset in ((3, shift[:, :1]), (2, shift[:, 1:])):
        neighbour = torch.where(offset > 0, flat.roll(1, axis), flat.roll(-1, axis))
        flat = torch.lerp(flat, neighbour, offset.abs())
    return flat.to(memory.dtype)


def augmented(
    memory: Tensor, own: Tensor, bank: ErrorBank, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The memory as the network sees it, and the noise level that it is told.

    Args:
        memory: [B, (K + 1) C, h, w], clean.
        own: bool [B]: already the model's own outputs; no corruptions on top.

    Returns:
        (memory float32, level float32 [B]). Order: bank, corruptions, clamp, noise.
    """
    batch, total = memory.shape[:2]
    channels = bank.errors.shape[1]
    device = memory.device

    def chosen(share: float) -> Tensor:
        return torch.rand(batch, generator=generator, device=device) < share

    filled = (memory != 0).any(1, keepdim=True)  # empty slots stay empty
    memory = memory.float()
    if config.error_bank:
        errors = bank.draw(batch, generator).float()
        scale = torch.rand(batch, 1, 1, 1, generator=generator, device=device) * 1.5
        use = (chosen(config.error_bank) & ~own)[:, None, None, None] & filled
        memory = memory + (scale * errors * use).repeat(1, total // channels, 1, 1)
    if config.corruption:
        use = (chosen(config.corruption) & ~own)[:, None, None, None] & filled
        memory = torch.where(use, drifted(memory, channels, generator), memory)
    memory = memory.clamp(-LATENT_LIMIT, LATENT_LIMIT)
    level = torch.rand(batch, generator=generator, device=device) * config.history_noise
    level = level * ~chosen(config.clean_share)
    noise = torch.randn(memory.shape, generator=generator, device=device)
    return memory + level[:, None, None, None] * noise, level
