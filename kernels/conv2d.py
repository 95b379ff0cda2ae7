"""conv2d: out[b,o,p,q] = sum_{c,r,s} x[b,c,p*stride+r-padding,q*stride+s-padding] weight[o,c,r,s]
+ bias[o] + channel_bias[b,o] + residual[b,o,p,q].

    x [B, C, H, W];  weight [O, C, R, S];  out [B, O, P, Q],  P = (H + 2 padding - R) // stride + 1
    padding (before, after): as many zeros above and left, below and right
    with skip [B, C', H, W]: of cat([x, skip], 1); with upsample: of x doubled, nearest

A residual block of a U-Net adds its time embedding (channel_bias) after one convolution and its
input (residual) after the other; both fit the epilogue of the convolution, which saves a read and
a write of the activation each. Channels-last is the fast layout for x, weight and residual; out
takes the layout of x.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import checks, conv2d_sm90a, product_sm80
from mirage_hello.kernels.kernel import FLOATS, UNTIMED_RANK, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.kernels.triton import refuses_product
from mirage_hello.reference import Padding, sides

# Contract


def check(values: Mapping[str, Any]) -> None:
    """Shapes that fit each other, one floating dtype, a window that fits the padded image."""
    x, weight, stride, padding = (values[n] for n in ("x", "weight", "stride", "padding"))
    names = ("x", "weight", "bias", "channel_bias", "residual", "skip")
    checks.one_floating_dtype("conv2d", {name: values[name] for name in names})
    checks.dimensions("conv2d", "x", x, "B, C, H, W")
    checks.dimensions("conv2d", "weight", weight, "O, C, R, S")
    checks.whole_number("conv2d", "stride", stride, 1)
    if not isinstance(padding, int) and not (isinstance(padding, tuple) and len(padding) == 2):
        raise TypeError(
            "conv2d: padding must be an int, or a tuple (before, after) for both axes "
            f"(got {padding!r})"
        )
    for side in sides(padding):
        checks.whole_number("conv2d", "padding", side, 0)
    (batch, channels, *image), (outputs, in_channels, *window) = x.shape, weight.shape
    if values["skip"] is not None:
        checks.dimensions("conv2d", "skip", values["skip"], "B, C', H, W")
        expected = (batch, values["skip"].shape[1], *image)
        checks.shape("conv2d", "skip", values["skip"], expected, "B, C', H, W", "crop or pad it")
        channels += values["skip"].shape[1]
    if not isinstance(values["upsample"], bool):
        raise TypeError(
            f"conv2d: upsample must be a bool (got {values['upsample']!r}); True doubles the image"
        )
    if values["upsample"]:
        image = [2 * n for n in image]
    if channels != in_channels:
        raise ValueError(
            f"conv2d: weight must have the input's channels (got x C={channels}, weight "
            f"C={in_channels}; a skip's channels count with x's); "
            "grouped convolution is not covered"
        )
    if channels == 0 or outputs == 0:
        raise ValueError(f"conv2d: weight must have channels (got {tuple(weight.shape)})")
    around = sum(sides(padding))
    if any(0 in (w, n) or n + around < w for n, w in zip(image, window, strict=True)):
        raise ValueError(
            f"conv2d: a {window[0]}x{window[1]} window must fit the padded image (got "
            f"{image[0]}x{image[1]}, padding {padding}); use a larger image or more padding"
        )
    size = output_size(tuple(image), tuple(window), stride, padding)
    checks.shape("conv2d", "bias", values["bias"], (outputs,), "O", "give one value a channel")
    given = values["channel_bias"]
    checks.shape("conv2d", "channel_bias", given, (batch, outputs), "B, O", "expand the batch")
    expected = (batch, outputs, *size)
    checks.shape("conv2d", "residual", values["residual"], expected, "B, O, P, Q", "crop or pad it")


def output_size(
    image: tuple[int, int], window: tuple[int, int], stride: int, padding: Padding
) -> tuple[int, int]:
    """(P, Q) of an image (H, W) and a window (R, S)."""
    (height, width), (r, s), around = image, window, sum(sides(padding))
    return (height + around - r) // stride + 1, (width + around - s) // stride + 1


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """3x3 with everything in the epilogue, two inputs upsampled, stride 2, and 1x1 in NCHW."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=device, dtype=dtype)

    def image(*shape: int, scale: float = 1.0) -> Tensor:
        return draw(*shape, scale=scale).to(memory_format=torch.channels_last)

    x, weight = image(2, 32, 7, 6), image(40, 32, 3, 3, scale=0.06)  # 288 products: 288**-0.5
    epilogue = {"channel_bias": draw(2, 40), "residual": image(2, 40, 7, 6)}
    wide = image(2, 8, 7, 6)
    halves = x[:, :24].contiguous(memory_format=torch.channels_last)
    return [
        ((x, weight, draw(40)), {"padding": 1, **epilogue}),
        ((halves, weight, draw(40)), {"padding": 1, "skip": wide, "upsample": True}),
        ((x, weight, draw(40)), {"stride": 2, "padding": 1}),
        ((x, weight, None), {"stride": 2, "padding": (0, 1)}),
        ((draw(1, 24, 5, 5), draw(16, 24, 1, 1, scale=0.2)), {}),
    ]


define(Op("conv2d", reference.conv2d, check, samples))


def gathered(x: Tensor, skip: Tensor | None, upsample: bool) -> Tensor:
    """The input of the convolution as one tensor; x itself where there is nothing to do."""
    if skip is not None:
        x = torch.cat([x, skip], 1)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x


def evenly_padded(x: Tensor, padding: Padding) -> tuple[Tensor, int]:
    """x and the padding that is left to do, the same on every side: uneven ones are a copy."""
    before, after = sides(padding)
    return (x, before) if before == after else (F.pad(x, (before, after, before, after)), 0)


# torch


def conv2d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """F.conv2d (cuDNN), then each addition in place; the input is made first, by copies."""
    x, even = evenly_padded(gathered(x, skip, upsample), padding)
    out = F.conv2d(x, weight, bias, stride, even)
    if channel_bias is not None:
        out += channel_bias[:, :, None, None]
    if residual is not None:
        out += residual
    return out


# Triton


def conv2d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    from mirage_hello.kernels.triton.conv2d import conv2d

    x, even = evenly_padded(gathered(x, skip, upsample), padding)
    return conv2d(x, weight, bias, stride, even, channel_bias, residual)


# sm_80: kernels/product_sm80.py launches kernels/cuda/product.cu and ptx/product.sm80.ptx.j2
# PTX: kernels/conv2d_sm90a.py launches ptx/conv2d.sm90a.ptx.j2

# Registrations

register(
    Kernel(
        "conv2d",
        "torch",
        conv2d_torch,
        devices=("cpu", "cuda"),
        dtypes=(*FLOATS, torch.float64),
        differentiable=True,
    )
)
register(
    Kernel(
        "conv2d",
        "triton",
        conv2d_triton,
        refuses_product,
        source="kernels/triton/conv2d.py",
        arch="sm_80",
    )
)
register(
    Kernel(
        "conv2d",
        "ptx",
        conv2d_sm90a.conv2d_sm90a,
        conv2d_sm90a.supports,
        source="ptx/conv2d.sm90a.ptx.j2",
        arch="sm_90a",
        dtypes=(torch.bfloat16, torch.float16),
        rank=40,  # before torch: 1.2 to 3.2 times cuDNN on every shape measured
    )
)
for _backend, _source, _path in (
    ("cuda", product_sm80.cuda_source, "kernels/cuda/product.cu"),
    ("ptx", product_sm80.ptx_source, "ptx/product.sm80.ptx.j2"),
):
    register(
        Kernel(
            "conv2d",
            _backend,
            product_sm80.conv2d_with(_source),
            product_sm80.supports_conv2d,
            source=_path,
            arch="sm_80",
            dtypes=(torch.bfloat16, torch.float16),
            rank=UNTIMED_RANK,
        )
    )
