"""attention on sm_80 and later: the launches of the mma.sync kernels, in CUDA C++ and in PTX."""

import math

import torch
from torch import Tensor

from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader

ELEMENT = {torch.bfloat16: ("__nv_bfloat16", "bf16"), torch.float16: ("__half", "f16")}
MAX_GRID_YZ = 65535


def attention_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """See ops.attention; kernels/cuda/attention.cu."""
    head_dim = q.shape[3]
    program = cuda_source(head_dim, q.dtype)
    return _launch(program, "attention", *tile(head_dim), q, k, v, scale)


def cuda_source(head_dim: int, dtype: torch.dtype) -> loader.Program:
    element, kind = ELEMENT[dtype]
    return loader.cuda_program(
        "attention", defines={"ELEMENT": element, "KIND": kind, "HEAD_DIM": str(head_dim)}
    )


def attention_sm80(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """See ops.attention; ptx/attention.sm80.ptx.j2."""
    kind, head_dim = ELEMENT[q.dtype][1], q.shape[3]
    program = loader.program("attention.sm80", HEAD_DIM=head_dim, dtype=kind)
    return _launch(program, f"attention_{kind}", *tile(head_dim), q, k, v, scale)


def tile(head_dim: int) -> tuple[int, int]:
    """BLOCK_M and BLOCK_N of both sources."""
    return (128 if head_dim <= 64 else 64), 64 if head_dim <= 128 else 32 if head_dim <= 192 else 16


def _launch(
    program: loader.Program,
    entry: str,
    block_m: int,
    block_n: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
) -> Tensor:
    """128 threads, one block for `block_m` queries of a head; Q and two buffers of K and V."""
    b, n, h, d = q.shape
    m = k.shape[1]
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if m == 0:
        return out.zero_()
    q, scale = positive_scale(q, scale)
    row_bytes = -(-d // 64) * 128
    program.launch(
        entry,
        grid=(-(-n // block_m), h, b),
        block=(128,),
        args=(q, k, v, out, *_strides(q), *_strides(k), *_strides(v), n, m, scale),
        smem_bytes=row_bytes * (block_m + 4 * block_n),
    )
    return out


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """(q, scale * log2(e)) with the factor above 0, since the kernels take the largest score for
    the largest exponent; 0 becomes 1e-30, which masked scores of -inf survive."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0:
        q, scale = -q, -scale
    return q, (scale or 1e-30) * math.log2(math.e)


def _strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def supports(call: Call) -> str | None:
    """Head dimensions in 16-byte pieces, and rows that start on 16 bytes."""
    q = call.args["q"]
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dimension must be a multiple of 8, at most 256 (got {q.shape[-1]})"
    if max(q.shape[0], q.shape[2]) > MAX_GRID_YZ:
        return f"batch and heads must be at most {MAX_GRID_YZ} (got {q.shape[0]}, {q.shape[2]})"
    for name in ("q", "k", "v"):
        spec = call.args[name]
        if not spec.aligned16 or any((s * spec.dtype.itemsize) % 16 for s in spec.stride[:-1]):
            return f"{name} must start and stride on 16 bytes (got strides {spec.stride})"
        if spec.stride[-1] != 1:
            return f"{name} must have D contiguous (got strides {spec.stride})"
    return None
