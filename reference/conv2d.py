"""Two-dimensional convolution (cross-correlation) with the epilogues a U-Net needs."""

import torch.nn.functional as F
from torch import Tensor


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """out[b,o,i,j] = sum_{c,r,s} x[b,c,i*stride+r-padding,j*stride+s-padding] weight[o,c,r,s]
    + bias[o] + channel_bias[b,o] + residual[b,o,i,j].

    Args:
        x: [B, C, H, W]; zero padding outside.
        weight: [O, C, R, S].
        bias: [O] or None.
        stride, padding: the same for both axes.
        channel_bias: [B, O] or None (a time embedding).
        residual: [B, O, H', W'] or None, H' = (H + 2 padding - R) // stride + 1.

    Returns:
        [B, O, H', W'], dtype of x.

    Numerics: torch's convolution in the dtype of x; the additions follow in the order above.
    """
    out = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    if channel_bias is not None:
        out = out + channel_bias[:, :, None, None]
    return out if residual is None else out + residual
