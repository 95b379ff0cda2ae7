"""VideoUNet: Stable Diffusion 1.5's U-Net over [noisy next frame, input frame, past outputs, sink].

The main path is `_predict`. In a stream the noise levels and the conditioning tokens change rarely,
so what depends on them alone (one bias a residual block, one key/value matrix a transformer) can be
prepared once, by `noise_biases` and `context_keys`, and given to `forward` in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mirage_hello.kernels import ops
from mirage_hello.model.blocks import (
    RESNET_EPS,
    Downsample,
    Embedding,
    ResnetBlock,
    Transformer,
    Upsample,
    channels_last,
)
from mirage_hello.model.layers import Image, convolve
from mirage_hello.model.rows import Keys


@dataclass(frozen=True)
class UNetConfig:
    """Widths and depths; the defaults are Stable Diffusion 1.5's."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    transformers: tuple[bool, ...] = (True, True, True, False)  # at this level?
    blocks_per_level: int = 2
    latent_channels: int = 4
    history: int = 4  # past outputs in the input
    context_dim: int = 768
    groups: int = 32
    context_tokens: int = 77  # of a style, and of the context unless another is given
    styles: int = 0  # learned styles, each `context_tokens` conditioning tokens

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not levels or len(self.heads) != levels or len(self.transformers) != levels:
            raise ValueError(
                "UNetConfig: channels, heads and transformers need one entry a level (got "
                f"{levels}, {len(self.heads)} and {len(self.transformers)} entries)"
            )
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % self.groups or width % heads:
                raise ValueError(
                    f"UNetConfig: each width must be a multiple of groups and of its heads (got "
                    f"{width} channels, groups={self.groups}, {heads} heads)"
                )

    @property
    def memory_channels(self) -> int:
        """Channels of the context memory: the last K outputs and the sink frame."""
        return self.latent_channels * (self.history + 1)

    @property
    def in_channels(self) -> int:
        """noisy next frame + current input frame + memory: 4 + 4 + 16 + 4 = 28."""
        return 2 * self.latent_channels + self.memory_channels

    @property
    def sum_unit(self) -> int:
        """Channels that share a sum, so that sums of any two neighbouring widths make up the
        groups of their concatenation: a divisor of every group's width, 10 for Stable Diffusion's
        10, 20 and 40. 0 where that is odd: a convolution's epilogue holds channels in pairs.
        """
        unit = math.gcd(*(width // self.groups for width in self.channels))
        return 0 if unit % 2 else unit

    @property
    def embedding(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]


class DownBlock(nn.Module):
    """One level on the way down; every output is a skip connection."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        c_out = config.channels[level]
        c_in = config.channels[max(level - 1, 0)]
        self.resnets = nn.ModuleList(
            _resnet(config, c_in if i == 0 else c_out, c_out)
            for i in range(config.blocks_per_level)
        )
        self.attentions = _transformers(config, level, config.blocks_per_level)
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out, config.sum_unit)])


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList(
            [
                Transformer(
                    width, config.heads[-1], config.context_dim, config.groups, config.sum_unit
                )
            ]
        )


class UpBlock(nn.Module):
    """One level on the way up: one block more than on the way down, each with its skip."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        c_out = config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        # Skips in the order they are taken: this level's blocks, then what came into the level.
        skips = [c_out] * config.blocks_per_level + [config.channels[max(level - 1, 0)]]
        inputs = [below] + [c_out] * config.blocks_per_level
        self.resnets = nn.ModuleList(
            _resnet(config, c_in + skip, c_out) for c_in, skip in zip(inputs, skips, strict=True)
        )
        self.attentions = _transformers(config, level, config.blocks_per_level + 1)
        upsamplers = [] if level == 0 else [Upsample(c_out, config.sum_unit)]
        self.upsamplers = nn.ModuleList(upsamplers)


def _resnet(config: UNetConfig, c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, config.embedding, config.groups, config.sum_unit)


def _transformers(config: UNetConfig, level: int, count: int) -> nn.ModuleList:
    width, heads = config.channels[level], config.heads[level]
    return nn.ModuleList(
        Transformer(width, heads, config.context_dim, config.groups, config.sum_unit)
        for _ in range(count if config.transformers[level] else 0)
    )


class VideoUNet(nn.Module):
    """F(x, t, context, history noise): the next frame's noise (eps) or EDM's F; see `Denoiser`.

    Args of the constructor: config; gradient_checkpointing (recompute each block in the backward:
    memory of one block instead of all, about 4/3 of the time).
    Attributes: trained, False until a checkpoint is loaded.
    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022.
    """

    def __init__(self, config: UNetConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.trained = False
        channels, levels = config.channels, range(len(config.channels))
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], config.embedding)
        self.history_embedding = Embedding(channels[0], config.embedding)
        # Any: the type of a ModuleList does not know its items'.
        self.down_blocks: Any = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks: Any = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], eps=RESNET_EPS)
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, 3, padding=1)
        if config.styles:
            tokens = torch.randn(config.styles, config.context_tokens, config.context_dim)
            self.style_table = nn.Parameter(tokens)
        channels_last(self)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | list[Tensor],
        context: Tensor | list[Keys],
        history_noise: Tensor | None = None,
    ) -> Tensor:
        """F(x, t, context, history noise).

        Args:
            x: [B, in_channels, h, w], channels-last, the model's dtype: `UNetConfig.in_channels`.
            timesteps: [B] float32 on the device: 0..999 (eps) or 250 ln(sigma) (EDM); or what
                `noise_biases` made of it and of history_noise.
            context: [B, L, context_dim] conditioning tokens, or what `context_keys` made of them.
            history_noise: [B] float32, sigma of the noise in the memory channels; None is 0.
        Returns:
            [B, latent_channels, h, w], channels-last, the dtype of x.
        Raises:
            ValueError: x has another number of channels, or context another width.
        """
        if not isinstance(timesteps, list):
            timesteps = self.noise_biases(timesteps, history_noise)
        if not isinstance(context, list):
            context = self.context_keys(context)
        return self._predict(x, timesteps, context)

    def noise_biases(self, timesteps: Tensor, history_noise: Tensor | None = None) -> list[Tensor]:
        """The channel bias [B, C] of each residual block, in the order in which they run."""
        embedding = self.time_embedding(timesteps)
        level = torch.zeros_like(timesteps) if history_noise is None else history_noise
        # 1000: the features resolve steps of about 1, history noise is a sigma of 0 to about 1.
        embedding = ops.residual_add(embedding, self.history_embedding(1000.0 * level))
        embedding = ops.silu(embedding)
        return [m.bias(embedding) for m in self._ordered() if isinstance(m, ResnetBlock)]

    def context_keys(self, context: Tensor, lasting: bool = False) -> list[Keys]:
        """Keys and values of each transformer, in the order in which they run.

        lasting: they serve many calls, so that it pays to fold them with the weights around them.
        """
        if context.ndim != 3 or context.shape[-1] != self.config.context_dim:
            raise ValueError(
                f"VideoUNet: context must be [B, L, {self.config.context_dim}] "
                f"(got {list(context.shape)})"
            )
        return [m.keys(context, lasting) for m in self._ordered() if isinstance(m, Transformer)]

    def _predict(self, x: Tensor, biases: list[Tensor], keys: list[Keys]) -> Tensor:
        # Zeros up to a multiple of 8 channels may come with it, which the kernels want.
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[1] not in (channels, -(-channels // 8) * 8):
            raise ValueError(
                f"VideoUNet: x must be [B, {self.config.in_channels}, h, w] (got {list(x.shape)}): "
                "noisy frame, input frame, history and sink frame along the channels"
            )
        bias, key = iter(biases), iter(keys)
        image = convolve(Image(x), self.conv_in, unit=self.config.sum_unit)
        skips = [image]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                image = self._run(resnet, image, next(bias))
                if block.attentions:
                    image = self._run(block.attentions[i], image, next(key))
                skips.append(image)
            for downsample in block.downsamplers:
                image = downsample(image)
                skips.append(image)

        mid = self.mid_block
        image = self._run(mid.resnets[0], image, next(bias))
        image = self._run(mid.attentions[0], image, next(key))
        image = self._run(mid.resnets[1], image, next(bias))

        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                image = self._run(resnet, image, next(bias), skips.pop())
                if block.attentions:
                    image = self._run(block.attentions[i], image, next(key))
            for upsample in block.upsamplers:
                image = upsample(image, tuple(skips[-1].pixels.shape[2:]))

        return convolve(image, self.conv_out, self.conv_norm_out).pixels

    def style(self, index: int) -> Tensor:
        """Conditioning tokens [1, context_tokens, context_dim] of a learned style."""
        if not 0 <= index < self.config.styles:
            raise ValueError(
                f"style: this model has {self.config.styles} learned styles (got {index}); "
                "give tokens to set_context instead"
                if not self.config.styles
                else f"style: expected 0 to {self.config.styles - 1} (got {index})"
            )
        return self.style_table[index : index + 1]

    def _run(self, block: nn.Module, *args: Any) -> Image:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _ordered(self) -> Iterator[nn.Module]:
        """Residual blocks and transformers in the order in which `_predict` runs them."""
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            yield from block.resnets
            yield from block.attentions
