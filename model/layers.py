"""Layers of the networks on the kernels: each call is fused as far as the kernels here reach.

Without a gradient, in half precision and where the policy leads to the sm_90a kernels, a
convolution leaves the sums that the next GroupNorm needs (kernels/conv2d_fused.py), which then
reads its input once, or not at all where the next convolution normalises what it loads; a LayerNorm
is folded into the linear layer behind it (kernels/layer_norm_linear.py). Everywhere else the same
layer is a chain of registry ops.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_hello.kernels import (
    conv2d_fp8,
    conv2d_fused,
    group_norm_apply,
    layer_norm_linear,
    linear_fp8,
    linear_sm90a,
    ops,
    prompt_attention,
)
from mirage_hello.kernels.call import device_arch
from mirage_hello.kernels.policy import current
from mirage_hello.kernels.row_sums import RowSums
from mirage_hello.model import fp8
from mirage_hello.model.derived import derived
from mirage_hello.ptx import programmatic

HALF = (torch.bfloat16, torch.float16)
CHANNELS = 8  # TMA moves 16 bytes: channels of a convolution come in multiples of 8
# A backend of conv2d_fused, None for op by op, or what the policy says.
_chosen: ContextVar[str | None] = ContextVar("fused backend", default="policy")


@dataclass(frozen=True)
class Ways:
    """Where two ways compute the same: the one that is taken, by measurement (docs/plan.md).

    Args:
        sums_from: pixels of a batch of images from which on a convolution leaves sums for the
            next GroupNorm; with fewer the norm takes its own statistics, which costs a pass less
            than the sums in the epilogue do.
        folds_from, folds_q_from: K from which on a LayerNorm is folded into q, k, v and the GEGLU
            behind it, or into the q of a cross-attention; below it is a pass of its own.
        merges_from: C from which on a transformer's second feed-forward product and its projection
            out are one product of K = 5 C.
        row_sums: a linear layer leaves sums of its rows for the LayerNorm folded behind it, which
            else takes a kernel for them.
        prompts: a cross-attention is two products with the matrices made of the prompt.
        branches: the shortcut of a residual block is a branch of the graph beside its main path.
        on_load: windows (1, 3) of the convolutions that normalise what they load.
    """

    sums_from: int = 0
    folds_from: int = 0
    folds_q_from: int = 0
    merges_from: int = 0
    row_sums: bool = True
    prompts: bool = True
    branches: bool = False
    on_load: tuple[int, ...] = ()


MEASURED = Ways()
_ways: ContextVar[Ways] = ContextVar("ways of layers", default=MEASURED)


class Image(NamedTuple):
    """Pixels [B, C, H, W], and the sums that their producer left for a GroupNorm, or None."""

    pixels: Tensor
    sums: Tensor | None = None


class Tokens(NamedTuple):
    """Rows [B, N, C], and the sums that their producer left for a LayerNorm, or None."""

    rows: Tensor
    sums: RowSums | None = None


class Keys(NamedTuple):
    """Keys and values [B, L, 2 C] of the conditioning tokens for one cross-attention, and what
    `prompt_attention.fold` made of them, or None."""

    keys_values: Tensor
    scores: Tensor | None = None
    columns: Tensor | None = None
    values: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All there are."""
        return [t for t in self if t is not None]


@contextlib.contextmanager
def fusing(backend: str | None) -> Iterator[None]:
    """Within the block, layers fuse by this backend of conv2d_fused in any dtype; None: not."""
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def going(ways: Ways) -> Iterator[None]:
    """Within the block, layers take these ways."""
    token = _ways.set(ways)
    try:
        yield
    finally:
        _ways.reset(token)


def on_a_branch(x: Image, make: Callable[[], Image]) -> tuple[Image, Any]:
    """make() of x, and the scope of the kernels that read it first: while a graph is captured, on a
    branch of it, which ends with that scope's beginning; elsewhere in order.

    What `make` reads must stay until then. A kernel that follows two others does not overlap.
    """
    if torch.compiler.is_compiling() or not (x.pixels.is_cuda and _ways.get().branches):
        return make(), contextlib.nullcontext()
    if not torch.cuda.is_current_stream_capturing():
        return make(), contextlib.nullcontext()
    current = torch.cuda.current_stream()
    side = _side_stream(current.device)
    side.wait_stream(current)
    with torch.cuda.stream(side), programmatic.without_overlap():
        made = make()
    return made, _after(side)


@contextlib.contextmanager
def _after(side: torch.cuda.Stream) -> Iterator[None]:
    torch.cuda.current_stream().wait_stream(side)
    with programmatic.without_overlap():
        yield


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fused_backend(x: Tensor, op: str = "conv2d") -> str | None:
    """The backend of the fused forms of `op` under the current policy; None: op by op."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if (chosen := _chosen.get()) != "policy":
        return chosen
    if x.dtype not in HALF:
        return None
    wish = current.get().wishes(op)[0]
    if not x.is_cuda:
        return "ptx" if wish == "ptx-emulated" else None
    return "ptx" if wish in ("auto", "ptx") and device_arch(x.device) == "sm_90a" else None


def convolve(
    x: Image,
    conv: nn.Conv2d,
    norm: nn.GroupNorm | None = None,
    *,
    skip: Image | None = None,
    upsample: bool = False,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    unit: int = 0,
    norm_silu: bool = True,
) -> Image:
    """act(conv(silu(norm(cat([x, skip])))) + channel_bias + residual), as one launch where it can.

    Args:
        x, skip: what is convolved, side by side along the channels.
        conv, norm: the parameters; without a norm x is read as it is.
        upsample: double the image first, nearest neighbour.
        channel_bias: [B, O]. residual: [B, O, P, Q].
        silu: of the result. unit: channels that share a sum in the result; 0: no sums.
        norm_silu: whether SiLU follows the norm.
    """
    backend = fused_backend(x.pixels)
    statistics = None
    stride, padding = conv.stride[0], int(conv.padding[0])
    if backend is not None and unit and not leaves_sums(x.pixels, conv, 2 if upsample else 1):
        unit = 0
    if norm is not None:
        if backend is not None:
            scale = fp8.scale_of(conv) if backend == "ptx" else None
            if scale is not None or conv.kernel_size[0] in _ways.get().on_load:
                statistics = _statistics(x, skip, norm, norm_silu)
            if statistics is not None and scale is not None:
                return _convolve_fp8(x, conv, statistics, skip, channel_bias, residual, unit, scale)
        if statistics is None:
            x, skip = normalise(x, norm, skip, norm_silu), None
            fp8.note(conv, x.pixels)
    weight, bias = (conv.weight, conv.bias) if backend is None else padded(conv)
    pixels, outputs = _pad_channels(x.pixels, weight, skip), conv.out_channels
    args = (stride, padding, channel_bias, residual, skip and skip.pixels, upsample)
    if backend is None or not (statistics or silu or unit):
        out = _first_channels(ops.conv2d(pixels, weight, bias, *args), outputs)
        return Image(ops.silu(out) if silu else out)
    out, sums = conv2d_fused.conv2d_fused(
        pixels, weight, bias, *args, norm=statistics, unit=unit,
        activation="silu" if silu else None, backend=backend,
    )  # fmt: skip
    return Image(_first_channels(out, outputs), sums)


def leaves_sums(x: Tensor, conv: nn.Conv2d, enlarged: int = 1) -> bool:
    """Whether a convolution of x, enlarged so many times, leaves sums of what it makes."""
    batch, _, *sides = x.shape
    rows, columns = (-(-n * enlarged // conv.stride[0]) for n in sides)
    # What normalises and rounds for a convolution in e4m3 takes sums.
    return batch * rows * columns >= _ways.get().sums_from or fp8.in_use(conv)


def _convolve_fp8(
    x: Image,
    conv: nn.Conv2d,
    statistics: conv2d_fused.Norm,
    skip: Image | None,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    unit: int,
    scale: float,
) -> Image:
    """The convolution in e4m3: the pass that normalises its input rounds it too."""

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            weight = conv2d_fp8.quantise_weight(conv.weight)
        return weight.values, weight.scales

    weight = conv2d_fp8.Weight(*derived(conv, (conv.weight,), make))
    h = group_norm_apply.group_norm_apply(
        x.pixels, statistics, skip and skip.pixels, out_scale=scale
    )
    out, sums = conv2d_fp8.conv2d_fp8(
        h, weight, scale, conv.bias, conv.stride[0], int(conv.padding[0]), channel_bias, residual,
        unit=unit,
    )  # fmt: skip
    return Image(out, sums)


def normalise(x: Image, norm: nn.GroupNorm, skip: Image | None = None, silu: bool = True) -> Image:
    """silu(GroupNorm(cat([x, skip]))), of the sums where their producers left them."""
    backend = fused_backend(x.pixels)
    statistics = _statistics(x, skip, norm, silu) if backend else None
    if statistics is not None:
        apply = group_norm_apply.torch_form
        if backend == "ptx":
            apply = group_norm_apply.group_norm_apply
        return Image(apply(x.pixels, statistics, skip and skip.pixels))
    op = ops.group_norm_silu if silu else ops.group_norm
    args = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    return Image(op(x.pixels, *args) if skip is None else op(x.pixels, *args, skip.pixels))


def _statistics(
    x: Image, skip: Image | None, norm: nn.GroupNorm, silu: bool = True
) -> conv2d_fused.Norm | None:
    """The norm with the sums of its input; None where a producer left none."""
    if x.sums is None or (skip is not None and skip.sums is None):
        return None
    skip_sums = None if skip is None else skip.sums
    return conv2d_fused.Norm(
        x.sums, norm.num_groups, norm.weight, norm.bias, skip_sums, norm.eps, silu
    )


def project_in(x: Image, conv: nn.Conv2d, norm: nn.GroupNorm) -> Tokens:
    """conv(norm(x)) of a 1x1 convolution, without SiLU, its pixels as rows."""
    if fused_backend(x.pixels) and x.sums is not None and 1 in _ways.get().on_load:
        h = convolve(x, conv, norm, norm_silu=False).pixels
        return Tokens(h.permute(0, 2, 3, 1).flatten(1, 2))
    h = normalise(x, norm, silu=False).pixels.permute(0, 2, 3, 1).flatten(1, 2)
    return _linear(h, conv.weight.flatten(1), conv.bias)


def project(x: Tokens, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """linear(layer_norm(x)), x [B, N, K]."""
    backend = _folds(x.rows, linear.in_features, linear.out_features)
    if backend is None:
        rows = ops.layer_norm(x.rows, norm.weight, norm.bias, norm.eps)
        return ops.linear(rows, linear.weight, linear.bias)
    folded = _folded(linear, norm)
    if backend == "ptx":
        return layer_norm_linear.layer_norm_linear(x.rows, folded, eps=norm.eps, sums=x.sums)
    return layer_norm_linear.layer_norm_linear_torch(x.rows, folded, eps=norm.eps)


def project_out(heads: Tensor, linear: nn.Linear, h: Tokens, readers: int) -> Tokens:
    """h + linear(heads); readers: columns of the layer behind the LayerNorm that reads it."""
    return _linear(heads.flatten(2), linear.weight, linear.bias, h.rows, readers)


def fold_prompt(
    keys_values: Tensor, to_q: nn.Linear, out: nn.Linear, norm: nn.LayerNorm, heads: int
) -> Keys:
    """The keys and values, and where kernels here take it and it pays the prompt folded: two
    products of heads x width columns in the place of q, attention and the projection out."""
    tokens, channels = keys_values.shape[1], to_q.in_features
    width = prompt_attention.width_of(tokens)
    small = width is not None and heads * width <= 2 * channels
    if not small or len(keys_values) > 1 or _folds(keys_values, channels, channels, True) != "ptx":
        return Keys(keys_values)
    with torch.no_grad():
        prompt = prompt_attention.fold(
            norm.weight, norm.bias, to_q.weight, keys_values[0], out.weight, heads
        )
    return Keys(keys_values, prompt.scores, prompt.columns, prompt.values)


def attend_prompt(
    h: Tokens, keys: Keys, out: nn.Linear, norm: nn.LayerNorm, heads: int
) -> Tokens | None:
    """h + out(attention) of a folded prompt; None: it is not folded, or not to be used."""
    if keys.scores is None or keys.columns is None or keys.values is None:
        return None
    if fused_backend(h.rows, "attention") != "ptx" or not _ways.get().prompts:
        return None
    width = len(keys.scores) // heads
    prompt = prompt_attention.Prompt(keys.scores, keys.columns, keys.values, width)
    p = prompt_attention.probabilities(h.rows, prompt, norm.eps, h.sums)
    return _linear(p, keys.values, out.bias, h.rows, 8 * h.rows.shape[-1])


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    readers: int = 0,
) -> Tokens:
    """x weight^T + bias + residual, with sums where a LayerNorm folded into its reader wants them;
    readers: columns of that layer, 0: many."""
    width = len(weight)
    if _folds(x, width, readers or 3 * width) == "ptx" and _ways.get().row_sums:
        return Tokens(*linear_sm90a.linear_summed(x, weight, bias, residual))
    return Tokens(ops.linear(x, weight, bias, residual=residual))


def gated(x: Tokens, linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """geglu(layer_norm(x)), x [B, N, K]."""
    backend = _folds(x.rows, linear.in_features, linear.out_features)
    if backend is None:
        rows = ops.layer_norm(x.rows, norm.weight, norm.bias, norm.eps)
        return ops.geglu(rows, linear.weight, linear.bias)
    folded = _folded(linear, norm)
    if backend == "ptx":
        return layer_norm_linear.layer_norm_geglu(x.rows, folded, norm.eps, sums=x.sums)
    return layer_norm_linear.layer_norm_geglu_torch(x.rows, folded, norm.eps)


def feed_forward(h: Tokens, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """h + out(geglu(layer_norm(h)))."""
    foldable = _folds(h.rows, gate.in_features, gate.out_features, always=True)
    scale = fp8.scale_of(out) if foldable == "ptx" else None
    if scale is None:
        x = gated(h, gate, norm)
        fp8.note(out, x)
        return ops.linear(x, out.weight, out.bias, residual=h.rows)
    x = layer_norm_linear.layer_norm_geglu(
        h.rows, _folded(gate, norm), norm.eps, out_scale=scale, sums=h.sums
    )

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            packed = linear_fp8.pack(out.weight, scale, out.bias)
        return packed.weight, packed.columns

    sources = (out.weight,) if out.bias is None else (out.weight, out.bias)
    weight, columns = derived(out, sources, make, scale)
    packed = linear_fp8.Fp8Linear(weight, columns, scale)
    return linear_fp8.linear_fp8(x, packed, h.rows)


def feed_forward_out(
    h: Tokens, x: Image, gate: nn.Linear, out: nn.Linear, norm: nn.LayerNorm, proj: nn.Conv2d,
    unit: int,
) -> Image | None:  # fmt: skip
    """x + proj(h + out(g)), g = geglu(layer_norm(h)), as x + [proj out, proj] [g, h]: one product
    where there were two, and one rounding less. None: as two, another way.
    """
    backend, width = fused_backend(h.rows), h.rows.shape[-1]
    if backend is None or width % 8 or fp8.in_use(out) or width < _ways.get().merges_from:
        return None
    g = gated(h, gate, norm)
    fp8.note(out, g)
    weight, bias = _merged(out, proj)
    sides = x.pixels.shape[2:]
    pixels, skip = (t.unflatten(1, sides).permute(0, 3, 1, 2) for t in (g, h.rows))
    args = (1, 0, None, x.pixels, skip)
    if not unit or not leaves_sums(x.pixels, proj):
        return Image(ops.conv2d(pixels, weight, bias, *args))
    return Image(
        *conv2d_fused.conv2d_fused(pixels, weight, bias, *args, unit=unit, backend=backend)
    )


def _folds(x: Tensor, depth: int, columns: int, always: bool = False) -> str | None:
    """How a LayerNorm is folded into the layer [columns, depth] behind it. The kernel takes K in
    blocks of 64; the gate halves N."""
    backend = None if depth % 64 or columns % 16 else fused_backend(x, "linear")
    if backend is None or always:
        return backend
    ways = _ways.get()
    least = ways.folds_q_from if columns == depth else ways.folds_from
    return backend if depth >= least else None


# Weights made of weights


def padded(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with zeros up to multiples of 8 channels in and out: 28 -> 320 is 32 -> 320,
    320 -> 4 is 320 -> 8, and both run on the tensor cores."""
    weight, bias = conv.weight, conv.bias
    missing_out, missing_in = -conv.out_channels % CHANNELS, -conv.in_channels % CHANNELS
    if not missing_out and not missing_in:
        return weight, bias

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide = F.pad(weight, (0, 0, 0, 0, 0, missing_in, 0, missing_out))
            wide = wide.contiguous(memory_format=torch.channels_last)
            return (wide,) if bias is None else (wide, F.pad(bias, (0, missing_out)))

    made = derived(conv, (weight,) if bias is None else (weight, bias), make)
    return made[0], made[1] if len(made) > 1 else None


def _folded(linear: nn.Linear, norm: nn.LayerNorm) -> layer_norm_linear.FoldedLinear:
    """The LayerNorm's weights folded into the linear layer's: diag(gamma) and beta."""
    gamma, beta, weight, bias = norm.weight, norm.bias, linear.weight, linear.bias
    sources = (gamma, beta, weight) if bias is None else (gamma, beta, weight, bias)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            folded = layer_norm_linear.fold(gamma, beta, weight, bias)
        return folded.weight, folded.columns

    return layer_norm_linear.FoldedLinear(*derived(linear, sources, make))


def _merged(out: nn.Linear, proj: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """[proj out, proj] as a 1x1 convolution's weight [C, 5 C, 1, 1], and proj(out's bias)."""
    sources = tuple(t for t in (out.weight, out.bias, proj.weight, proj.bias) if t is not None)

    def make() -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide = proj.weight.flatten(1).float()
            both = torch.cat([wide @ out.weight.float(), wide], 1).to(proj.weight.dtype)
            weight = both[:, :, None, None].contiguous(memory_format=torch.channels_last)
            if out.bias is None or proj.bias is None:
                return (weight,)
            bias = wide @ out.bias.float() + proj.bias.float()
            return weight, bias.to(proj.weight.dtype)

    made = derived(proj, sources, make)
    return made[0], made[1] if len(made) > 1 else None


def _first_channels(x: Tensor, count: int) -> Tensor:
    return x if x.shape[1] == count else x[:, :count]


def _pad_channels(x: Tensor, weight: Tensor, skip: Image | None) -> Tensor:
    missing = weight.shape[1] - x.shape[1] - (0 if skip is None else skip.pixels.shape[1])
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
