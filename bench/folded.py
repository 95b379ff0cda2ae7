"""layer_norm and the linear layer behind it, as a transformer block chains them.

layer_norm_linear     linear(layer_norm(x))    e.g. q, k and v from one weight [3 K, K]
layer_norm_geglu      geglu(layer_norm(x))     weight [8 K, K]
residual_norm_linear  the same of x = linear(y) + residual, e.g. the query of a cross-attention
residual_norm_geglu   behind the output projection of the self-attention

Two ways of ours (`kernel`): `separate`, layer_norm and linear or geglu, each as `auto` chooses, and
`folded` (kernels/layer_norm_linear.py), which multiplies x by a weight that holds the norm's. Mean
and deviation of x come from a small kernel, or from what the linear before left. The folded weight
is an argument, made once as in a model. FLOPs: of the products. Elements: x (or y and the
residual), weights, biases, the norm's and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import Kernel, Op, layer_norm_linear, linear_sm90a, ops
from mirage_hello.kernels.layer_norm_linear import FoldedLinear

from .case import Case, Draw
from .composed import COMPILED, Function, Way

EPS = 1e-5


def normed_by(name: str, layer_norm: Function, product: Function) -> Function:
    """product(layer_norm(x)); the folded weight and its columns are for who can use them."""

    def normed(
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        bias: Tensor,
        folded: Tensor,
        columns: Tensor,
    ) -> Tensor:
        return product(layer_norm(x, gamma, beta, EPS), weight, bias)

    normed.__name__ = name
    return normed


def folded_by(run: Callable[..., Tensor]) -> Function:
    def normed(x, gamma, beta, weight, bias, folded, columns) -> Tensor:
        return run(x, FoldedLinear(folded, columns), eps=EPS)

    return normed


def behind_by(name: str, linear: Function, layer_norm: Function, product: Function) -> Function:
    """product(layer_norm(linear(y) + residual))."""
    normed = normed_by(name, layer_norm, product)

    def behind(
        y: Tensor,
        residual: Tensor,
        first: Tensor,
        first_bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        bias: Tensor,
        folded: Tensor,
        columns: Tensor,
    ) -> Tensor:
        x = linear(y, first, first_bias, residual)
        return normed(x, gamma, beta, weight, bias, folded, columns)

    behind.__name__ = name
    return behind


def summed_by(run: Callable[..., Tensor]) -> Function:
    def behind(y, residual, first, first_bias, gamma, beta, weight, bias, folded, columns):
        x, sums = linear_sm90a.linear_summed(y, first, first_bias, residual)
        return run(x, FoldedLinear(folded, columns), eps=EPS, sums=sums)

    return behind


def check(values: Mapping[str, Any]) -> None:
    """The cases below are all that there is."""


def op_of(name: str, product: str, run: Callable[..., Tensor]) -> Op:
    ours, torchs = getattr(ops, product), getattr(ops, product).torch_kernel.run
    truth = normed_by(name, reference.layer_norm, getattr(reference, product))
    op = Op(name, truth, check, lambda device, dtype: [])
    op.torch_kernel = Kernel(
        name, "torch", normed_by(name, ops.layer_norm.torch_kernel.run, torchs)
    )
    op.kernels = [
        Way(name, "auto", normed_by(name, ops.layer_norm, ours), label="separate"),
        Way(name, "auto", folded_by(run), arch="sm_90a", label="folded"),
    ]
    return op


def op_behind(name: str, product: str, run: Callable[..., Tensor]) -> Op:
    linear, norm, last = ops.linear, ops.layer_norm, getattr(ops, product)
    truth = behind_by(name, reference.linear, reference.layer_norm, getattr(reference, product))
    op = Op(name, truth, check, lambda device, dtype: [])
    torchs = (kernel.torch_kernel.run for kernel in (linear, norm, last))
    op.torch_kernel = Kernel(name, "torch", behind_by(name, *torchs))
    op.kernels = [
        Way(name, "auto", behind_by(name, linear, norm, last), label="separate"),
        Way(name, "auto", summed_by(run), arch="sm_90a", label="folded"),
    ]
    return op


OPS = {
    "residual_norm_linear": op_behind(
        "residual_norm_linear", "linear", layer_norm_linear.layer_norm_linear
    ),
    "residual_norm_geglu": op_behind(
        "residual_norm_geglu", "geglu", layer_norm_linear.layer_norm_geglu
    ),
    "layer_norm_linear": op_of("layer_norm_linear", "linear", layer_norm_linear.layer_norm_linear),
    "layer_norm_geglu": op_of("layer_norm_geglu", "geglu", layer_norm_linear.layer_norm_geglu),
}


def case(
    op: str, tokens: int, width: int, out: int, quick: bool = False, peers: tuple = COMPILED
) -> Case:
    """x [M, K], weight [N, K]; of geglu N is twice the width of the result."""

    def make(draw: Draw) -> tuple:
        x, gamma, beta = draw.normal(tokens, width), draw.normal(width), draw.normal(width)
        weight, bias = draw.normal(out, width, scale=width**-0.5), draw.normal(out)
        folded = layer_norm_linear.fold(gamma, beta, weight, bias)
        normed = gamma, beta, weight, bias, folded.weight, folded.columns
        if not behind:
            return x, *normed
        first = draw.normal(width, width, scale=width**-0.5), draw.normal(width)
        return x, draw.normal(tokens, width), *first, *normed

    behind = op.startswith("residual")
    written = out // 2 if op.endswith("geglu") else out
    products = width * (out + (width if behind else 0))
    vectors = out + (3 if behind else 2) * width  # biases, gamma and beta
    return Case(
        op=op,
        name=f"{tokens}x{width}x{out}",
        make=make,
        flops=2 * tokens * products,
        elements=tokens * (width * (2 if behind else 1) + written) + products + vectors,
        peers=peers,
        weights=tuple(range(2, 10)) if behind else (1, 2, 3, 4, 5, 6),
        quick=quick,
    )  # fmt: skip


CASES = tuple(
    case(op, tokens, width, times * width, quick=width == 640)
    for op, times in (
        ("layer_norm_linear", 3),
        ("layer_norm_geglu", 8),
        ("residual_norm_linear", 1),
        ("residual_norm_geglu", 8),
    )
    for tokens, width in ((4096, 320), (1024, 640), (256, 1280))
)
SMALL = (
    case("layer_norm_linear", 64, 64, 192, quick=True, peers=("torch-eager",)),
    case("layer_norm_geglu", 64, 64, 512, peers=("torch-eager",)),
    case("residual_norm_linear", 64, 64, 64, peers=("torch-eager",)),
    case("residual_norm_geglu", 64, 64, 512, peers=("torch-eager",)),
)
