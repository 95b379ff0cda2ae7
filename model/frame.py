"""One frame: uint8 in, uint8 out. This is what a plan records and a graph captures.

It touches only buffers that live as long as the size does; nothing here waits, grows or looks at a
value. Where the hand-written kernels run (half precision, sm_90a), what lies between the picture,
the network and the memory is `kernels/frame_edges.py`; everywhere else the ops of the registry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import frame_edges, ops
from mirage_hello.model import ways
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
    history = buffers.memory.history
    takes = frame_edges.supports(denoiser.unet.config.latent_channels, history.dtype)
    fused = takes and ways.fused_backend(history) == "ptx"
    run = _with_edges if fused else _op_by_op
    run(denoiser, autoencoder, sampler, buffers, settings)


def _op_by_op(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    sampler: Sampler,
    buffers: FrameBuffers,
    settings: Settings,
) -> None:
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


def _with_edges(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    sampler: Sampler,
    buffers: FrameBuffers,
    settings: Settings,
) -> None:
    """The same frame, its ends as six launches."""
    unet, memory, guidance = denoiser.unet, buffers.memory, settings.guidance
    config, dtype = unet.config, memory.history.dtype
    copies = 1 if guidance is None else 2
    shape = frame_edges.Shape(config.latent_channels, config.history, dtype, copies)
    scales = [condition.scales[:, :1] for condition in settings.conditions]

    latents = autoencoder.encoder(frame_edges.frame_patches(buffers.frame_in, shape))
    scalars = (settings.start, settings.sigmas[0], settings.history_noise, scales[0][0])
    start, inputs = frame_edges.network_input(
        latents, memory.history, memory.sink, buffers.noise[0], buffers.memory_noise, scalars, shape
    )

    def denoise(x: Tensor, sigma: Any, step: int) -> Tensor:
        c_in, c_skip, c_out = scales[step]
        if x is not start:  # whose scaled values the input has already
            frame_edges.scale_input(x, c_in, inputs, shape)
        prediction = unet(inputs, settings.conditions[step].biases, settings.keys)
        return frame_edges.denoised(x, prediction, c_skip, c_out, guidance, shape)

    clean = sampler(denoise, start, settings.sigmas, buffers.noise[1:])
    latents = frame_edges.remember(clean, memory.count, memory.history, memory.sink, shape)
    memory.count.add_(1)
    frame_edges.patches_frame(autoencoder.decoder(latents), buffers.frame_out, shape)
