"""The controls of a stream as tensors that a frame reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.model.controls import Controls
from mirage_hello.model.denoiser import Denoiser, NoiseCondition
from mirage_hello.model.rows import Keys


@dataclass
class Settings:
    """The controls on the device: everything of a frame that no frame changes, computed once."""

    start: Tensor  # [1] float32: how much of the input frame is in the sampler's start
    sigmas: Tensor  # [steps + 1, 1] float32
    history_noise: Tensor  # [1] float32
    guidance: Tensor | None  # [1] float32
    conditions: list[NoiseCondition]  # of each step; a batch of two with guidance
    keys: list[Keys]  # of each transformer; uncond, cond with guidance

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        steps = [t for c in self.conditions for t in (c.scales, *c.biases)]
        guidance = [] if self.guidance is None else [self.guidance]
        keys = [t for keys in self.keys for t in keys.tensors()]
        return [self.start, self.sigmas, self.history_noise, *guidance, *steps, *keys]

    def take(self, other: Settings) -> bool:
        """Copy another's values into these tensors; False (and nothing done) if shapes differ."""
        old, new = self.tensors(), other.tensors()
        if [t.shape for t in old] != [t.shape for t in new]:
            return False
        for a, b in zip(old, new, strict=True):
            a.copy_(b)
        return True


@torch.no_grad()
def prepare(denoiser: Denoiser, controls: Controls, steps: int) -> Settings:
    """The settings of these controls, on the denoiser's device."""
    device = denoiser.unet.conv_in.weight.device
    guided = controls.guidance is not None
    levels = controls.levels(denoiser, steps)
    sigmas = torch.tensor(levels, device=device)[:, None]
    history_noise = torch.tensor([controls.history_noise], device=device)
    tokens = torch.cat([controls.negative, controls.context]) if guided else controls.context
    keys = denoiser.unet.context_keys(tokens, lasting=True)
    batch = len(tokens)
    conditions = [
        denoiser.noise_condition(sigma.expand(batch), history_noise.expand(batch))
        for sigma in sigmas[:-1]
    ]
    return Settings(
        start=torch.tensor([0.0 if controls.strength == 1 else 1.0], device=device),
        sigmas=sigmas,
        history_noise=history_noise,
        guidance=torch.tensor([controls.guidance], device=device) if guided else None,
        conditions=conditions,
        keys=keys,
    )
