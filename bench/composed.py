"""Ops of the benchmark alone: what a U-Net chains, run as one, as a model would run it.

norm_conv2d      conv(silu(group_norm(x))) + bias, 3x3, at conv2d.py's shapes
residual_block   conv2(silu(norm2(conv1(silu(norm1(x))) + time bias))) + x, at three widths

Three ways of ours, whose rows stand side by side (`kernel`):

separate    group_norm_silu and conv2d, each the kernel that `auto` chooses
applied     group_norm_apply, a pass that takes the statistics from the sums that the producer of
            its input left, then conv2d, which leaves those of its output
folded      conv2d_fused: the convolution normalises its input itself while it reads it

`sums` of x are an argument, as they are in a model, where the layer before wrote them in its own
epilogue; the peers and `separate` have no use for them. Batch 1 unless named, channels last.
FLOPs: the convolutions'. Elements: x, weights, biases and result, each once, without the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import Kernel, Op, conv2d_fused, ops
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.conv2d_fused import Norm
from mirage_hello.kernels.group_norm_apply import group_norm_apply
from mirage_hello.kernels.kernel import arch_runs

from .case import Case, Draw

GROUPS, EPS = 32, 1e-5
PART = 128  # pixels of a part of the sums: an 8 x 16 tile of the producer


Function = Callable[..., Tensor]


# Separate: by any group_norm_silu and any conv2d


def norm_conv2d_by(norm_silu: Function, conv2d: Function) -> Function:
    def norm_conv2d(
        x: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return conv2d(norm_silu(x, GROUPS, gamma, beta, EPS), weight, bias, 1, 1)

    return norm_conv2d


def residual_block_by(norm_silu: Function, conv2d: Function) -> Function:
    def residual_block(
        x: Tensor,
        sums: Tensor,
        time_bias: Tensor,
        gammas: Tensor,
        betas: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        """time_bias [1, C]; gammas, betas [2, C]."""
        h = norm_silu(x, GROUPS, gammas[0], betas[0], EPS)
        h = conv2d(h, weight1, bias1, 1, 1, time_bias)
        h = norm_silu(h, GROUPS, gammas[1], betas[1], EPS)
        return conv2d(h, weight2, bias2, 1, 1, None, x)

    return residual_block


# By the sums that the producer left: `convolve` is one of the two below


def folded(x: Tensor, norm: Norm, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The convolution normalises what it reads."""
    conv = partial(conv2d_fused.conv2d_fused, norm=norm, unit=unit(weight.shape[0]))
    out, sums = conv(x, weight, *rest)
    assert sums is not None
    return out, sums


def applied(x: Tensor, norm: Norm, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """A pass normalises, and knows the statistics."""
    conv = partial(conv2d_fused.conv2d_fused, unit=unit(weight.shape[0]))
    out, sums = conv(group_norm_apply(x, norm), weight, *rest)
    assert sums is not None
    return out, sums


def norm_conv2d_with(convolve: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    def norm_conv2d(x, sums, gamma, beta, weight, bias) -> Tensor:
        return convolve(x, Norm(sums, GROUPS, gamma, beta, eps=EPS), weight, bias, 1, 1)[0]

    return norm_conv2d


def residual_block_with(convolve: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    def residual_block(x, sums, time_bias, gammas, betas, weight1, bias1, weight2, bias2) -> Tensor:
        norms = [partial(Norm, groups=GROUPS, weight=w, bias=b, eps=EPS)
                 for w, b in zip(gammas, betas, strict=True)]  # fmt: skip
        h, h_sums = convolve(x, norms[0](sums), weight1, bias1, 1, 1, time_bias)
        return convolve(h, norms[1](h_sums), weight2, bias2, 1, 1, None, x)[0]

    return residual_block


def unit(channels: int) -> int:
    """Channels that share a sum: 10 in a U-Net, else a group's."""
    return 10 if channels % 320 == 0 else channels // GROUPS


# Ways and cases


@dataclass(frozen=True)
class Way(Kernel):
    """A composition of kernels; `label` stands for the backend in its name."""

    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.op}/{self.label}"

    def refuses(self, call: Call) -> str | None:
        if self.arch and not arch_runs(self.arch, call.arch):
            return f"needs {self.arch} (got {call.arch})"
        return None


def composed(by: Callable[[Function, Function], Function], by_sums: Callable[..., Function]) -> Op:
    """An op that no registry holds, with our three ways."""

    def check(values: Mapping[str, Any]) -> None:
        pass  # the cases below are all that there is

    truth = by(reference.group_norm_silu, reference.conv2d)
    plain = by(ops.group_norm_silu.torch_kernel.run, ops.conv2d.torch_kernel.run)
    op = Op(truth.__name__, truth, check, lambda device, dtype: [])
    op.torch_kernel = Kernel(op.name, "torch", plain)
    op.kernels = [
        Way(op.name, "auto", by(ops.group_norm_silu, ops.conv2d), label="separate"),
        *(
            Way(op.name, "auto", by_sums(way), arch="sm_90a", label=way.__name__)
            for way in (applied, folded)
        ),
    ]
    return op


OPS = {
    "norm_conv2d": composed(norm_conv2d_by, norm_conv2d_with),
    "residual_block": composed(residual_block_by, residual_block_with),
}


def sums_of(x: Tensor) -> Tensor:
    """float32 [B, S, C / unit, 4] as a producer of 8 x 16 tiles leaves them."""
    batch, channels, height, width = x.shape
    parts = -(-height * width // PART)
    pixels = x.permute(0, 2, 3, 1).reshape(batch, parts, -1, channels).permute(0, 1, 3, 2)
    flat = pixels.reshape(batch * parts, channels, -1)
    return conv2d_fused.sums_torch(flat, unit(channels)).reshape(batch, parts, -1, 4)


COMPILED = ("torch-eager", "torch-compile")


def norm_conv_case(
    channels: int,
    out_channels: int,
    size: int,
    batch: int = 1,
    quick: bool = False,
    peers: tuple[str, ...] = COMPILED,
) -> Case:
    def make(draw: Draw) -> tuple:
        x = draw.image(batch, channels, size, size)
        scale = (9 * channels) ** -0.5
        weight = draw.image(out_channels, channels, 3, 3, scale=scale)
        norm = draw.normal(channels), draw.normal(channels)
        return x, sums_of(x), *norm, weight, draw.normal(out_channels)

    pixels = batch * size * size
    return Case(
        op="norm_conv2d",
        name=f"{f'n{batch} ' if batch > 1 else ''}{channels}->{out_channels} @{size}",
        make=make,
        flops=2 * pixels * out_channels * channels * 9,
        elements=pixels * (channels + out_channels)
        + out_channels * (9 * channels + 1)
        + 2 * channels,
        peers=peers,
        weights=(2, 3, 4, 5),
        quick=quick,
        layout="nhwc",
    )


def block_case(
    channels: int, size: int, quick: bool = False, peers: tuple[str, ...] = COMPILED
) -> Case:
    def make(draw: Draw) -> tuple:
        x = draw.image(1, channels, size, size)
        scale = (9 * channels) ** -0.5
        norms = draw.normal(2, channels), draw.normal(2, channels)
        convolutions = []
        for _ in range(2):
            convolutions += [draw.image(channels, channels, 3, 3, scale=scale)]
            convolutions += [draw.normal(channels)]
        return x, sums_of(x), draw.normal(1, channels), *norms, *convolutions

    return Case(
        op="residual_block",
        name=f"{channels}->{channels} @{size}",
        make=make,
        flops=2 * 2 * channels**2 * 9 * size**2,
        elements=2 * channels * size**2 + 2 * 9 * channels**2 + 7 * channels,
        peers=peers,
        weights=(3, 4, 5, 6, 7, 8),
        quick=quick,
        layout="nhwc",
    )


CASES = (
    norm_conv_case(320, 320, 64, quick=True),
    norm_conv_case(960, 320, 64),
    norm_conv_case(640, 640, 32, quick=True),
    norm_conv_case(1920, 640, 32),
    norm_conv_case(1280, 1280, 16, quick=True),
    norm_conv_case(2560, 1280, 16),
    norm_conv_case(1280, 1280, 8),
    norm_conv_case(128, 128, 512),
    norm_conv_case(512, 512, 128),
    norm_conv_case(320, 320, 64, batch=8),
    block_case(320, 64, quick=True),
    block_case(640, 32, quick=True),
    block_case(1280, 16, quick=True),
)
SMALL = (
    norm_conv_case(64, 64, 16, quick=True, peers=("torch-eager",)),
    block_case(64, 16, quick=True, peers=("torch-eager",)),
)
