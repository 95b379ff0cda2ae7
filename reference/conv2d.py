"""Two-dimensional convolution (cross-correlation) with the epilogues a U-Net needs."""

import torch
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
    skip: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """out[b,o,i,j] = sum_{c,r,s} x[b,c,i*stride+r-padding,j*stride+s-padding] weight[o,c,r,s]
    + bias[o] + channel_bias[b,o] + residual[b,o,i,j].

    Args:
        x: [B, C, H, W]; zero padding outside.
        weight: [O, C, R, S]; with a skip, [O, C + C', R, S].
        bias: [O] or None.
        stride, padding: the same for both axes.
        channel_bias: [B, O] or None (a time embedding).
        residual: [B, O, H', W'] or None, H' = (H + 2 padding - R) // stride + 1.
        skip: [B, C', H, W] or None: channels that follow those of x, a skip connection.
        upsample: convolve x (and skip) upsampled by 2, nearest; H and W count twice above.

    Returns:
        [B, O, H', W'], dtype of x.

    Numerics: torch's convolution in the dtype of x; the additions follow in the order above.
    """
    if skip is not None:
        x = torch.cat([x, skip], 1)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    out = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    if channel_bias is not None:
        out = out + channel_bias[:, :, None, None]
    return out if residual is None else out + residual
