"""Presets: the sizes in which VideoUNet comes, and `build`, which makes one with seeded weights."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

from mirage_hello.model.autoencoder import Autoencoder, AutoencoderConfig
from mirage_hello.model.denoiser import Denoiser, DenoiserConfig
from mirage_hello.model.unet import UNetConfig, VideoUNet


@dataclass(frozen=True)
class Preset:
    """The three configurations that make a model."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig

    @property
    def tokens(self) -> int:
        """Length of the context unless another is given."""
        return self.unet.context_tokens


PRESETS: dict[str, Preset] = {
    # 10,692,552 parameters: runs on a CPU, ships with trained weights. With its autoencoder's
    # 685,460 they are 22.8 MB in bfloat16. Eight latent channels, since 4 for each 8 x 8 pixels
    # lose textures that an autoencoder of this size cannot make up.
    "tiny": Preset(
        UNetConfig(
            channels=(64, 96, 128, 160),
            heads=(2, 3, 4, 5),  # head dimension 32 everywhere
            transformers=(False, True, True, True),  # none on the 1/8 grid: most pixels, least gain
            blocks_per_level=1,
            latent_channels=8,
            context_dim=256,
            context_tokens=4,
            styles=16,
        ),
        AutoencoderConfig(channels=(32, 64, 96), latent_channels=8),
        # rho 3: of two steps the second at sigma 0.77. At rho 7, sigma 0.28, edges wandered more.
        DenoiserConfig("edm", rho=3.0),
    ),
    # 389,763,140 parameters: Stable Diffusion 1.5 at 0.65 to 0.70 of its widths, head dimensions
    # 56, 56, 104 and (in the middle) 96, multiples of 8 as the attention kernels want them.
    "391m": Preset(
        UNetConfig(channels=(224, 448, 832, 864), heads=(4, 8, 8, 9)),
        AutoencoderConfig(),
        DenoiserConfig("edm"),
    ),
    # 861,640,644 parameters = Stable Diffusion 1.5's 859,520,964
    #   + 24 more input channels x 320 x 9 = 69,120
    #   + the history-noise embedding (320 + 1) x 1280 + (1280 + 1) x 1280 = 2,050,560.
    "880m": Preset(
        UNetConfig(),
        AutoencoderConfig(),
        DenoiserConfig("eps", sigma_data=1.0),
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones and the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"preset: expected one of {', '.join(PRESETS)} (got {name!r}){hint}")


def build(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Denoiser, Autoencoder]:
    """(denoiser, autoencoder) of a preset, with random weights that depend on the seed alone.

    The weights are drawn in float32 where they will live and then cast, so that every dtype starts
    from the same model; CPU and CUDA generators differ, so the two devices do not.
    The global random state is left as it was.
    """
    chosen = preset(name)
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        denoiser = Denoiser(VideoUNet(chosen.unet), chosen.denoiser)
        autoencoder = Autoencoder(chosen.autoencoder)
    return denoiser.to(dtype).eval(), autoencoder.to(dtype).eval()
