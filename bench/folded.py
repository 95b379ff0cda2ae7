"""layer_norm and the linear layer behind it, as a transformer block chains them.

layer_norm_linear   linear(layer_norm(x))    e.g. q, k and v from one weight [3 K, K]
layer_norm_geglu    geglu(layer_norm(x))     weight [8 K, K]

Two ways of ours (`kernel`): `separate`, layer_norm and linear or geglu, each as `auto` chooses, and
`folded` (kernels/layer_norm_linear.py), which multiplies x by a weight that holds the norm's and
takes mean and deviation from the tiles of x on their way. The folded weight is an argument, made
once as in a model. FLOPs: 2 M K N. Elements: x, weight, bias, the norm's and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import Kernel, Op, layer_norm_linear, ops
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


def op_of(name: str, product: str, run: Callable[..., Tensor]) -> Op:
    def check(values: Mapping[str, Any]) -> None:
        pass  # the cases below are all that there is

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


OPS = {
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
        return x, gamma, beta, weight, bias, folded.weight, folded.columns

    written = out // 2 if op == "layer_norm_geglu" else out
    return Case(
        op=op,
        name=f"{tokens}x{width}x{out}",
        make=make,
        flops=2 * tokens * width * out,
        elements=tokens * width + out * width + out + 2 * width + tokens * written,
        peers=peers,
        weights=(1, 2, 3, 4, 5, 6),
        quick=quick,
    )


CASES = tuple(
    case(op, tokens, width, times * width, quick=width == 640)
    for op, times in (("layer_norm_linear", 3), ("layer_norm_geglu", 8))
    for tokens, width in ((4096, 320), (1024, 640), (256, 1280))
)
SMALL = (
    case("layer_norm_linear", 64, 64, 192, quick=True, peers=("torch-eager",)),
    case("layer_norm_geglu", 64, 64, 512, peers=("torch-eager",)),
)
