"""What the tests of frames share: a small model's stream, with and without plans, and a clip."""

import numpy as np
import torch

from mirage_hello.model import (
    Autoencoder,
    AutoencoderConfig,
    Denoiser,
    DenoiserConfig,
    FrameStream,
    UNetConfig,
    VideoUNet,
)

UNET = UNetConfig(
    channels=(32, 64),
    heads=(2, 2),
    transformers=(False, True),
    blocks_per_level=1,
    context_dim=24,
    context_tokens=3,
    groups=8,
    styles=3,
)


def stream(device: torch.device | str = "cpu", parametrisation: str = "edm", **kw) -> FrameStream:
    torch.manual_seed(0)
    denoiser = Denoiser(VideoUNet(UNET), DenoiserConfig(parametrisation))
    autoencoder = Autoencoder(AutoencoderConfig(channels=(8, 16, 16)))
    return FrameStream(denoiser, autoencoder, device=device, **kw)


def planned(device="cpu", **kw) -> FrameStream:
    of = stream(device, **kw)
    of._planned = True
    return of


def clip(count: int, height: int = 32, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def run(of: FrameStream, frames: np.ndarray) -> list[np.ndarray]:
    return [of.push(frame) for frame in frames]
