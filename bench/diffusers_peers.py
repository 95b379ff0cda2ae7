"""diffusers' own modules behind this project's interfaces, as peers of the frame and of the step.

Stable Diffusion 1.5's `UNet2DConditionModel` with a "timestep" class embedding in the place of the
history noise computes what `VideoUNet` does, from the same weights (tests/test_benchmarks.py), and
`AutoencoderTiny` is TAESD's shape, whose weights are random here: no peer's time depends on them.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mirage_hello.model import Autoencoder, Denoiser, VideoUNet
from mirage_hello.model.autoencoder import AutoencoderConfig
from mirage_hello.model.checkpoint import unpack_attention
from mirage_hello.model.rows import Keys
from mirage_hello.model.unet import UNetConfig


@cache
def available() -> bool:
    """Whether diffusers can be imported: it is no requirement of this project."""
    try:
        importlib.import_module("diffusers.models.unets.unet_2d_condition")
    except (ImportError, RuntimeError) as error:
        print(f"without diffusers: {(str(error).splitlines() or [''])[0]}", flush=True)
        return False
    return True


class DiffusersUNet(nn.Module):
    """`UNet2DConditionModel` with the weights of a `VideoUNet`, called as a `Denoiser` calls that.

    Channels-last, as the frame around it.
    """

    style_table: Tensor

    def __init__(self, ours: VideoUNet) -> None:
        super().__init__()
        self.config, weight = ours.config, ours.conv_in.weight
        with torch.device(weight.device):
            self.unet = _unet(ours.config)
        state = unpack_attention(ours.state_dict())
        styles = state.pop("style_table", None)
        names = {name: name.replace("history_embedding", "class_embedding") for name in state}
        self.unet.load_state_dict({names[name]: value for name, value in state.items()})
        self.register_buffer("style_table", styles)
        self.to(weight.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()
        self.trained = ours.trained

    @property
    def conv_in(self) -> nn.Module:
        return self.unet.conv_in

    def forward(self, x: Tensor, noise: list[Tensor], context: list[Keys]) -> Tensor:
        """noise: of `noise_biases`; context: of `context_keys`."""
        timesteps, level = noise
        labels = 1000.0 * level
        tokens = context[0].keys_values
        return self.unet(x, timesteps, tokens, class_labels=labels, return_dict=False)[0]

    def noise_biases(self, timesteps: Tensor, history_noise: Tensor | None) -> list[Tensor]:
        """What it computes again at every call."""
        return [timesteps, torch.zeros_like(timesteps) if history_noise is None else history_noise]

    def style(self, index: int) -> Tensor:
        """Conditioning tokens of a learned style."""
        return self.style_table[index : index + 1]

    def context_keys(self, context: Tensor, lasting: bool = False) -> list[Keys]:
        """Likewise: diffusers projects keys and values in every step."""
        return [Keys(context)]


class TinyAutoencoder(nn.Module):
    """`AutoencoderTiny`, TAESD's shape: 2.4 million random parameters."""

    def __init__(self, like: Autoencoder) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        weight = like.encoder.conv_in.weight
        with torch.device(weight.device):
            self.tiny: Any = AutoencoderTiny(latent_channels=like.config.latent_channels)
        self.to(weight.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()
        self.config: AutoencoderConfig = like.config  # for the memory's prediction
        self.trained = False

    def encode(self, frames: Tensor) -> Tensor:
        return self.tiny.encode(frames, return_dict=False)[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.tiny.decode(latents, return_dict=False)[0]


def denoiser(ours: Denoiser) -> Denoiser:
    """diffusers' U-Net in a denoiser of the same parametrisation, with the same weights."""
    return Denoiser(DiffusersUNet(ours.unet), ours.config)  # type: ignore[arg-type]


def _unet(config: UNetConfig) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.blocks_per_level,
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.groups,
        attention_head_dim=config.heads,  # the number of heads, as in its SD 1.5
        class_embed_type="timestep",
        down_block_types=_blocks("Down", config.transformers),
        up_block_types=_blocks("Up", config.transformers[::-1]),
    )


def _blocks(way: str, transformers: tuple[bool, ...]) -> tuple[str, ...]:
    return tuple(f"{'CrossAttn' if has else ''}{way}Block2D" for has in transformers)
