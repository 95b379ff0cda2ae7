"""conv2d: the 3x3 convolutions of Stable Diffusion's U-Net and autoencoder, NHWC, with a bias.

FLOPs: 2 B O H' W' C R S. Elements: B C H W read, O C R S + O weights, B O H' W' written.
"""

from __future__ import annotations

from .case import Case, Draw


def case(
    channels: int,
    out_channels: int,
    size: int,
    batch: int = 1,
    quick: bool = False,
    peers: tuple[str, ...] = ("cudnn",),
) -> Case:
    """3x3, stride 1, padding 1, channels last: x [B, C, S, S] -> [B, O, S, S]."""

    def make(draw: Draw) -> tuple:
        x = draw.image(batch, channels, size, size)
        # 1/sqrt(fan-in) keeps the outputs near 1, as a trained layer does.
        weight = draw.image(out_channels, channels, 3, 3, scale=(9 * channels) ** -0.5)
        bias = draw.normal(out_channels)
        return x, weight, bias, 1, 1, None, None

    pixels = batch * size * size
    prefix = f"n{batch} " if batch > 1 else ""
    return Case(
        op="conv2d",
        name=f"{prefix}{channels}->{out_channels} @{size}",
        make=make,
        flops=2 * pixels * out_channels * channels * 9,
        elements=pixels * (channels + out_channels) + out_channels * (9 * channels + 1),
        peers=peers,
        weights=(1, 2),
        quick=quick,
        layout="nhwc",
    )


CASES = (
    case(320, 320, 64, quick=True),
    case(960, 320, 64),
    case(640, 640, 32, quick=True),
    case(1920, 640, 32),
    case(1280, 1280, 16, quick=True),
    case(2560, 1280, 16),
    case(1280, 1280, 8),
    case(128, 128, 512),
    case(512, 512, 128),
    case(320, 320, 64, batch=8),
)
SMALL = (
    case(32, 32, 16, quick=True, peers=("torch-eager",)),
    case(96, 32, 16, peers=("torch-eager",)),
)
