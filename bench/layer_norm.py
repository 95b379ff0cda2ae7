"""layer_norm: the token widths of Stable Diffusion's transformer blocks, named tokens x width.

FLOPs: 8 a value (sum, square, sum, subtract, multiply, scale, shift, and one for the division's
share): memory-bound whatever the count. Elements: M K read, M K written, 2 K of weight and bias.
"""

from __future__ import annotations

from .case import Case, Draw


def case(
    tokens: int,
    width: int,
    quick: bool = False,
    peers: tuple[str, ...] = ("torch-eager", "torch-compile", "copy"),
) -> Case:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of x [M, K]."""

    def make(draw: Draw) -> tuple:
        return draw.normal(tokens, width), draw.normal(width), draw.normal(width), 1e-5

    return Case(
        op="layer_norm",
        name=f"{tokens}x{width}",
        make=make,
        flops=8 * tokens * width,
        elements=2 * tokens * width + 2 * width,
        peers=peers,
        quick=quick,
    )


CASES = (
    case(4096, 320, quick=True),
    case(1024, 640),
    case(256, 1280, quick=True),
    case(65536, 1280),  # 168 MB in bf16: past the L2, so the copy rate is its ceiling
)
SMALL = (case(256, 320, quick=True, peers=("torch-eager", "copy")),)
