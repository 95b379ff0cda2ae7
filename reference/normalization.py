"""GroupNorm (with and without SiLU) and LayerNorm, in plain torch."""

import torch
from torch import Tensor

from mirage_hello.reference.elementwise import silu


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    skip: Tensor | None = None,
) -> Tensor:
    """y = (x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c, per sample and group of channels.

    Args:
        x: [B, C, *spatial]; C a multiple of groups.
        groups: number of groups; mean and (biased) variance run over C/groups channels and space.
        weight, bias: [C] or None (1 and 0).
        eps: added to the variance.
        skip: [B, C', *spatial] or None: channels that follow those of x, which are C + C' above.

    Returns:
        The shape, with a skip of cat([x, skip], 1), dtype and memory layout of x.

    Source: Wu and He 2018, "Group Normalization", equations 1 to 4.
    """
    if skip is not None:
        x = torch.cat([x, skip], 1)
    grouped = x.reshape(x.shape[0], groups, -1)
    if grouped.shape[-1]:
        centred = grouped - grouped.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        grouped = centred / (variance + eps).sqrt()
    y = grouped.reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        y = y * weight.reshape(per_channel)
    if bias is not None:
        y = y + bias.reshape(per_channel)
    return torch.empty_like(x).copy_(y)  # empty_like keeps a dense layout, channels_last included


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    skip: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x, ...)): arguments and result as `group_norm`."""
    return silu(group_norm(x, groups, weight, bias, eps, skip))


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Args:
        x: [..., K].
        weight, bias: [K] or None.
        eps: added to the (biased) variance.

    Returns:
        [..., K], dtype of x.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
    """
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
