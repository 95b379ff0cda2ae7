"""One frame: uint8 in, uint8 out. This is what a plan records and a graph captures.

It touches only buffers that live as long as the size does; nothing here waits, grows or looks at a
value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import ops
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.frame_buffers import FrameBuffers, pad
from mirage_hello.model.samplers import Sampler
from mirage_hello.model.settings import Settings


def frame(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    sampler: Sampler,
    buffers: FrameBuffers,
    settings: Settings,
) -> None:
    """buffers.frame_in, the memory and the noise -> buffers.frame_out and the memory."""
    dtype = buffers.memory.history.dtype
    frames = pad(buffers.frame_in)
    latents = autoencoder.encode(ops.frame_to_model(frames, dtype=dtype))
    memory = buffers.memory.read(buffers.memory_noise.to(dtype), settings.history_noise)
    inputs = torch.cat([latents, memory], 1)
    if settings.guidance is not None:
        inputs = torch.cat([inputs, inputs])

    def denoise(x: Tensor, sigma: Any, step: int) -> Tensor:
        condition = settings.conditions[step]
        if settings.guidance is None:
            return denoiser.denoise(x, inputs, condition, settings.keys)
        both = denoiser.denoise(torch.cat([x, x]), inputs, condition, settings.keys)
        return ops.guidance(both[:1], both[1:], settings.guidance)

    # The sampler's state is float32 in every dtype: sigma 14.6 would swallow the latents.
    x = ops.axpby(settings.start, latents.float(), settings.sigmas[0], buffers.noise[0])
    latents = sampler(denoise, x, settings.sigmas, buffers.noise[1:]).to(dtype)
    buffers.memory.push(latents)
    frames = ops.model_to_frame(autoencoder.decode(latents))
    height, width = buffers.frame_out.shape[1:3]
    buffers.frame_out.copy_(frames[:, :height, :width])
