"""Memory of a stream, predicted from the shapes alone: before anything is built.

    total = weights + buffers + activations + workspace
The activations are the largest of the moments listed by `_unet_moments` and `_autoencoder_moments`:
what is alive at once in the torch backend. Kernels that fuse more need less, so this is what a run
may need at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from mirage_hello.model.autoencoder import FACTOR, Autoencoder, AutoencoderConfig
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.presets import Preset, preset
from mirage_hello.model.unet import UNetConfig, VideoUNet

MIB = 2**20
# cuBLAS on Hopper, and as much again for cuDNN; in half precision the folded layers come to it.
WORKSPACE_BYTES = 32 * MIB + 32 * MIB


@dataclass(frozen=True)
class Budget:
    """Bytes on the device; `moment` names where the activations are largest."""

    weights: int
    buffers: int
    activations: int
    workspace: int
    moment: str

    @property
    def total(self) -> int:
        return self.weights + self.buffers + self.activations + self.workspace

    def __str__(self) -> str:
        parts = ("weights", "buffers", "activations", "workspace")
        terms = " + ".join(f"{name} {getattr(self, name) / MIB:.1f}" for name in parts)
        return f"{self.total / MIB:.1f} MiB = {terms} (largest in {self.moment})"


def predict(
    model: str | Preset,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    steps: int = 1,
    device: torch.device | str = "cpu",
) -> Budget:
    """Memory to run a model on frames of `size` (height, width) pixels.

    Args:
        model: a preset or its name. dtype: of weights and activations. batch: frames at once.
        steps: of the sampler (they add noise and biases, not activations).
        device: CUDA adds the libraries' workspace; the CUDA context (about 0.5 GiB) is not counted.
    """
    chosen = preset(model) if isinstance(model, str) else model
    item = torch.empty((), dtype=dtype).element_size()
    h, w = (-(-n // FACTOR) for n in size)
    moments = [*_unet_moments(chosen.unet, h, w, item), *_autoencoder_moments(chosen, h, w, item)]
    moment, activations = max(moments, key=lambda m: m[1])
    on_cuda = torch.device(device).type == "cuda"
    folded = _folded(chosen.unet) if on_cuda and item == 2 else 0
    return Budget(
        weights=_parameters(chosen) * item,
        buffers=batch * _buffers(chosen.unet, size, item, steps),
        activations=batch * activations,
        workspace=WORKSPACE_BYTES + folded * item if on_cuda else 0,
        moment=moment,
    )


def check(
    model: str | Preset,
    size: tuple[int, int],
    dtype: torch.dtype,
    steps: int,
    device: torch.device | str,
    weights_loaded: bool = True,
    batch: int = 1,
) -> Budget:
    """`predict`, held against the memory that is free now; guidance is a batch of 2.

    Raises:
        ValueError: it does not fit; the text names the largest size of the same shape that does.
    """
    free = available(device)

    def needed(candidate: tuple[int, int]) -> int:
        plan = predict(model, candidate, dtype, batch, steps, device)
        return plan.total - (plan.weights if weights_loaded else 0)

    if needed(size) <= free:
        return predict(model, size, dtype, batch, steps, device)
    longest = max(size)
    for edge in range(longest - longest % 64, 0, -64):
        smaller = tuple(max(FACTOR, n * edge // longest // FACTOR * FACTOR) for n in size)
        if needed((smaller[0], smaller[1])) <= free:
            advice = f"{smaller[1]}x{smaller[0]} would fit"
            break
    else:
        advice = "no smaller frame would fit either: choose a smaller preset or free memory"
    raise ValueError(
        f"FrameStream: {size[1]}x{size[0]} needs {needed(size) / MIB:.0f} MiB on {device}, "
        f"{free / MIB:.0f} MiB are free; {advice}"
    )


def available(device: torch.device | str) -> int:
    """Bytes free now on a device; on CUDA with what torch holds in its cache."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: the physical memory is the best known bound
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def _parameters(chosen: Preset) -> int:
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        modules = VideoUNet(chosen.unet), Autoencoder(chosen.autoencoder)
    return sum(p.numel() for module in modules for p in module.parameters())


def _folded(unet: UNetConfig) -> int:
    """Elements of the linear layers that stand beside the originals: with a LayerNorm folded in,
    12 C^2 a transformer = 3 (q, k, v) + 1 (q of the cross-attention) + 8 (GEGLU); 5 C^2 of the
    feed-forward's second product and the projection out as one; and the prompt's, at most 4 C^2.
    """
    each = 2 * unet.blocks_per_level + 1
    levels = zip(unet.channels, unet.transformers, strict=True)
    widths = [c for c, has in levels if has for _ in range(each)] + [unet.channels[-1]]
    return sum(21 * c * c for c in widths if c % 64 == 0)


def _buffers(unet: UNetConfig, size: tuple[int, int], item: int, steps: int) -> int:
    """Frame in and out, noise (float32), memory; the settings are under 1 % of the weights."""
    height, width = size
    pixels = -(-height // FACTOR) * -(-width // FACTOR)
    noise = 4 * pixels * ((steps + 1) * unet.latent_channels + unet.memory_channels)
    return 2 * height * width * 3 + noise + item * pixels * unet.memory_channels


def _levels(h: int, w: int, count: int) -> list[int]:
    """Pixels of each level: halves, rounded up."""
    sizes = []
    for _ in range(count):
        sizes.append(h * w)
        h, w = -(-h // 2), -(-w // 2)
    return sizes


def _resnet(c_in: int, c_out: int) -> int:
    """Channels alive in a residual block beside its input, at its worst moment:
    norm and silu of the input | normalised input, convolution | first convolution, norm, silu |
    shortcut, input of the second convolution, its result.
    """
    return max(2 * c_in, c_in + c_out, 3 * c_out)


TRANSFORMER = 19  # x C: entry, stream, norm, GEGLU's projection 8, gelu(gate) 4, product 4


def _unet_moments(unet: UNetConfig, h: int, w: int, item: int) -> Iterator[tuple[str, int]]:
    """(where, bytes alive) at each block of `VideoUNet._predict`."""
    pixels = _levels(h, w, len(unet.channels))
    held = 3 * unet.in_channels * pixels[0]  # the frame's latents, the memory, the input of a step
    skips = [unet.channels[0] * pixels[0]]
    width = unet.channels[0]
    for level, (channels, p) in enumerate(zip(unet.channels, pixels, strict=True)):
        for _ in range(unet.blocks_per_level):
            alive = held + sum(skips)
            yield f"down block {level}", item * (alive + _resnet(width, channels) * p)
            if unet.transformers[level]:
                yield (
                    f"transformer of down block {level}",
                    item * (alive + (1 + TRANSFORMER) * channels * p),
                )
            width = channels
            skips.append(channels * p)
        if level + 1 < len(unet.channels):
            skips.append(channels * pixels[level + 1])
    p = pixels[-1]
    yield "middle", item * (held + sum(skips) + (1 + TRANSFORMER) * width * p)
    for level in reversed(range(len(unet.channels))):
        channels, p = unet.channels[level], pixels[level]
        for _ in range(unet.blocks_per_level + 1):
            skip = skips.pop() // p
            alive = held + sum(skips)
            c_in = width + skip
            yield f"up block {level}", item * (alive + (c_in + _resnet(c_in, channels)) * p)
            if unet.transformers[level]:
                yield (
                    f"transformer of up block {level}",
                    item * (held + sum(skips) + (1 + TRANSFORMER) * channels * p),
                )
            width = channels


def _autoencoder_moments(chosen: Preset, h: int, w: int, item: int) -> Iterator[tuple[str, int]]:
    """(where, bytes alive) in the encoder and the decoder; a latent pixel is 8 x 8 of the frame."""
    auto: AutoencoderConfig = chosen.autoencoder
    half, quarter, eighth = auto.channels
    frame = 3 * 64  # values of the frame for each latent pixel
    memory = chosen.unet.memory_channels + auto.latent_channels
    # uint8 -> float32 -> scaled -> shifted, all float32, whatever the model's dtype
    yield "frame to model", h * w * (frame + 3 * frame * 4)
    # entry, silu, convolution, its silu
    yield "encoder", h * w * item * (frame + memory + 4 * half * 16)
    yield (
        "decoder at 1/4",
        h * w * item * (memory + max(eighth * 5, eighth * 4 + quarter * 4, 4 * quarter * 4)),
    )
    # the level below, enlarged to 1/2, convolution; then a block
    upsampled = max(quarter * 20, quarter * 16 + half * 16)
    yield "decoder at 1/2", h * w * item * (memory + max(upsampled, 4 * half * 16))
    yield "model to frame", h * w * (frame * item * 2 + 3 * frame * 4)


def of(denoiser: Denoiser, autoencoder: Autoencoder) -> Preset:
    """The configurations of a built model, for `predict` and `check`."""
    return Preset(denoiser.unet.config, autoencoder.config, denoiser.config)
