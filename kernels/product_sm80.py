"""conv2d, linear and geglu for sm_80 and newer: kernels/cuda/product.cu, ptx/product.sm80.ptx.j2.

Both compute the same, step by step, and take the same arguments. A linear layer is a 1x1
convolution of one image, a row of M pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mirage_hello.kernels import conv2d_sm90a, linear_sm90a
from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader

ELEMENTS = {torch.float16: ("__half", "f16"), torch.bfloat16: ("__nv_bfloat16", "bf16")}
BLOCK_M, BLOCK_N = 128, 64

# (dtype, gated) -> the program and its entry
Source = Callable[[torch.dtype, bool], tuple[loader.Program, str]]


def cuda_source(dtype: torch.dtype, gated: bool) -> tuple[loader.Program, str]:
    element, mma = ELEMENTS[dtype]
    defines = {"ELEMENT": element, "MMA": mma, "GATED": str(int(gated))}
    return loader.cuda_program("product", defines), "product"


def ptx_source(dtype: torch.dtype, gated: bool) -> tuple[loader.Program, str]:
    short = ELEMENTS[dtype][1]
    return loader.program("product.sm80", dtype=short, GATED=gated), f"product_{short}"


def conv2d_with(source: Source) -> Callable[..., Tensor]:
    """ops.conv2d, without skip and upsample."""

    def conv2d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
        channel_bias: Tensor | None = None,
        residual: Tensor | None = None,
        skip: Tensor | None = None,
        upsample: bool = False,
    ) -> Tensor:
        (batch, channels, height, width), (outputs, _, r, s) = x.shape, weight.shape
        p, q = ((n + 2 * padding - t) // stride + 1 for n, t in ((height, r), (width, s)))
        layout = torch.channels_last
        size = (batch, outputs, p, q)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
        tensors = (x, weight, bias, channel_bias, residual, out)
        sizes = (channels, height, width, outputs, p, q, s, r * s, stride, padding, batch * p * q)
        return _launch(source, tensors, sizes, gated=False)

    return conv2d


def linear_with(source: Source) -> Callable[..., Tensor]:
    """ops.linear."""

    def linear(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        n, k = weight.shape
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
        tensors = (x, weight, bias, None, residual, out)
        return _launch(source, tensors, _as_convolution(x, n, k), gated=False)

    return linear


def geglu_with(source: Source) -> Callable[..., Tensor]:
    """ops.geglu."""

    def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n, k = weight.shape[0] // 2, weight.shape[1]
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
        tensors = (x, weight, bias, None, None, out)
        return _launch(source, tensors, _as_convolution(x, n, k), gated=True)

    return geglu


def _as_convolution(x: Tensor, n: int, k: int) -> tuple[int, ...]:
    rows = x.shape[:-1].numel()
    return (k, 1, rows, n, 1, rows, 1, 1, 1, 0, rows)


def _launch(source: Source, tensors: tuple, sizes: tuple[int, ...], gated: bool) -> Tensor:
    """`tensors` ends with the output; `sizes` are the kernel's, from C to the pixels."""
    out, outputs, pixels = tensors[-1], sizes[3], sizes[-1]
    if out.numel():
        program, entry = source(out.dtype, gated)
        program.launch(
            entry,
            grid=(-(-pixels // BLOCK_M), -(-outputs // (BLOCK_N // 2 if gated else BLOCK_N)), 1),
            block=(128, 1, 1),
            args=(*tensors, *sizes),
        )
    return out


def supports_conv2d(call: Call) -> str | None:
    if call.args["skip"] is not None or call.args["upsample"]:
        return "takes one input at its own size; use ptx, triton or torch for skip and upsample"
    return conv2d_sm90a.supports(call) or _refuses_pixels(call)


def _refuses_pixels(call: Call) -> str | None:
    x = call.args["x"].shape
    pixels = x[0] * (x[2] + 2 * call.args["padding"]) * (x[3] + 2 * call.args["padding"])
    return f"must have fewer than 2^31 pixels (got {pixels})" if pixels >= 2**31 else None


supports_linear = linear_sm90a.supports
