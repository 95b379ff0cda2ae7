"""What goes from layer to layer of a convolutional network: pixels and what belongs to them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Eight(NamedTuple):
    """Pixels in e4m3, in units of the scale."""

    values: Tensor
    scale: float


class Image(NamedTuple):
    """Pixels [B, C, H, W], and what their producer left: sums for a GroupNorm, a copy in e4m3 for
    convolutions without one; None: not. maker: the producer."""

    pixels: Tensor
    sums: Tensor | None = None
    eight: Eight | None = None
    maker: nn.Module | None = None


class Shortcut(NamedTuple):
    """conv(cat([x, skip])) of a 1x1 convolution, beside the branch that it is added to."""

    x: Image
    conv: nn.Conv2d
    skip: Image | None = None
