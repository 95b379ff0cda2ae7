"""conv2d, linear and geglu in CUDA C++ (kernels/cuda/product.cu), for sm_80 and newer."""

import torch
from torch import Tensor

from mirage_hello.kernels import conv2d_sm90a, linear_sm90a
from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader

ELEMENTS = {torch.float16: ("__half", "f16"), torch.bfloat16: ("__nv_bfloat16", "bf16")}
BLOCK_M, BLOCK_N = 128, 64


def program(dtype: torch.dtype, gated: bool = False) -> loader.Program:
    element, mma = ELEMENTS[dtype]
    defines = {"ELEMENT": element, "MMA": mma, "GATED": str(int(gated))}
    return loader.cuda_program("product", defines)


def conv2d_cuda(
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
    """See ops.conv2d; without skip and upsample."""
    (batch, channels, height, width), (outputs, _, r, s) = x.shape, weight.shape
    p, q = ((n + 2 * padding - t) // stride + 1 for n, t in ((height, r), (width, s)))
    out = torch.empty(
        (batch, outputs, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    tensors = (x, weight, bias, channel_bias, residual, out)
    sizes = (channels, height, width, outputs, p, q, s, r * s, stride, padding, batch * p * q)
    return _launch(tensors, sizes, outputs, gated=False)


def linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """See ops.linear: a 1x1 convolution of one image, a row of M pixels."""
    n, k = weight.shape
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    rows = x.shape[:-1].numel()
    sizes = (k, 1, rows, n, 1, rows, 1, 1, 1, 0, rows)
    return _launch((x, weight, bias, None, residual, out), sizes, n, gated=False)


def geglu_cuda(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ops.geglu."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    rows = x.shape[:-1].numel()
    sizes = (k, 1, rows, n, 1, rows, 1, 1, 1, 0, rows)
    return _launch((x, weight, bias, None, None, out), sizes, n, gated=True)


def _launch(tensors: tuple, sizes: tuple[int, ...], outputs: int, gated: bool) -> Tensor:
    """`tensors` ends with the output, `sizes` with its pixels."""
    out = tensors[-1]
    if out.numel():
        columns = BLOCK_N // 2 if gated else BLOCK_N
        program(out.dtype, gated).launch(
            "product",
            grid=(-(-sizes[-1] // BLOCK_M), -(-outputs // columns), 1),
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
