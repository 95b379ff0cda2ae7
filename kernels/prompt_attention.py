"""prompt_attention: cross-attention whose keys and values do not change, as two linear layers.

    softmax(q K^T / sqrt(d)) V Wo^T,   q = layer_norm(x) Wq^T, heads of d columns

K and V are those of a prompt, so K_h Wq_h and Wo_h V_h^T are matrices like any weight's:

    A = log2(e) / sqrt(d) K_h Wq_h     [heads width, C], `width` rows a head, zeros after the last
    B = Wo_h V_h^T                     [C, heads width]
    out = x + b + P B^T,   P = softmax in base 2 of layer_norm(x) A^T, head by head

`fold` makes A, with the layer_norm folded in, and B once for a prompt; a call is two products and
no attention: the softmax is in the first one's epilogue. Not an op of the registry: it takes the
folded prompt. Of 77 tokens and 8 heads A has 640 rows, where Wq has 320, 640 or 1280.
"""

import functools
import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.kernels import layer_norm_linear, linear_fp8, linear_sm90a
from mirage_hello.kernels.row_sums import RowSums

log = logging.getLogger("mirage_hello")
# Columns of a softmax: those that divide the columns of one of the kernel's tiles.
WIDTHS = tuple(
    width for width in range(8, 257, 8) if any(n % width == 0 for n in linear_sm90a.WIDTHS)
)
LARGEST_ERROR = 1e-2  # of the self-test: bfloat16's rounding of P alone is 2e-3
P_SCALE = 1 / linear_fp8.LARGEST  # of probabilities in e4m3
NOWHERE = -1e30  # in the place of -inf, whose products with 0 would be NaN


@dataclass(frozen=True)
class Prompt:
    """Keys and values of a prompt between the weights around them, as `fold` makes it.

    scores: [heads width, C], A with the layer_norm's gamma; columns: float32 [heads width, 2] of
    `layer_norm_linear.FoldedLinear`. values: [C, heads width], B. width: columns of a softmax.
    """

    scores: Tensor
    columns: Tensor
    values: Tensor
    width: int


def width_of(tokens: int) -> int | None:
    """Columns for a head of so many tokens; None: more than the kernel holds."""
    return next((width for width in WIDTHS if width >= tokens), None)


def fold(
    gamma: Tensor,
    beta: Tensor,
    to_q: Tensor,
    keys_values: Tensor,
    to_out: Tensor,
    heads: int,
) -> Prompt:
    """A and B of a prompt; products in float32, rounded once to the weights' dtype.

    Args:
        gamma, beta: [C] of the layer_norm. to_q: [C, C], without bias. to_out: [C, C].
        keys_values: [L, 2 C], L at most 256.
    Raises:
        ValueError: L above 256, heads that do not divide C, keys_values of another C.
    """
    tokens, channels = keys_values.shape[0], to_q.shape[0]
    if channels % heads or keys_values.shape[1:] != (2 * channels,):
        raise ValueError(
            f"prompt_attention: keys_values must be [L, 2 C] and heads divide C (got "
            f"{list(keys_values.shape)}, C={channels}, heads={heads})"
        )
    width = width_of(tokens)
    if width is None:
        raise ValueError(f"prompt_attention: at most {WIDTHS[-1]} tokens (got {tokens})")
    d = channels // heads
    k, v = keys_values.float().unflatten(-1, (2, heads, d)).permute(1, 2, 0, 3)  # [H, L, d] each
    scale = math.log2(math.e) / math.sqrt(d)
    scores = scale * k @ to_q.float().unflatten(0, (heads, d))  # [H, L, C]
    values = to_out.float().unflatten(1, (heads, d)).permute(1, 0, 2) @ v.mT  # [H, C, L]
    missing = width - tokens
    padded = F.pad(scores, (0, 0, 0, missing)).flatten(0, 1)
    folded = layer_norm_linear.fold(gamma, beta, padded.to(to_q.dtype))
    columns = folded.columns.unflatten(0, (heads, width)).clone()
    columns[:, tokens:, 1] = NOWHERE
    wide = F.pad(values, (0, missing)).permute(1, 0, 2).flatten(1).to(to_out.dtype)
    return Prompt(folded.weight, columns.flatten(0, 1), wide.contiguous(), width)


def probabilities(x: Tensor, prompt: Prompt, eps: float, sums: RowSums | None = None) -> Tensor:
    """P [..., heads width], x's dtype; what follows is linear(P, prompt.values, b, residual=x).

    Args:
        x: [..., C] bfloat16 or float16, contiguous. sums: of x's rows, see `layer_norm_linear`.

    Numerics: scores, exponentials and their sum in float32 (ex2.approx: 2^-22), one rounding.
    """
    weights = prompt.scores, prompt.columns
    return linear_sm90a.softmaxed(x, *weights, prompt.width, eps, sums)


@dataclass(frozen=True)
class Fp8Prompt:
    """A folded prompt in e4m3, as `quantise` makes it: both of its layers, and `Prompt.width`.

    Probabilities are at most 1: their scale is P_SCALE, which needs no calibration.
    """

    scores: linear_fp8.Fp8Folded
    values: linear_fp8.Fp8Linear
    width: int


def quantise(prompt: Prompt, x_scale: float, bias: Tensor | None) -> Fp8Prompt:
    """A folded prompt in e4m3.

    Args:
        x_scale: of the rows before the layer_norm. bias: [C], of the projection out, or None.
    """
    folded = layer_norm_linear.FoldedLinear(prompt.scores, prompt.columns)
    scores = linear_fp8.fold(folded, x_scale)
    return Fp8Prompt(scores, linear_fp8.pack(prompt.values, P_SCALE, bias), prompt.width)


def probabilities_fp8(
    sums: RowSums, prompt: Fp8Prompt, eps: float = 1e-5, tile: linear_sm90a.Tile | None = None
) -> Tensor:
    """P / P_SCALE [..., heads width] in e4m3; what follows is linear_fp8(P, prompt.values, x).

    Args:
        sums: of x's rows, with their copy in e4m3 (`linear_fp8.linear_fp8_summed`).
    """
    scores = prompt.scores
    given = (linear_fp8.copy_of(sums), scores.weight, scores.columns, prompt.width, eps, sums, tile)
    return linear_sm90a.softmaxed(*given, scores.factor, P_SCALE)


@functools.cache
def proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel gives on this device what torch's do: as the registry proves its kernels
    at their first use. False is logged. The emulator is trusted, as there."""
    error = self_test(device, dtype) if device.type == "cuda" else 0.0
    right = error <= LARGEST_ERROR  # not of NaN
    if not right:
        log.warning(
            "prompt_attention is not used on %s: its self-test has an error of %g, at most %g is "
            "allowed", device, error, LARGEST_ERROR,
        )  # fmt: skip
    return right


@torch.no_grad()
def self_test(device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of the probabilities of a small prompt against torch's in float64."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x, to_q, to_out = draw(200, 64), 0.2 * draw(64, 64), draw(64, 64)
    prompt = fold(draw(64), draw(64), to_q, draw(77, 128), to_out, heads=2)
    truth = probabilities_torch(x.double(), prompt, 1e-5)
    return ((probabilities(x, prompt, 1e-5) - truth).norm() / truth.norm()).item()


def probabilities_torch(x: Tensor, prompt: Prompt, eps: float) -> Tensor:
    """The same by torch's kernels, for any device and floating dtype."""
    folded = layer_norm_linear.FoldedLinear(prompt.scores, prompt.columns)
    scores = layer_norm_linear.layer_norm_linear_torch(x, folded, None, eps)
    heads = scores.unflatten(-1, (-1, prompt.width))
    return torch.softmax(heads * math.log(2), -1).flatten(-2)
