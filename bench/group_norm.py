"""group_norm and group_norm_silu on the inputs of the convolutions in conv2d.py, 32 groups.

A case keeps its convolution's name: `960->320 @64` normalises the 960 input channels at 64 x 64.
FLOPs: 8 a value, 12 with SiLU (exp, add, divide, multiply): memory-bound whatever the count.
Elements: B C H W read and written once (the kernel must move no more), 2 C of weight and bias.
"""

from __future__ import annotations

from .case import Case, Draw

GROUPS = 32


def case(
    op: str,
    channels: int,
    out_channels: int,
    size: int,
    batch: int = 1,
    layout: str = "nhwc",
    quick: bool = False,
    peers: tuple[str, ...] = ("torch-eager", "torch-compile", "copy"),
) -> Case:
    """x [B, C, S, S], mean and variance of each of the 32 groups, then SiLU for group_norm_silu."""

    def make(draw: Draw) -> tuple:
        draw_x = draw.image if layout == "nhwc" else draw.normal
        x = draw_x(batch, channels, size, size)
        return x, GROUPS, draw.normal(channels), draw.normal(channels), 1e-5

    values = batch * channels * size * size
    prefix = f"n{batch} " if batch > 1 else ""
    suffix = "" if layout == "nhwc" else f" {layout}"
    return Case(
        op=op,
        name=f"{prefix}{channels}->{out_channels} @{size}{suffix}",
        make=make,
        flops=(12 if op == "group_norm_silu" else 8) * values,
        elements=2 * values + 2 * channels,
        peers=peers,
        quick=quick,
        layout=layout,
    )


CASES = (
    case("group_norm_silu", 320, 320, 64, quick=True),
    case("group_norm_silu", 960, 320, 64),
    case("group_norm_silu", 640, 640, 32, quick=True),
    case("group_norm_silu", 1920, 640, 32),
    case("group_norm_silu", 1280, 1280, 16, quick=True),
    case("group_norm_silu", 2560, 1280, 16),
    case("group_norm_silu", 1280, 1280, 8),
    case("group_norm_silu", 128, 128, 512, quick=True),
    case("group_norm_silu", 512, 512, 128),
    case("group_norm_silu", 320, 320, 64, batch=8),
    case("group_norm_silu", 320, 320, 64, layout="nchw"),
    case("group_norm_silu", 128, 128, 512, layout="nchw"),
    case("group_norm", 320, 320, 64, quick=True),
    case("group_norm", 128, 128, 512),
)
SMALL = (
    case("group_norm_silu", 64, 64, 16, quick=True, peers=("torch-eager", "copy")),
    case("group_norm_silu", 64, 64, 16, layout="nchw", peers=("torch-eager", "copy")),
    case("group_norm", 64, 64, 16, peers=("torch-eager", "copy")),
)
