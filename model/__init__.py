"""The video diffusion model: U-Net, autoencoder, samplers, context memory and the frame stream."""

from mirage_hello.model import budget, checkpoint
from mirage_hello.model.autoencoder import Autoencoder, AutoencoderConfig
from mirage_hello.model.denoiser import Denoiser, DenoiserConfig
from mirage_hello.model.latest import LatestFrame
from mirage_hello.model.memory import ContextMemory
from mirage_hello.model.presets import PRESETS, Preset, build, preset
from mirage_hello.model.samplers import SAMPLERS, ddim, euler, few_step, guided, one_step
from mirage_hello.model.stream import FrameStream
from mirage_hello.model.unet import UNetConfig, VideoUNet

__all__ = [
    "PRESETS",
    "SAMPLERS",
    "Autoencoder",
    "AutoencoderConfig",
    "ContextMemory",
    "Denoiser",
    "DenoiserConfig",
    "FrameStream",
    "LatestFrame",
    "Preset",
    "UNetConfig",
    "VideoUNet",
    "budget",
    "build",
    "checkpoint",
    "ddim",
    "euler",
    "few_step",
    "guided",
    "one_step",
    "preset",
]
