"""attention: out[b,n,h] = sum_m p[m] v[b,m,h],  p = softmax_m(scale q[b,n,h] . k[b,m,h]).

    q [B, N, H, D];  k, v [B, M, H, D];  out [B, N, H, D];  scale D**-0.5 unless given; not causal

Heads stay where the projection leaves them: q, k and v may be slices of one fused [B, N, 3, H, D]
tensor, and no backend copies them. M = 77 text tokens in cross-attention, M = N in
self-attention. Scores are kept in float32 and never leave the multiprocessor.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import attention_mma, attention_sm90a, checks
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.kernel import FLOATS, UNTIMED_RANK, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.kernels.triton import refuses_product

# Contract


def check(values: Mapping[str, Any]) -> None:
    """q, k, v of one floating dtype; the same B, H, D; k and v of one shape; scale a number."""
    q, k, v, scale = (values[name] for name in ("q", "k", "v", "scale"))
    checks.one_floating_dtype("attention", {"q": q, "k": k, "v": v})
    checks.dimensions("attention", "q", q, "B, N, H, D")
    checks.dimensions("attention", "k", k, "B, M, H, D")
    batch, _, heads, head_dim = q.shape
    expected = (batch, k.shape[1], heads, head_dim)
    advice = "repeat the heads or expand the batch"
    checks.shape("attention", "k", k, expected, "B, M, H, D", advice)
    checks.shape("attention", "v", v, expected, "B, M, H, D", "give k and v the same tokens")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(
            f"attention: scale must be a float or None (got {type(scale).__name__}); "
            "use scale.item(), or None for D**-0.5"
        )


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """Self-attention on slices of a fused projection, cross-attention with a ragged length."""
    qkv = torch.randn(2, 70, 3, 2, 40, device=device, dtype=dtype)
    q = torch.randn(1, 33, 2, 64, device=device, dtype=dtype)
    k, v = (torch.randn(1, 77, 2, 64, device=device, dtype=dtype) for _ in range(2))
    return [(qkv.unbind(2), {}), ((q, k, v), {"scale": 0.2})]


define(Op("attention", reference.attention, check, samples))


# torch


def attention_torch(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """scaled_dot_product_attention, which takes [B, H, N, D]: views, not copies."""
    if k.shape[1] == 0:  # an empty sum; the attention backends differ on it
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


# Triton


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    from mirage_hello.kernels.triton.attention import attention

    return attention(q, k, v, scale)


def supports_triton(call: Call) -> str | None:
    head_dim = call.args["q"].shape[-1]
    if head_dim > 256:
        return f"head dimension must be at most 256 (got {head_dim})"
    for name in ("q", "k", "v"):
        if head_dim > 1 and call.args[name].stride[-1] != 1:
            return f"{name} must have D contiguous (got strides {call.args[name].stride})"
    return refuses_product(call)


# CUDA C++ and PTX: kernels/attention_mma.py launches kernels/cuda/attention.cu and
# ptx/attention.sm80.ptx.j2, kernels/attention_sm90a.py launches ptx/attention.sm90a.ptx.j2

# Registrations

register(
    Kernel(
        "attention",
        "torch",
        attention_torch,
        devices=("cpu", "cuda"),
        dtypes=(*FLOATS, torch.float64),
        differentiable=True,
    )
)
register(
    Kernel(
        "attention",
        "triton",
        attention_triton,
        supports_triton,
        source="kernels/triton/attention.py",
        arch="sm_80",
    )
)
register(
    Kernel(
        "attention",
        "ptx",
        attention_sm90a.attention_sm90a,
        attention_sm90a.supports,
        source="ptx/attention.sm90a.ptx.j2",
        arch="sm_90a",
        dtypes=(torch.bfloat16, torch.float16),
    )
)
register(
    Kernel(
        "attention",
        "ptx",
        attention_mma.attention_sm80,
        attention_mma.supports,
        source="ptx/attention.sm80.ptx.j2",
        arch="sm_80",
        dtypes=(torch.bfloat16, torch.float16),
        rank=UNTIMED_RANK,
    )
)
register(
    Kernel(
        "attention",
        "cuda",
        attention_mma.attention_cuda,
        attention_mma.supports,
        source="kernels/cuda/attention.cu",
        arch="sm_80",
        dtypes=(torch.bfloat16, torch.float16),
        rank=UNTIMED_RANK + 1,  # the PTX one is faster at every shape timed
    )
)
