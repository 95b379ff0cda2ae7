"""Denoiser: one interface, D(x; sigma) = the clean frame, over two parametrisations of the network.

In both, x = clean + sigma * noise. With F the network:
    edm:  D = c_skip x + c_out F(c_in x, 250 ln sigma)      Karras et al. 2022, table 1
    eps:  D = x - sigma F(x / sqrt(sigma^2 + 1), t(sigma))  Ho et al. 2020; F predicts the noise
`tiny` is trained from scratch and uses edm, which stays stable at few steps (DIAMOND, 2024). `880m`
uses eps, which Stable Diffusion 1.5's weights predict; sigma = sqrt((1 - alpha_bar) / alpha_bar).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mirage_hello.kernels import ops
from mirage_hello.model.rows import Keys
from mirage_hello.model.unet import VideoUNet

TRAIN_STEPS = 1000  # of Stable Diffusion's schedule
BETA_START, BETA_END = 0.00085, 0.012  # its "scaled linear" schedule: linear in sqrt(beta)


@dataclass(frozen=True)
class DenoiserConfig:
    """Parametrisation and noise range; the EDM values are DIAMOND's (see video-model notes)."""

    parametrisation: Literal["edm", "eps"] = "edm"
    sigma_data: float = 0.5  # standard deviation of the clean latents
    sigma_min: float = 2e-3
    sigma_max: float = 5.0
    rho: float = 7.0


class NoiseCondition(NamedTuple):
    """What a step needs to know about its noise level; `scales` holds c_in, c_skip and c_out."""

    scales: Tensor  # [3, B] float32
    biases: list[Tensor]


@cache
def schedule_sigmas() -> Tensor:
    """sigma(t) of Stable Diffusion's 1000 training steps, float64 [1000], increasing."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


class Denoiser(nn.Module):
    """D(x; sigma, inputs, context, history noise): the clean next frame's latents.

    Attributes: unet, config, trained (whether a checkpoint was loaded into the network).
    """

    def __init__(self, unet: VideoUNet, config: DenoiserConfig) -> None:
        super().__init__()
        if config.parametrisation not in ("edm", "eps"):
            raise ValueError(
                f"Denoiser: parametrisation must be 'edm' or 'eps' (got {config.parametrisation!r})"
            )
        self.unet = unet
        self.config = config

    @property
    def trained(self) -> bool:
        return self.unet.trained

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        inputs: Tensor,
        context: Tensor,
        history_noise: Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma).

        Args:
            x: [B, 4, h, w] = clean + sigma * noise, any floating dtype (float32 keeps it exact).
            sigma: [B] float32 on the device.
            inputs: [B, 4 + memory channels, h, w]: the input frame's latents, then the memory.
            context: [B, L, context_dim] conditioning tokens.
            history_noise: [B] float32, sigma of the noise in the memory; None is 0.
        Returns:
            [B, 4, h, w] in the dtype of x.
        """
        noise = self.noise_condition(sigma, history_noise)
        return self.denoise(x, inputs, noise, self.unet.context_keys(context))

    def denoise(self, x: Tensor, inputs: Tensor, noise: NoiseCondition, keys: list[Keys]) -> Tensor:
        """`forward` for a prepared noise level and context (`unet.context_keys`)."""
        c_in, c_skip, c_out = noise.scales
        scaled = (x * c_in[:, None, None, None]).to(inputs.dtype)
        prediction = self.unet(torch.cat([scaled, inputs], 1), noise.biases, keys)
        # The sampler's state keeps its own precision: 14.6 + 0.03 is 14.6 in bfloat16.
        return ops.axpby(c_skip, x, c_out, prediction.to(x.dtype))

    def noise_condition(self, sigma: Tensor, history_noise: Tensor | None = None) -> NoiseCondition:
        """Scales and channel biases for sigma [B] and the memory's noise [B], both float32."""
        scales, timesteps = self._precondition(sigma.float())
        return NoiseCondition(scales, self.unet.noise_biases(timesteps, history_noise))

    def _precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in, c_skip, c_out) [3, B] and the network's time [B] for sigma [B]."""
        if self.config.parametrisation == "edm":
            data = self.config.sigma_data
            total = sigma**2 + data**2
            scales = [total.rsqrt(), data**2 / total, sigma * data * total.rsqrt()]
            return torch.stack(scales), 250.0 * sigma.log()  # 1000 c_noise, c_noise = ln(sigma)/4
        scales = [(sigma**2 + 1).rsqrt(), torch.ones_like(sigma), -sigma]
        return torch.stack(scales), _interpolate_step(sigma)

    def sigmas(self, steps: int, strength: float = 1.0) -> list[float]:
        """Noise levels of a sampler with `steps` steps: steps + 1 values, the last 0.

        strength in (0, 1] lowers where it starts. edm: Karras et al. 2022, equation 5, over the
        range [sigma_min, sigma(strength)], with the step from sigma_min to 0 left out: at sigma_min
        D is the identity, and of two steps one would be lost; eps: evenly spaced training steps
        below strength * 999.
        """
        if steps < 1:
            raise ValueError(f"sigmas: steps must be at least 1 (got {steps})")
        if not 0 < strength <= 1:
            raise ValueError(f"sigmas: strength must be above 0 and at most 1 (got {strength})")
        if self.config.parametrisation == "eps":
            table = schedule_sigmas()
            last = max(round(strength * (TRAIN_STEPS - 1)), 1)
            return [float(table[round(last * (steps - i) / steps)]) for i in range(steps)] + [0.0]
        rho = self.config.rho
        low, high = self.config.sigma_min ** (1 / rho), self.config.sigma_max ** (1 / rho)
        start = low + strength * (high - low)
        ramp = [start + (low - start) * i / steps for i in range(steps)]
        return [r**rho for r in ramp] + [0.0]


@cache
def _log_sigmas(device: torch.device) -> Tensor:
    """ln(sigma(t)) float32 on a device: copied there once, outside any captured graph."""
    return schedule_sigmas().log().to(device, torch.float32)


def _interpolate_step(sigma: Tensor) -> Tensor:
    """t(sigma) [B] float32, linear in ln(sigma) between two training steps; no host sync."""
    table = _log_sigmas(sigma.device)
    position = sigma.clamp_min(math.exp(-20.0)).log()
    high = torch.searchsorted(table, position).clamp(1, TRAIN_STEPS - 1)
    low = high - 1
    fraction = (position - table[low]) / (table[high] - table[low])
    return low + fraction.clamp(0.0, 1.0)
