"""Two-dimensional convolution (cross-correlation) with the epilogues a U-Net needs."""

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = int | tuple[int, int]  # zeros on every side; or before and after, on both axes


def sides(padding: Padding) -> tuple[int, int]:
    """(before, after): rows of zeros above and below, columns left and right."""
    return padding if isinstance(padding, tuple) else (padding, padding)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = 0,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """out[b,o,i,j] = sum_{c,r,s} y[b,c,i*stride+r-before,j*stride+s-before] weight[o,c,r,s]
    + bias[o] + channel_bias[b,o] + residual[b,o,i,j], where y = x, [x, skip] or these enlarged.

    Args:
        x: [B, C, H, W].
        weight: [O, C, R, S]; with a skip, [O, C + C', R, S].
        bias: [O] or None.
        stride: the same for both axes.
        padding: zeros around y, one number for every side, or (before, after): rows above and
            below, and columns left and right. Stable Diffusion's autoencoder pads (0, 1) before
            it halves an image.
        channel_bias: [B, O] or None (a time embedding).
        residual: [B, O, H', W'] or None.
        skip: [B, C', H, W] or None: more channels of y, behind those of x (a skip connection).
        upsample: y is twice as high and wide, each pixel of x (and skip) four times.

    Returns:
        [B, O, H', W'], dtype of x. H' = (height of y + before + after - R) // stride + 1, and W'
        by the width and S alike.

    Numerics: torch's convolution in the dtype of x; the additions follow in the order above.
    """
    if skip is not None:
        x = torch.cat([x, skip], 1)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    before, after = sides(padding)
    if before != after:
        x, before = F.pad(x, (before, after, before, after)), 0
    out = F.conv2d(x, weight, bias, stride=stride, padding=before)
    if channel_bias is not None:
        out = out + channel_bias[:, :, None, None]
    return out if residual is None else out + residual
