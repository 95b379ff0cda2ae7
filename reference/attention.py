"""softmax(scale * Q K^T) V, in plain torch."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """out[b,n,h] = softmax_m(scale * q[b,n,h] . k[b,m,h]) @ v[b,m,h], non-causal.

    Args:
        q: [B, N, H, D], any floating dtype.
        k, v: [B, M, H, D], same dtype. M = 0 gives zeros: an empty sum.
        scale: factor on the scores; default D**-0.5.

    Returns:
        [B, N, H, D], contiguous, dtype of q.

    Numerics: every step in the dtype of the inputs; pass float64 for the truth.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if k.shape[1] == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).contiguous()
