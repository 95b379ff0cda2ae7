"""Linear layers: plain, with residual, and GELU-gated."""

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """out = x weight^T + bias + residual.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        residual: [..., N] or None.

    Returns:
        [..., N], dtype of x.
    """
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h * gelu(gate), with (h, gate) the two halves of x weight^T + bias; gelu uses erf.

    Args:
        x: [..., K].
        weight: [2N, K]: rows 0..N-1 give h, rows N..2N-1 the gate.
        bias: [2N] or None.

    Returns:
        [..., N], dtype of x.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    h, gate = linear(x, weight, bias).chunk(2, dim=-1)
    return h * F.gelu(gate)
