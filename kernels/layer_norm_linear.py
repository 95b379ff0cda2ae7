"""layer_norm_linear: linear(layer_norm(x)) without layer_norm's output, and layer_norm_geglu.

    W' = W diag(gamma),   s_n = sum_k W'[n, k],   b'_n = b_n + sum_k W[n, k] beta_k
    linear(layer_norm(x)) = rstd (x W'^T - mean s) + b'

`fold` makes W', s and b' once for all calls. Mean and rstd of the rows come from sums that the
linear before left (`linear_summed`), else from a small kernel, under which the product loads its
weights; the product multiplies x by W' and applies them to its float32 sums.

Not ops of the registry: they take the folded weight, and folding costs more than a call.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import linear_sm90a


@dataclass(frozen=True)
class FoldedLinear:
    """A linear layer behind a layer_norm, as `fold` makes it.

    weight: [N, K] W', in the dtype of the layer.
    columns: [N, 2] float32, (s_n, b'_n). s sums the rounded W', so that mean s is exactly the part
        of x W'^T that it must cancel.
    """

    weight: Tensor
    columns: Tensor


def fold(
    gamma: Tensor | None, beta: Tensor | None, weight: Tensor, bias: Tensor | None = None
) -> FoldedLinear:
    """W' = W diag(gamma), s_n = sum_k W'[n, k], b' = b + W beta; computed in float64.

    Args:
        gamma, beta: [K], layer_norm's weight and bias, or None.
        weight: [N, K]; geglu: the rows of h, then those of the gate.
        bias: [N] or None.

    Returns:
        On weight's device. W' is rounded to weight's dtype once: a relative error of 2^-9
        (bfloat16) in each weight, as the unfused form has in each normalised value.

    Raises:
        ValueError: gamma, beta or bias that do not fit weight.
    """
    n, k = weight.shape
    for name, t, size in (("gamma", gamma, k), ("beta", beta, k), ("bias", bias, n)):
        if t is not None and t.shape != (size,):
            raise ValueError(
                f"fold: {name} must be ({size},) (got {tuple(t.shape)}); weight is [{n}, {k}]"
            )
    exact = weight.detach().double()
    folded = (exact if gamma is None else exact * gamma.detach().double()).to(weight.dtype)
    offset = exact.new_zeros(n) if bias is None else bias.detach().double()
    if beta is not None:
        offset = offset + exact @ beta.detach().double()
    columns = torch.stack([folded.double().sum(1), offset], 1).float()
    return FoldedLinear(folded.contiguous(), columns.contiguous())


def layer_norm_linear(
    x: Tensor,
    folded: FoldedLinear,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    tile: linear_sm90a.Tile | None = None,
    sums: linear_sm90a.RowSums | None = None,
) -> Tensor:
    """out = linear(layer_norm(x)) + residual, the layer_norm over the last dimension.

    Args:
        x: [..., K] bfloat16 or float16, contiguous; K a multiple of 8 up to 4096. On a CPU the
            kernels are emulated; `layer_norm_linear_torch` is the plain form.
        folded: of `fold`; N a multiple of 8.
        residual: [..., N] or None.
        eps: added to the variance.
        tile: overrides the choice.
        sums: of x's rows, as linear_summed left them; None: a small kernel takes mean and rstd.

    Returns:
        [..., N], x's dtype.

    Raises:
        ValueError: K, N, layout, sums or a tile that the kernel does not take.

    Numerics: the mean, then squares around it, in float32; products and sums in float32. x W'^T
    and mean s cancel where |mean| is large against the spread: the error is about 2^-23 |mean| /
    std of the result's size (docs/linear.md), below a bfloat16 rounding up to |mean| = 10^4 std,
    where bfloat16 itself can no longer hold the spread.
    """
    columns = folded.columns
    return linear_sm90a.normed("linear", x, folded.weight, columns, residual, eps, tile, sums=sums)


def layer_norm_geglu(
    x: Tensor,
    folded: FoldedLinear,
    eps: float = 1e-5,
    tile: linear_sm90a.Tile | None = None,
    out_scale: float | None = None,
    sums: linear_sm90a.RowSums | None = None,
) -> Tensor:
    """out = h gelu(gate), (h, gate) the halves of linear(layer_norm(x)).

    Args:
        x, eps, tile, sums: as of layer_norm_linear.
        folded: of `fold`, of a weight [2N, K].
        out_scale: None, or the scale of an e4m3 output for linear_fp8 (its `x_scale`): the
            float32 values are divided by it and rounded once, saturated; N a multiple of 16.

    Returns:
        [..., N], x's dtype, or float8_e4m3fn with out_scale.

    Raises, Numerics: as layer_norm_linear.
    """
    columns = folded.columns
    return linear_sm90a.normed("geglu", x, folded.weight, columns, None, eps, tile, out_scale, sums)


def layer_norm_linear_torch(
    x: Tensor, folded: FoldedLinear, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The same by torch's kernels, for any device and floating dtype: one pass an operation."""
    normed = reference.layer_norm(x, None, None, eps)
    out = F.linear(normed, folded.weight.to(x.dtype), folded.columns[:, 1].to(x.dtype))
    return out if residual is None else out + residual


def layer_norm_geglu_torch(x: Tensor, folded: FoldedLinear, eps: float = 1e-5) -> Tensor:
    """See layer_norm_linear_torch."""
    h, gate = layer_norm_linear_torch(x, folded, None, eps).chunk(2, dim=-1)
    return h * F.gelu(gate)
