"""linear_fp8: linear in e4m3, an explicit choice on Hopper.

    q = e4m3(x / a),   Q[n] = e4m3(weight[n] / w_n)
    out[m, n] = (q Q^T)[m, n] a w_n + bias[n] + residual[m, n]

One activation scale a for the layer, calibrated from samples; one weight scale w_n for each output
channel. Not an op of the registry: nothing chooses it for you, since its error is that of 3
mantissa bits (about 4 % of the output's size; docs/linear.md).

Behind a layer_norm, whose weights are folded in (`layer_norm_linear.fold`), the weight has one
scale w: e4m3 has exponents of its own, so a channel a thousand times smaller than the largest is
still rounded to 3 bits, and the epilogue keeps two numbers a column.

    layer_norm_linear_fp8   rstd (a w q Q^T - mean s) + b',   s = w sum_k Q[n, k]
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import linear_sm90a
from mirage_hello.kernels.layer_norm_linear import FoldedLinear
from mirage_hello.kernels.row_sums import RowSums

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # finite value of e4m3


@dataclass(frozen=True)
class Fp8Linear:
    """A linear layer in e4m3, as `pack` makes it.

    weight: [N, K] float8_e4m3fn.
    columns: [N, 2] float32, (a w_n, bias_n): what a column's sums are multiplied by, and its bias.
    x_scale: a.
    """

    weight: Tensor
    columns: Tensor
    x_scale: float


def calibrate(samples: Iterable[Tensor]) -> float:
    """The activation scale a = max |x| / 448 over all samples, so that none of them saturates."""
    largest = max((x.detach().abs().max().item() for x in samples if x.numel()), default=0.0)
    return largest / LARGEST or 1.0


def pack(weight: Tensor, x_scale: float, bias: Tensor | None = None) -> Fp8Linear:
    """Q[n] = e4m3(weight[n] / w_n) with w_n = max |weight[n]| / 448, and the columns' factors.

    Args:
        weight: [N, K], any floating dtype.
        x_scale: of `calibrate`, above 0.
        bias: [N] or None.
    """
    if not x_scale > 0:
        raise ValueError(f"linear_fp8: x_scale must be above 0 (got {x_scale}); calibrate() it")
    largest = weight.detach().abs().amax(1).float()
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    offset = torch.zeros_like(scale) if bias is None else bias.detach().float()
    columns = torch.stack([scale * x_scale, offset], 1)
    quantised = (weight.detach().float() / scale[:, None]).to(E4M3)
    return Fp8Linear(quantised.contiguous(), columns.contiguous(), x_scale)


def quantize(x: Tensor, x_scale: float) -> Tensor:
    """e4m3(x / x_scale), what is larger than 448 x_scale saturated."""
    return (x.float() * (1.0 / x_scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def linear_fp8(
    x: Tensor,
    packed: Fp8Linear,
    residual: Tensor | None = None,
    tile: linear_sm90a.Tile | None = None,
) -> Tensor:
    """out = x weight^T + bias + residual, products in e4m3, out in bfloat16.

    Args:
        x: [..., K] float8_e4m3fn (of `quantize`), or a float dtype, which is quantised first in
            passes of their own; contiguous, K a multiple of 16. On a CPU the kernel is emulated.
        packed: of `pack`; N a multiple of 8.
        residual: [..., N] bfloat16 or None.
        tile: overrides the choice.

    Returns:
        [..., N] bfloat16.

    Raises:
        ValueError: K, N, layout or a tile that the kernel does not take.

    Numerics: wgmma's fp8 sums keep about 14 bits; beside the quantisation (2^-4 relative in each
    factor) that does not show up to K = 5120, so they are not promoted to float32 on the way.
    """
    q = x if x.dtype == E4M3 else quantize(x, packed.x_scale)
    return linear_sm90a.scaled(q, packed.weight, packed.columns, residual, tile)


def linear_fp8_summed(
    x: Tensor,
    packed: Fp8Linear,
    residual: Tensor | None = None,
    copy_scale: float | None = None,
    tile: linear_sm90a.Tile | None = None,
) -> tuple[Tensor, RowSums]:
    """(linear_fp8, the sums of its rows) of an e4m3 x, for the layer_norm behind it.

    copy_scale: None, or the scale of a copy in e4m3 (`RowSums.copy`) of the bfloat16 output.
    """
    given = (x, packed.weight, packed.columns, residual)
    return linear_sm90a.scaled_summed(*given, tile, copy_scale)


@dataclass(frozen=True)
class Fp8Folded:
    """A linear layer behind a layer_norm in e4m3, as `fold` makes it.

    weight: [N, K] float8_e4m3fn. columns: [N, 2] float32, (s_n, b'_n). factor: [1] float32, a w,
    on the device, so that weights may change under a captured graph.
    """

    weight: Tensor
    columns: Tensor
    factor: Tensor


def fold(folded: FoldedLinear, x_scale: float) -> Fp8Folded:
    """A folded layer in e4m3: s sums the rounded weight, so that it cancels the mean's part.

    Args:
        folded: of `layer_norm_linear.fold`. x_scale: a of the rows before their layer_norm.

    Raises:
        ValueError: an x_scale that is not above 0.
    """
    if not x_scale > 0:
        raise ValueError(f"linear_fp8: x_scale must be above 0 (got {x_scale}); calibrate() it")
    wide = folded.weight.float()
    scale = (wide.abs().amax() / LARGEST).clamp_min(1e-12).reshape(1)
    weight = (wide / scale).to(E4M3)
    columns = torch.stack([weight.double().sum(1) * scale.double(), folded.columns[:, 1]], 1)
    return Fp8Folded(weight.contiguous(), columns.float().contiguous(), scale * x_scale)


def layer_norm_linear_fp8(
    sums: RowSums,
    folded: Fp8Folded,
    eps: float = 1e-5,
    tile: linear_sm90a.Tile | None = None,
) -> Tensor:
    """out = linear(layer_norm(x)) of x in e4m3, out in bfloat16.

    Args:
        sums: of x's rows, with the copy of x in e4m3 that its linear left.
        folded: of `fold`; N a multiple of 8, K of 16 up to 4096.

    Raises:
        ValueError: sums without a copy; K, N, sums or a tile that the kernel does not take.

    Numerics: as linear_fp8; mean and rstd are those of the rows in bfloat16.
    """
    x = copy_of(sums)
    given = ("linear", x, folded.weight, folded.columns, None, eps, tile, None, sums)
    return linear_sm90a.normed(*given, folded.factor)


def layer_norm_geglu_fp8(
    sums: RowSums,
    folded: Fp8Folded,
    out_scale: float,
    eps: float = 1e-5,
    tile: linear_sm90a.Tile | None = None,
) -> Tensor:
    """out = e4m3(h gelu(gate) / out_scale), (h, gate) the halves of layer_norm_linear_fp8."""
    x = copy_of(sums)
    given = ("geglu", x, folded.weight, folded.columns, None, eps, tile, out_scale, sums)
    return linear_sm90a.normed(*given, folded.factor)


def copy_of(sums: RowSums) -> Tensor:
    """The rows in e4m3. ValueError: their linear left none."""
    if sums.copy is None:
        raise ValueError(
            "linear_fp8: the sums have no e4m3 copy of their rows; give their linear a copy_scale"
        )
    return sums.copy


def layer_norm_linear_fp8_torch(
    x: Tensor, copy: Tensor, folded: Fp8Folded, eps: float = 1e-5
) -> Tensor:
    """The same in float64: x the rows, whose mean and spread count, copy what is multiplied."""
    wide = x.double()
    mean = wide.mean(-1, keepdim=True)
    rstd = (wide.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    sums = copy.double() @ folded.weight.double().T * folded.factor.double()
    return rstd * (sums - mean * folded.columns[:, 0].double()) + folded.columns[:, 1].double()


def linear_fp8_torch(x: Tensor, packed: Fp8Linear, residual: Tensor | None = None) -> Tensor:
    """The same in float64 on the quantised values: what the kernel must come to, in x's dtype or,
    of an x that is e4m3, bfloat16."""
    q = x if x.dtype == E4M3 else quantize(x, packed.x_scale)
    sums = q.double() @ packed.weight.double().T
    out = sums * packed.columns[:, 0].double() + packed.columns[:, 1].double()
    out = out if residual is None else out + residual.double()
    return out.to(torch.bfloat16 if x.dtype == E4M3 else x.dtype)
