"""e4m3 beside our own bfloat16: attention_fp8, linear_fp8 and conv2d_fp8, which no policy chooses.

The arguments hold the e4m3 tensors with their scales and the bfloat16 ones that they are of: the
kernel takes the former, the peer `bf16`, the op as `auto` runs it, the latter. Truth is float64 on
the e4m3 tensors, so parity says what the kernel adds to the quantisation, not what that costs.
FLOPs as in attention.py, linear.py and conv2d.py. Elements: of the e4m3 tensors a half each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import (
    Kernel,
    Op,
    attention_fp8,
    conv2d_fp8,
    conv2d_sm90a,
    linear_fp8,
    linear_sm90a,
    ops,
)

from .case import Case, Draw
from .composed import Way

# Error of the kernel's own roundings, where they are more than one of the output: attention rounds
# its probabilities to e4m3 (2^-4 / sqrt 3 = 3.6 %, less in their sum).
ALLOWED = {"attention_fp8": 0.04}


# The references, on values without a scale


def attention(q, k, v, q_scale, k_scale, v_scale, v_mean, q16, k16, v16) -> Tensor:
    values = v * v_scale[:, None] + v_mean[:, None]
    return reference.attention(q * q_scale[:, None], k * k_scale[:, None], values)


def linear(x, weight, columns, x16, weight16, bias16) -> Tensor:
    """columns [N, 2]: what a column is multiplied by, and its bias."""
    return x @ weight.T * columns[:, 0] + columns[:, 1]


def convolution(x, weight, scales, bias, x16, weight16) -> Tensor:
    return reference.conv2d(x, weight * scales[:, None, None, None], bias, 1, 1)


# The kernels


def attention_run(q, k, v, q_scale, k_scale, v_scale, v_mean, q16, k16, v16) -> Tensor:
    return attention_fp8.attention_fp8(q, k, v, q_scale, k_scale, v_scale, v_mean)


def linear_run(x, weight, columns, x16, weight16, bias16) -> Tensor:
    return linear_sm90a.scaled(x, weight, columns, None)


def convolution_run(x, weight, scales, bias, x16, weight16) -> Tensor:
    return conv2d_sm90a.conv2d_fused_sm90a(x, weight, bias, 1, 1, scales=scales)[0]


# The peer: the same op in bfloat16, as `auto` runs it

BF16: dict[str, Callable[..., Tensor]] = {
    "attention_fp8": lambda *args: ops.attention(*args[7:10]),
    "linear_fp8": lambda *args: ops.linear(*args[3:6]),
    "conv2d_fp8": lambda *args: ops.conv2d(args[4], args[5], args[3], 1, 1),
}


def eight_bit(name: str, truth: Callable[..., Tensor], run: Callable[..., Tensor]) -> Op:
    def check(values: Mapping[str, Any]) -> None:
        pass  # the cases below are all that there is

    def plain(*args: Any) -> Tensor:
        wide = (a.double() if isinstance(a, Tensor) else a for a in args)
        return truth(*wide).to(torch.bfloat16)

    op = Op(name, truth, check, lambda device, dtype: [])
    op.torch_kernel = Kernel(name, "torch", plain)
    op.kernels = [Way(name, "ptx", run, arch="sm_90a", label="ptx")]
    return op


OPS = {
    "attention_fp8": eight_bit("attention_fp8", attention, attention_run),
    "linear_fp8": eight_bit("linear_fp8", linear, linear_run),
    "conv2d_fp8": eight_bit("conv2d_fp8", convolution, convolution_run),
}


# Cases


def attention_case(heads: int, tokens: int, dim: int, quick: bool = False) -> Case:
    def make(draw: Draw) -> tuple:
        wide = [draw.normal(1, tokens, heads, dim) for _ in range(3)]
        (q, qs), (k, ks) = map(attention_fp8.quantize, wide[:2])
        v, vs, v_mean = attention_fp8.quantize_values(wide[2])
        return q, k, v, qs, ks, vs, v_mean, *wide

    return Case(
        op="attention_fp8",
        name=f"h{heads} {tokens}x{tokens} d{dim}",
        make=make,
        flops=4 * heads * tokens**2 * dim,
        elements=0,
        fixed_bytes=heads * tokens * dim * (3 + 2),
        peers=("bf16",),
        quick=quick,
    )


def linear_case(tokens: int, width: int, out: int, quick: bool = False) -> Case:
    def make(draw: Draw) -> tuple:
        x = draw.normal(tokens, width)
        weight, bias = draw.normal(out, width, scale=width**-0.5), draw.normal(out)
        packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
        q = linear_fp8.quantize(x, packed.x_scale)
        return q, packed.weight, packed.columns, x, weight, bias

    return Case(
        op="linear_fp8",
        name=f"{tokens}x{width}x{out}",
        make=make,
        flops=2 * tokens * width * out,
        elements=0,
        fixed_bytes=tokens * width + out * width + 8 * out + 2 * tokens * out,
        peers=("bf16",),
        weights=(1, 2, 4, 5),
        quick=quick,
    )


def conv_case(channels: int, out: int, size: int, quick: bool = False) -> Case:
    def make(draw: Draw) -> tuple:
        x = draw.image(1, channels, size, size)
        weight = draw.image(out, channels, 3, 3, scale=(9 * channels) ** -0.5)
        x_scale, packed = conv2d_fp8.calibrate([x]), conv2d_fp8.quantise_weight(weight)
        q = conv2d_fp8.quantise(x, x_scale)
        return q, packed.values, packed.scales * x_scale, draw.normal(out), x, weight

    pixels = size * size
    return Case(
        op="conv2d_fp8",
        name=f"{channels}->{out} @{size}",
        make=make,
        flops=2 * pixels * out * channels * 9,
        elements=0,
        fixed_bytes=pixels * (channels + 2 * out) + out * (9 * channels + 6),
        peers=("bf16",),
        weights=(1, 2, 3, 5),
        quick=quick,
        layout="nhwc",
    )


CASES = (
    attention_case(16, 8192, 128, quick=True),
    attention_case(16, 8192, 64),
    attention_case(8, 1024, 80),
    conv_case(320, 320, 64, quick=True),
    conv_case(960, 320, 64),
    conv_case(640, 640, 32),
    conv_case(1920, 640, 32),
    conv_case(1280, 1280, 16),
    conv_case(2560, 1280, 16),
    conv_case(1280, 1280, 8),
    conv_case(512, 512, 128),
    linear_case(4096, 320, 2560),
    linear_case(4096, 1280, 320),
    linear_case(1024, 640, 5120, quick=True),
    linear_case(1024, 2560, 640),
    linear_case(256, 1280, 10240),
    linear_case(256, 5120, 1280),
)
SMALL = ()  # no kernel runs on a CPU but emulated
