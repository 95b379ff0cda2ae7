"""linear and geglu: the projections of Stable Diffusion's transformer blocks, named M x K x N.

linear FLOPs: 2 M K N. Elements: M K + N K + N read, M N written (+ M N of the residual).
geglu FLOPs: 2 M K N with N = 2 x the output width. Elements: M K + N K + N, and M N / 2 written.
"""

from __future__ import annotations

from .case import Case, Draw


def linear(
    tokens: int, width: int, out: int, quick: bool = False, peers: tuple[str, ...] = ("cublas",)
) -> Case:
    """x [M, K] times weight [N, K] transposed, plus a bias [N]."""

    def make(draw: Draw) -> tuple:
        x = draw.normal(tokens, width)
        weight = draw.normal(out, width, scale=width**-0.5)
        return x, weight, draw.normal(out), None

    return Case(
        op="linear",
        name=f"{tokens}x{width}x{out}",
        make=make,
        flops=2 * tokens * width * out,
        elements=tokens * width + out * width + out + tokens * out,
        peers=peers,
        weights=(1, 2),
        quick=quick,
    )


def linear_residual(
    tokens: int,
    width: int,
    out: int,
    peers: tuple[str, ...] = ("torch-eager", "torch-compile"),
    quick: bool = False,
) -> Case:
    """The same with a residual [M, N] added in the epilogue."""
    plain = linear(tokens, width, out)

    def make(draw: Draw) -> tuple:
        return *plain.make(draw)[:3], draw.normal(tokens, out)

    return Case(
        op="linear",
        name=f"{plain.name} + residual",
        make=make,
        flops=plain.flops + tokens * out,
        elements=plain.elements + tokens * out,
        peers=peers,
        weights=(1, 2),
        quick=quick,
    )


def geglu(
    tokens: int,
    width: int,
    out: int,
    quick: bool = False,
    peers: tuple[str, ...] = ("torch-eager", "torch-compile"),
) -> Case:
    """h * gelu(gate) with h, gate = the two halves of the linear of x [M, K] and weight [N, K]."""
    plain = linear(tokens, width, out)

    def make(draw: Draw) -> tuple:
        return plain.make(draw)[:3]

    return Case(
        op="geglu",
        name=plain.name,
        make=make,
        flops=plain.flops,
        elements=plain.elements - tokens * out // 2,
        peers=peers,
        weights=(1, 2),
        quick=quick,
    )


CASES = (
    linear(4096, 320, 2560, quick=True),
    linear(4096, 1280, 320),
    linear(1024, 640, 5120, quick=True),
    linear(1024, 2560, 640),
    linear(256, 1280, 10240),
    linear(256, 5120, 1280),
    linear(4096, 320, 320),
    linear(1024, 640, 640),
    linear(256, 1280, 1280, quick=True),
    linear(4096, 320, 960),  # q, k and v in one product
    linear(1024, 640, 1920),
    linear(256, 1280, 3840),
    linear_residual(4096, 1280, 320),
    linear_residual(1024, 2560, 640),
    linear_residual(256, 5120, 1280),
    geglu(4096, 320, 2560, quick=True),
    geglu(1024, 640, 5120),
    geglu(256, 1280, 10240),
)
SMALL = (
    linear(256, 64, 256, quick=True, peers=("torch-eager",)),
    linear_residual(256, 64, 64, peers=("torch-eager",)),
    geglu(256, 64, 256, quick=True, peers=("torch-eager",)),
)
