"""Randomness that every device agrees on: integer hashes and tileable noise textures.

A world must look the same on the CPU of a test and on the GPU of a training run, for any frame in
any order, so nothing here keeps a generator's state: a random number is a hash of what it is for.
"""

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# Odd multipliers with well-mixed bits (golden ratio, then the constants of a 32-bit finaliser),
# written as signed numbers because torch has no wrapping uint32 multiply on every device.
GOLDEN = 0x9E3779B1 - (1 << 32)
MIX_A = 0x7FEB352D
MIX_B = 0x846CA68B - (1 << 32)
# Whether hashes on CUDA are one kernel each: `Worlds` says so while it renders.
fused: ContextVar[bool] = ContextVar("fused hashes", default=False)


def hashed(*keys: Tensor | int) -> Tensor:
    """h = mix(mix(k0) + k1) + ...: one int32 hash of all the keys, broadcast together.

    Args:
        keys: integer tensors (cast to int32, high bits dropped) or Python ints; at least one
            tensor.

    Returns:
        int32 tensor of the broadcast shape; every bit depends on every key.
    """
    if fused.get() and any(isinstance(k, Tensor) and k.is_cuda for k in keys):
        from mirage_hello.model.data import noise_triton

        if noise_triton.fits(keys):
            return noise_triton.hashed(keys, False)
    device = next(k.device for k in keys if isinstance(k, Tensor))
    h = torch.zeros((), dtype=torch.int32, device=device)
    for key in keys:
        k = key.to(torch.int32) if isinstance(key, Tensor) else key
        h = h * GOLDEN + k
        h = h ^ ((h >> 16) & 0xFFFF)  # the mask undoes the sign extension of an arithmetic shift
        h = h * MIX_A
        h = h ^ ((h >> 15) & 0x1FFFF)
        h = h * MIX_B
        h = h ^ ((h >> 16) & 0xFFFF)
    return h


def uniform(*keys: Tensor | int) -> Tensor:
    """u = (hash mod 2^24) / 2^24: a float32 in [0, 1), exact on every device."""
    if fused.get() and any(isinstance(k, Tensor) and k.is_cuda for k in keys):
        from mirage_hello.model.data import noise_triton

        if noise_triton.fits(keys):
            return noise_triton.hashed(keys, True)
    return (hashed(*keys) & 0xFFFFFF).to(torch.float32) * (1.0 / (1 << 24))


def periodic_value_noise(seeds: Tensor, channel: int, lattice: int, size: int) -> Tensor:
    """Random lattice values joined by bicubic interpolation, tileable in both directions.

    Args:
        seeds: int [B].
        channel: which texture of the clip this is; another channel is another texture.
        lattice: number of random values a side.
        size: texels a side of the result; a multiple of lattice.

    Returns:
        float32 [B, size, size], about uniform in [0, 1] with small overshoots.
    """
    row = torch.arange(lattice, device=seeds.device, dtype=torch.int32)
    values = uniform(seeds[:, None, None], row[:, None], row[None, :], 7919 * channel + lattice)
    padded = F.pad(values[:, None], (2, 2, 2, 2), mode="circular")
    scale = size // lattice
    grown = F.interpolate(padded, scale_factor=scale, mode="bicubic", align_corners=False)
    edge = 2 * scale
    return grown[:, 0, edge:-edge, edge:-edge]


def fractal_textures(seeds: Tensor, channels: int = 4, size: int = 256) -> Tensor:
    """T_c = sum over octaves of 0.55^i noise(4 * 2^(c/2 + i)), scaled to mean 0.5, deviation 0.2.

    Later channels begin at a finer octave, so channel 0 has broad shapes and the last one grain.

    Returns:
        float32 [B, channels, size, size], tileable.
    """
    layers = []
    for channel in range(channels):
        first = 4 << (channel // 2 + channel % 2)
        total = torch.zeros(seeds.shape[0], size, size, device=seeds.device)
        for octave in range(4):
            lattice = first << octave
            if lattice > size // 2:
                break
            total += 0.55**octave * periodic_value_noise(seeds, channel, lattice, size)
        total = total - total.mean((1, 2), keepdim=True)
        deviation = total.square().mean((1, 2), keepdim=True).sqrt()
        layers.append(0.5 + 0.2 * total / deviation)
    return torch.stack(layers, 1)


def sample_texture(textures: Tensor, channel: int, u: Tensor, v: Tensor, period: float) -> Tensor:
    """T[channel](u / period, v / period), wrapped and bilinear.

    Args:
        textures: float32 [B, C, S, S] of `fractal_textures`.
        u, v: float32 [B, N] surface coordinates in world units.
        period: world units after which the texture repeats.

    Returns:
        float32 [B, N].
    """
    layer = textures[:, channel : channel + 1]
    # One wrapped texel on the far side lets a clamping sampler interpolate across the seam.
    wrapped = F.pad(layer, (0, 1, 0, 1), mode="circular")
    grid = torch.stack((torch.frac(u / period), torch.frac(v / period)), -1)
    grid = torch.where(grid < 0, grid + 1, grid)
    # align_corners puts -1 and 1 on the first and the last of the size + 1 texel centres.
    sampled = F.grid_sample(wrapped, (2 * grid - 1)[:, None], align_corners=True)
    return sampled[:, 0, 0]
