"""The two ends of a frame: what lies between the uint8 picture, the network and the memory.

    frame_patches   uint8 [1, H, W, 3] -> [1, 16, h2, w2]: 2x2 pixels as channels, in [-1, 1]
    network_input   the sampler's start x, and [c_in x, latents, memory with noise, 0 ..]
    scale_input     c_in x of a later step into that input
    denoised        D = c_skip x + c_out F, with guidance F = F_0 + g (F_1 - F_0)
    remember        the memory's shift, and the latents for the decoder
    patches_frame   [1, 16, h2, w2] -> uint8 [1, H, W, 3], cropped

Each is one launch of ptx/frame_edges.ptx.j2 where torch needs five to ten. Not ops of the registry:
their arguments exist only inside a frame. Half precision, channels-last; the torch form of each is
what model/frame.py does without them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.ptx import loader

SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16"}
THREADS = 128
PATCH = 16  # channels of a patch: 2 x 2 pixels x 3 colours, and zeros up to a multiple of 8
PITCH = 8  # channels of the latents' images: 4 or 8, padded to 8


@dataclass(frozen=True)
class Shape:
    """latent channels, past outputs in the memory, and the network's input channels."""

    latent: int
    history: int
    dtype: torch.dtype
    copies: int = 1  # of the network's input: 2 with guidance

    @property
    def channels(self) -> int:
        """Of the network's input, padded: 2 x latent + (history + 1) x latent, up to 8."""
        return -(-self.latent * (self.history + 3) // 8) * 8

    def launch(self, entry: str, n: int, args: tuple) -> None:
        """Launch an entry on n threads; n and what follows it in `args` end the parameters."""
        program = loader.program(
            "frame_edges", dtype=SHORT_NAME[self.dtype], LATENT=self.latent, HISTORY=self.history,
            PADDED=self.channels, COPIES=self.copies, PITCH=PITCH, THREADS=THREADS,
        )  # fmt: skip
        name = f"{entry}_{SHORT_NAME[self.dtype]}"
        program.launch(name, (-(-n // THREADS),), (THREADS,), args)


def supports(latent: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take latents of so many channels in this dtype."""
    return latent in (4, 8) and dtype in SHORT_NAME


def frame_patches(frame: Tensor, shape: Shape) -> Tensor:
    """x / 127.5 - 1 of uint8 [1, H, W, 3], rows and columns repeated up to multiples of 8.

    Returns: [1, 16, h2, w2] channels-last, channels (dy, dx, rgb, 0 0 0 0).
    """
    _, height, width, _ = frame.shape
    h2, w2 = -(-height // 8) * 4, -(-width // 8) * 4
    out = _image(frame, 1, PATCH, h2, w2, shape.dtype)
    n = h2 * w2
    shape.launch("frame_patches", n, (frame, out, n, w2, height, width))
    return out


def patches_frame(patches: Tensor, frame: Tensor, shape: Shape) -> None:
    """clamp(round_half_even((x + 1) 127.5), 0, 255) of patches, cropped to uint8 [1, H, W, 3].

    patches: the first 12 channels of [1, 16, h2, w2], as `frame_patches` makes them.
    """
    _, height, width, _ = frame.shape
    _pitched("patches_frame", patches, PATCH)
    h2, w2 = patches.shape[2:]
    n = h2 * w2
    shape.launch("patches_frame", n, (patches, frame, n, w2, height, width))


def network_input(
    latents: Tensor,
    history: Tensor,
    sink: Tensor,
    noise: Tensor,
    memory_noise: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor, Tensor],
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """x = start latents + sigma noise; the input [c_in x, latents, memory + level noise, 0 ..].

    Args:
        latents: [1, L, h, w], 8 channels apart. history: [1, K L, h, w]. sink: [1, L, h, w].
        noise, memory_noise: float32 [1, L, h, w] and [1, (K + 1) L, h, w].
        scalars: (start, sigma, level, c_in), float32 [1] each.
    Returns:
        (x float32 [1, L, h, w], input [copies, channels, h, w]).
    """
    _pitched("network_input", latents, PITCH)
    h, w = latents.shape[2:]
    x = _image(latents, 1, shape.latent, h, w, torch.float32)
    out = _image(latents, shape.copies, shape.channels, h, w, shape.dtype)
    n = h * w * shape.channels
    args = (latents, history, sink, noise, memory_noise, *scalars, x, out, n)
    shape.launch("network_input", n, args)
    return x, out


def scale_input(x: Tensor, c_in: Tensor, out: Tensor, shape: Shape) -> None:
    """c_in x into the first channels of the network's input, in place."""
    n = x.numel()
    shape.launch("scale_input", n, (x, c_in, out, n))


def denoised(
    x: Tensor,
    prediction: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    guidance: Tensor | None,
    shape: Shape,
) -> Tensor:
    """D = c_skip x + c_out F, float32 [1, L, h, w]; F = F_0 + g (F_1 - F_0) of a batch of two.

    prediction: [copies, L, h, w], 8 channels apart. c_skip, c_out, guidance: float32 [1].
    """
    _pitched("denoised", prediction, PITCH)
    out = torch.empty_like(x)
    n = x.numel()
    scalars = (c_skip, c_out) if guidance is None else (c_skip, c_out, guidance)
    shape.launch("denoised", n, (x, prediction, *scalars, out, n))
    return out


def remember(clean: Tensor, count: Tensor, history: Tensor, sink: Tensor, shape: Shape) -> Tensor:
    """The memory with `clean` float32 [1, L, h, w] as its newest output; in place, but for count.

    Returns: the latents [1, 8, h, w] in the memory's dtype, zeros after the first L channels.
    """
    h, w = clean.shape[2:]
    out = _image(clean, 1, PITCH, h, w, shape.dtype)
    shape.launch("remember", h * w, (clean, count, history, sink, out, h * w))
    return out


def _image(like: Tensor, batch: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    size = (batch, c, h, w)
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _pitched(name: str, x: Tensor, pitch: int) -> None:
    """Raises ValueError: not channels-last with `pitch` channels from pixel to pixel."""
    if x.stride()[1:] != (1, x.shape[3] * pitch, pitch) or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: needs pixels {pitch} channels apart, channels last, on 16 bytes "
            f"(got {tuple(x.shape)}, strides {x.stride()})"
        )
