"""Residual and transformer blocks of the U-Net: every heavy operation is one registry op.

Modules hold parameters under the names that diffusers gives Stable Diffusion 1.5, so that loading
its checkpoint is a key lookup. Two exceptions, packed at load by `checkpoint.pack_attention`: in a
self-attention to_q, to_k and to_v are one matrix `to_qkv`, in a cross-attention to_k and to_v are
one matrix `to_kv`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_hello.kernels import ops
from mirage_hello.model.images import Image, Shortcut
from mirage_hello.model.layers import convolve, leaves_sums
from mirage_hello.model.rows import (
    Keys,
    Tokens,
    attend_prompt,
    feed_forward,
    feed_forward_out,
    fold_prompt,
    project,
    project_in,
    project_out,
)
from mirage_hello.model.ways import fused_backend

RESNET_EPS = 1e-5  # Stable Diffusion 1.5's values: 1e-5 in residual blocks,
TRANSFORMER_EPS = 1e-6  # 1e-6 in the GroupNorm ahead of a transformer


def channels_last(module: nn.Module) -> None:
    """Put every 4-d weight of a module into channels-last memory, in place."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class ResnetBlock(nn.Module):
    """y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + bias))), x = cat([x, skip]).

    bias: [B, C_out], from the noise level.
    The bias is added inside the first convolution and the shortcut inside the second: two launches
    a block where the convolutions normalise what they read, else four. Where the width changes the
    shortcut is a 1x1 convolution: more of K of the second one, or one launch more.
    """

    def __init__(self, c_in: int, c_out: int, embedding: int, groups: int, unit: int = 0) -> None:
        super().__init__()
        self.unit = unit
        self.norm1 = nn.GroupNorm(groups, c_in, eps=RESNET_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=RESNET_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def bias(self, embedding: Tensor) -> Tensor:
        """The channel bias [B, C_out] for one noise level; `embedding` is silu(time embedding)."""
        return ops.linear(embedding, self.time_emb_proj.weight, self.time_emb_proj.bias)

    def forward(self, x: Image, bias: Tensor, skip: Image | None = None) -> Image:
        h = convolve(x, self.conv1, self.norm1, skip=skip, channel_bias=bias, unit=self.unit)
        if self.conv_shortcut is None:
            return convolve(h, self.conv2, self.norm2, residual=x.pixels, unit=self.unit)
        shortcut = Shortcut(x, self.conv_shortcut, skip)
        return convolve(h, self.conv2, self.norm2, shortcut=shortcut, unit=self.unit)


class SelfAttention(nn.Module):
    """h + out(attention(q, k, v)), q, k and v being views of one fused product [B, N, 3C]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out: Any = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, h: Tokens, norm: nn.LayerNorm, reader: nn.Linear) -> Tokens:
        """h: the residual stream [B, N, C]; norm: what comes before q, k and v; reader: the layer
        behind the next norm."""
        qkv = project(h, self.to_qkv, norm)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, N, H, D], no copy
        return project_out(ops.attention(q, k, v), self.to_out[0], h, reader)


class CrossAttention(nn.Module):
    """h + out(attention(q(x), k, v)) with keys and values of the conditioning tokens.

    Keys and values depend on the tokens alone, so they are computed once per prompt, not per step.
    """

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.to_out: Any = nn.ModuleList([nn.Linear(channels, channels)])

    def keys(self, context: Tensor, norm: nn.LayerNorm, lasting: bool) -> Keys:
        """[B, L, context_dim] -> [B, L, 2C]; lasting: worth folding with the weights around it."""
        keys_values = ops.linear(context, self.to_kv.weight)
        if not lasting:
            return Keys(keys_values)
        return fold_prompt(keys_values, self.to_q, self.to_out[0], norm, self.heads)

    def forward(self, h: Tokens, norm: nn.LayerNorm, keys: Keys, reader: nn.Linear) -> Tokens:
        attended = attend_prompt(h, keys, self.to_q, self.to_out[0], norm, reader)
        if attended is not None:
            return attended
        q = project(h, self.to_q, norm).unflatten(-1, (self.heads, -1))
        k, v = keys.keys_values.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return project_out(ops.attention(q, k, v), self.to_out[0], h, reader)


class GEGLU(nn.Module):
    """h * gelu(gate) of one projection to twice the width."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)


class FeedForward(nn.Module):
    """h + W2 geglu(norm(h)); the keys "0" and "2" are diffusers' (1 is its dropout)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 4 * channels
        self.net: Any = nn.ModuleDict(
            {"0": GEGLU(channels, inner), "2": nn.Linear(inner, channels)}
        )

    def forward(self, h: Tokens, norm: nn.LayerNorm) -> Tensor:
        return feed_forward(h, self.net["0"].proj, self.net["2"], norm)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU; each after a LayerNorm and onto a residual stream."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, h: Tokens, keys: Keys) -> Tensor:
        return self.ff(self.attend(h, keys), self.norm3)

    def attend(self, h: Tokens, keys: Keys) -> Tokens:
        """Without the feed-forward."""
        h = self.attn1(h, self.norm1, self.attn2.to_q)
        return self.attn2(h, self.norm2, keys, self.ff.net["0"].proj)


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(GroupNorm(x)))) over the pixels of x as tokens.

    proj_in and proj_out are 1x1 convolutions in the checkpoint; in channels-last memory a 1x1
    convolution is a linear over the channels, whose residual form saves the last addition.
    """

    def __init__(
        self, channels: int, heads: int, context_dim: int, groups: int, unit: int = 0
    ) -> None:
        super().__init__()
        self.unit = unit
        self.norm = nn.GroupNorm(groups, channels, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, heads, context_dim)
        self.transformer_blocks: Any = nn.ModuleList(
            [block]
        )  # Any: the list's type has no item type
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def keys(self, context: Tensor, lasting: bool = False) -> Keys:
        """Keys and values of the conditioning tokens for this transformer."""
        block = self.transformer_blocks[0]
        return block.attn2.keys(context, block.norm2, lasting)

    def forward(self, x: Image, keys: Keys) -> Image:
        block, out = self.transformer_blocks[0], self.proj_out
        h = block.attend(project_in(x, self.proj_in, self.norm, block.attn1.to_qkv), keys)
        gate, product = block.ff.net["0"].proj, block.ff.net["2"]
        merged = feed_forward_out(h, x, gate, product, block.norm3, out, self.unit)
        if merged is not None:
            return merged
        rows = block.ff(h, block.norm3)
        if not self.unit or fused_backend(rows) is None or not leaves_sums(x.pixels, out):
            rows = ops.linear(rows, out.weight.flatten(1), out.bias, residual=_tokens(x.pixels))
            return Image(_image(rows, x), maker=out)
        return convolve(Image(_image(rows, x)), out, residual=x.pixels, unit=self.unit)


def _image(h: Tensor, like: Image) -> Tensor:
    """[B, HW, C] -> [B, C, H, W], channels-last again: a view."""
    return h.unflatten(1, like.pixels.shape[2:]).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, HW, C]; a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class Downsample(nn.Module):
    """Half the resolution by a 3x3 convolution of stride 2 (odd sizes round up)."""

    def __init__(self, channels: int, unit: int = 0) -> None:
        super().__init__()
        self.unit = unit
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Image) -> Image:
        return convolve(x, self.conv, unit=self.unit)


class Upsample(nn.Module):
    """Nearest neighbour to the size of the next skip connection, then a 3x3 convolution."""

    def __init__(self, channels: int, unit: int = 0) -> None:
        super().__init__()
        self.unit = unit
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Image, size: tuple[int, int]) -> Image:
        height, width = x.pixels.shape[2:]
        if size == (2 * height, 2 * width):
            return convolve(x, self.conv, upsample=True, unit=self.unit)
        wide = F.interpolate(x.pixels, size=size, mode="nearest")  # odd sizes
        return convolve(Image(wide, maker=x.maker), self.conv, unit=self.unit)


class Embedding(nn.Module):
    """W2 silu(W1 features(value) + b1) + b2: a scalar per sample as a vector [B, embedding].

    features: cos then sin of value / 10000^(i / half), i < half = width / 2 (diffusers' order).
    """

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, value: Tensor) -> Tensor:
        """value: [B] float32 on the module's device."""
        half = self.width // 2
        # float32 whatever the model's dtype: bfloat16 cannot tell 999 from 1000.
        exponent = torch.arange(half, device=value.device, dtype=torch.float32) / half
        angles = value.float()[:, None] * torch.pow(10000.0, -exponent)
        features = torch.cat([angles.cos(), angles.sin()], -1).to(self.linear_1.weight.dtype)
        h = ops.silu(ops.linear(features, self.linear_1.weight, self.linear_1.bias))
        return ops.linear(h, self.linear_2.weight, self.linear_2.bias)
