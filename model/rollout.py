"""Many streams at once: FrameStream's frame for a batch, for measuring and for sample videos.

`FrameStream` is one stream at constant latency; here B streams advance together on one device. The
arithmetic is the same, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirage_hello.kernels import ops
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.capture import Captured
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.memory import ContextMemory
from mirage_hello.model.samplers import NOISE_CORRELATION, Sampler, euler, next_noise


class Rollout:
    """B closed-loop streams.

    Args:
        denoiser, autoencoder: on one device, in one dtype.
        styles: style number of each stream, or tokens [B, L, D].
        height, width: of the frames, multiples of 8.
        steps: evaluations of the network a frame; sampler: of `samplers`.
        history_noise: sigma of the noise on the memory; noise_correlation: of the start noise.
        remember: False empties the memory before every frame (the ablation without history).
        seed: of the noise.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        styles: Sequence[int] | Tensor,
        height: int,
        width: int,
        *,
        steps: int = 2,
        sampler: Sampler = euler,
        history_noise: float = 0.02,
        noise_correlation: float = NOISE_CORRELATION,
        remember: bool = True,
        seed: int = 0,
    ) -> None:
        self.denoiser, self.autoencoder = denoiser.eval(), autoencoder.eval()
        weight = denoiser.unet.conv_in.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.sampler, self.remember = sampler, remember
        self.sigmas = denoiser.sigmas(steps)
        tokens = styles
        if not isinstance(tokens, Tensor):
            tokens = torch.cat([denoiser.unet.style(i) for i in tokens])
        self.batch = len(tokens)
        config = denoiser.unet.config
        self.shape = (self.batch, config.latent_channels, height // 8, width // 8)
        self.memory = ContextMemory(
            *self.shape, history=config.history, dtype=self.dtype, device=self.device
        )
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.captured = Captured(self.device, self.generator)
        self.correlation, self.noise = noise_correlation, self.normal(*self.shape)
        self.views = torch.zeros(self.batch, 3, height, width, device=self.device)
        with torch.no_grad():
            self.keys = denoiser.unet.context_keys(tokens.detach().to(self.device, self.dtype))
            self.level = torch.full((self.batch,), history_noise, device=self.device)
            self.conditions = [
                denoiser.noise_condition(torch.full_like(self.level, sigma), self.level)
                for sigma in self.sigmas[:-1]
            ]

    @torch.no_grad()
    def remember_true(self, frames: Tensor) -> None:
        """Put true frames [B, 3, H, W] into the memory, as if they had been the last outputs."""
        self.memory.push(self.autoencoder.encode(frames.to(self.device, self.dtype)))

    @torch.no_grad()
    def correct(self, frames: Tensor) -> None:
        """Put true frames [B, 3, H, W] in the place of the last outputs in the memory."""
        latents = self.autoencoder.encode(frames.to(self.device, self.dtype))
        self.memory.history[:, : latents.shape[1]].copy_(latents)

    @torch.no_grad()
    def push(self, views: Tensor) -> Tensor:
        """The output frames for input views: float [B, 3, H, W] in [-1, 1], both; not clamped."""
        self.views.copy_(views)
        return self.captured("frame", self.frame)[0]["frames"]

    @torch.no_grad()
    def push_unseen(self, views: Tensor) -> None:
        """`push` of a frame that nobody looks at: the memory holds latents, so none is decoded."""
        self.views.copy_(views)
        self.captured("latents", lambda: ({"latents": self.latents()}, {}))

    def frame(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One frame of `self.views`, on the device alone."""
        return {"frames": self.autoencoder.decode(self.latents()).float()}, {}

    def latents(self) -> Tensor:
        """The next output's latents, remembered."""
        latents = self.autoencoder.encode(self.views.to(self.dtype))
        if not self.remember:
            self.memory.reset()
        total = self.memory.history.shape[1] + self.memory.sink.shape[1]
        noise = self.normal(self.batch, total, *self.shape[2:])
        memory = self.memory.read(noise.to(self.dtype), self.level)
        inputs = torch.cat((latents, memory), 1).contiguous(memory_format=torch.channels_last)

        def denoise(x: Tensor, sigma, step: int) -> Tensor:
            return self.denoiser.denoise(x, inputs, self.conditions[step], self.keys)

        steps = len(self.sigmas) - 1
        fresh = self.normal(max(0, steps - 1), *self.shape)
        self.noise.copy_(next_noise(self.noise, self.normal(*self.shape), self.correlation))
        x = self.sampler(denoise, self.sigmas[0] * self.noise, self.sigmas, fresh)
        latents = x.to(self.dtype)
        self.memory.push(latents)
        return latents

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)


def quantised(frames: Tensor) -> Tensor:
    """What is shown: float [B, 3, H, W] rounded to the 256 levels of a byte, in [-1, 1]."""
    return ops.frame_to_model(ops.model_to_frame(frames.contiguous()))
