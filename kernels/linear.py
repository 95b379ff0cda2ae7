"""linear: out = x weight^T + bias + residual.
geglu: out = h gelu(gate), (h, gate) the halves of x weight^T + bias.

    linear:  x [..., K];  weight [N, K];   bias [N];   residual, out [..., N]
    geglu:   x [..., K];  weight [2N, K];  bias [2N];  out [..., N];  gelu(g) = g Phi(g), by erf

The residual of a transformer block fits the epilogue; the gate of GEGLU halves what its product
writes. Source of GEGLU: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import checks, linear_sm90a, product_sm80
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.kernel import FLOATS, UNTIMED_RANK, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.kernels.triton import refuses_product

# Offsets inside a tile of 256 rows are 32-bit: 256 * 2^23 = 2^31.
MAX_TRITON_DEPTH = 2**23 - 1


# Contracts


def check_linear(values: Mapping[str, Any]) -> None:
    """One floating dtype; x, weight, bias and residual that fit each other."""
    _check("linear", values)
    x, weight = values["x"], values["weight"]
    expected = (*x.shape[:-1], weight.shape[0])
    advice = "it is added to the result"
    checks.shape("linear", "residual", values["residual"], expected, "..., N", advice)


def check_geglu(values: Mapping[str, Any]) -> None:
    """As linear, with an even number of rows in the weight."""
    _check("geglu", values)
    rows = values["weight"].shape[0]
    if rows % 2:
        raise ValueError(
            f"geglu: weight must have an even number of rows, h and gate (got {rows}); "
            "stack the two projections"
        )


def _check(op: str, values: Mapping[str, Any]) -> None:
    x, weight, bias = values["x"], values["weight"], values["bias"]
    names = ("x", "weight", "bias", "residual")
    checks.one_floating_dtype(op, {name: values.get(name) for name in names})
    checks.dimensions(op, "weight", weight, "N, K")
    if x.dim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: the last dimension of x must be the weight's K (got x {tuple(x.shape)}, "
            f"weight {tuple(weight.shape)}); transpose the weight or choose another"
        )
    checks.shape(op, "bias", bias, weight.shape[:1], "N", "give one value a row of the weight")


def linear_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """With a residual, and with rows, columns and depth that fill no tile."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=device, dtype=dtype)

    return [
        ((draw(2, 33, 64), draw(48, 64, scale=0.125), draw(48), draw(2, 33, 48)), {}),
        ((draw(77, 320), draw(96, 320, scale=0.06)), {}),
        ((draw(3, 10), draw(7, 10, scale=0.3), draw(7)), {}),
    ]


def geglu_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """A multiple of the tiles, and sizes that fill none."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=device, dtype=dtype)

    return [
        ((draw(2, 64, 64), draw(128, 64, scale=0.125), draw(128)), {}),
        ((draw(33, 80), draw(54, 80, scale=0.1)), {}),
    ]


define(Op("linear", reference.linear, check_linear, linear_samples))
define(Op("geglu", reference.geglu, check_geglu, geglu_samples))


# torch


def linear_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """F.linear (cuBLAS), which has room for one addition: the bias. The residual follows."""
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def geglu_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    h, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return h * F.gelu(gate)


# Triton


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    from mirage_hello.kernels.triton.linear import linear

    return linear(x, weight, bias, residual)


def geglu_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from mirage_hello.kernels.triton.linear import geglu

    return geglu(x, weight, bias)


def supports_triton(call: Call) -> str | None:
    depth = max(call.args["weight"].shape[1], *call.args["weight"].stride)
    if depth > MAX_TRITON_DEPTH:
        return f"rows must be at most {MAX_TRITON_DEPTH} elements apart (got {depth})"
    return refuses_product(call)


# sm_80: kernels/product_sm80.py launches kernels/cuda/product.cu and ptx/product.sm80.ptx.j2
# PTX: kernels/linear_sm90a.py launches ptx/linear.sm90a.ptx.j2

# Registrations

for _op, _torch, _triton, _ptx, _with in (
    ("linear", linear_torch, linear_triton, linear_sm90a.linear_sm90a, product_sm80.linear_with),
    ("geglu", geglu_torch, geglu_triton, linear_sm90a.geglu_sm90a, product_sm80.geglu_with),
):
    register(
        Kernel(
            _op,
            "torch",
            _torch,
            devices=("cpu", "cuda"),
            dtypes=(*FLOATS, torch.float64),
            differentiable=True,
        )
    )
    register(
        Kernel(
            _op,
            "triton",
            _triton,
            supports_triton,
            source="kernels/triton/linear.py",
            arch="sm_80",
        )
    )
    register(
        Kernel(
            _op,
            "ptx",
            _ptx,
            linear_sm90a.supports,
            source="ptx/linear.sm90a.ptx.j2",
            arch="sm_90a",
            dtypes=(torch.bfloat16, torch.float16),
        )
    )
    for _backend, _source, _path in (
        ("cuda", product_sm80.cuda_source, "kernels/cuda/product.cu"),
        ("ptx", product_sm80.ptx_source, "ptx/product.sm80.ptx.j2"),
    ):
        register(
            Kernel(
                _op,
                _backend,
                _with(_source),
                product_sm80.supports_linear,
                source=_path,
                arch="sm_80",
                dtypes=(torch.bfloat16, torch.float16),
                rank=UNTIMED_RANK,
            )
        )
