"""Autoencoder with factor 8, small enough for real time: frames in [-1, 1] <-> latents.

Our own design, in the size class of TAESD (about a million parameters a side). No convolution runs
at full resolution: the first and the last step move 2x2 pixels to channels and back, so the largest
feature map has a quarter of the pixels. No GroupNorm: statistics over a whole frame would let a
bright object in one corner change the colours of another, which shows as flicker in a video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirage_hello.kernels import ops
from mirage_hello.model.blocks import channels_last
from mirage_hello.model.layers import Image, convolve

FACTOR = 8  # three halvings: one by space_to_depth, two by convolutions of stride 2


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths at 1/2, 1/4 and 1/8 of the frame's resolution, and residual blocks at each."""

    channels: tuple[int, int, int] = (64, 128, 192)
    blocks: tuple[int, int, int] = (1, 1, 1)
    latent_channels: int = 4

    def __post_init__(self) -> None:
        if len(self.channels) != 3 or len(self.blocks) != 3:
            raise ValueError(
                "AutoencoderConfig: channels and blocks need 3 entries, for 1/2, 1/4 and 1/8 of "
                f"the resolution (got {len(self.channels)} and {len(self.blocks)})"
            )


def space_to_depth(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4C, H/2, W/2], channels (dy, dx, c): one channels-last copy."""
    b, c, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, height // 2, 2, width // 2, 2, c)
    return (
        x.permute(0, 1, 3, 2, 4, 5).reshape(b, height // 2, width // 2, 4 * c).permute(0, 3, 1, 2)
    )


def depth_to_space(x: Tensor) -> Tensor:
    """[B, 4C, H, W] -> [B, C, 2H, 2W]: the inverse of `space_to_depth`."""
    b, c4, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, height, width, 2, 2, c4 // 4)
    return (
        x.permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * height, 2 * width, c4 // 4).permute(0, 3, 1, 2)
    )


class Block(nn.Module):
    """x + conv2(silu(conv1(silu(x)))), the addition inside the second convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """silu: of the result, for a reader that takes nothing else."""
        h = convolve(Image(ops.silu(x)), self.conv1, silu=True)
        return convolve(h, self.conv2, residual=x, silu=silu).pixels


class Encoder(nn.Module):
    """Patches [B, 12, H/2, W/2], or more channels of zeros, -> latents [B, 4, H/8, W/8]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.channels
        self.conv_in = nn.Conv2d(12, half, 3, padding=1)
        self.levels = nn.ModuleList(_blocks(c, n) for c, n in _widths(config))
        self.downsamplers: Any = nn.ModuleList(
            [
                nn.Conv2d(half, quarter, 3, stride=2, padding=1),
                nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            ]
        )
        self.conv_out = nn.Conv2d(eighth, config.latent_channels, 3, padding=1)

    def forward(self, patches: Tensor) -> Tensor:
        x = convolve(Image(patches), self.conv_in).pixels
        x = _run(self.levels[0], x)
        for down, level in zip(self.downsamplers, self.levels[1:], strict=True):
            x = _run(level, convolve(Image(x), down).pixels)
        return convolve(Image(x), self.conv_out).pixels


class Decoder(nn.Module):
    """Latents [B, 4, h, w], or more channels of zeros, -> patches [B, 12, 4h, 4w]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, eighth, 3, padding=1)
        self.levels = nn.ModuleList(_blocks(c, n) for c, n in reversed(_widths(config)))
        self.upsamplers: Any = nn.ModuleList(
            [nn.Conv2d(eighth, quarter, 3, padding=1), nn.Conv2d(quarter, half, 3, padding=1)]
        )
        self.conv_out = nn.Conv2d(half, 12, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = convolve(Image(latents), self.conv_in).pixels
        x = _run(self.levels[0], x)
        for i, (up, level) in enumerate(zip(self.upsamplers, self.levels[1:], strict=True)):
            is_last = i == len(self.upsamplers) - 1
            x = _run(level, convolve(Image(x), up, upsample=True).pixels, silu=is_last)
        return convolve(Image(x), self.conv_out).pixels


def _widths(config: AutoencoderConfig) -> list[tuple[int, int]]:
    return list(zip(config.channels, config.blocks, strict=True))


def _blocks(channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(channels) for _ in range(count))


def _run(blocks: nn.Module, x: Tensor, silu: bool = False) -> Tensor:
    """The blocks one after the other, and SiLU of what leaves the last."""
    listed = list(blocks.children())
    if silu and not listed:
        return ops.silu(x)
    for block in listed:
        x = block(x, silu=silu and block is listed[-1])
    return x


class Autoencoder(nn.Module):
    """decode(encode(frames)) ~ frames; attributes `config` and `trained` as in VideoUNet."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.trained = False
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            # He et al. 2015: keeps the signal's variance from the pixels to the latents and back.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
        with torch.no_grad():  # on random pixels the latents' deviation is 4.4: make it about 0.5
            self.encoder.conv_out.weight.div_(8.0)
        channels_last(self)

    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, 3, H, W] in [-1, 1], H and W multiples of 8 -> latents [B, 4, H/8, W/8].

        Raises:
            ValueError: another number of channels, or a size that is not a multiple of 8.
        """
        if frames.ndim != 4 or frames.shape[1] != 3 or any(n % FACTOR for n in frames.shape[2:]):
            raise ValueError(
                f"encode: frames must be [B, 3, H, W] with H and W multiples of {FACTOR} "
                f"(got {list(frames.shape)}); pad them, as FrameStream does"
            )
        return self.encoder(space_to_depth(frames))

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 4, h, w] -> frames [B, 3, 8h, 8w], about [-1, 1] (not clamped)."""
        return depth_to_space(self.decoder(latents))

    def forward(self, frames: Tensor) -> Tensor:
        return self.decode(self.encode(frames))

    @torch.no_grad()
    def rescale_latents(self, deviation: float) -> None:
        """Divide the latents by their measured standard deviation, inside the weights.

        The diffusion model expects one known deviation (sigma_data); here it costs nothing at run
        time: the encoder's last convolution is divided by it, the decoder's first multiplied.
        """
        for parameter in self.encoder.conv_out.parameters():
            parameter.div_(deviation)
        self.decoder.conv_in.weight.mul_(deviation)
