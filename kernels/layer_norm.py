"""layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    x, y [..., K];  weight, bias [K];  var the biased variance

Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import checks
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.kernel import FLOATS, Kernel
from mirage_hello.kernels.registry import Op, define, register

MAX_TRITON_ROW = 16384  # a row stays in the registers of one block

# Contract


def check(values: Mapping[str, Any]) -> None:
    """One floating dtype; weight and bias as long as the last dimension of x."""
    x = values["x"]
    checks.one_floating_dtype("layer_norm", {n: values[n] for n in ("x", "weight", "bias")})
    if x.dim == 0:
        raise ValueError("layer_norm: x must be [..., K] (got a scalar); unsqueeze it")
    for name in ("weight", "bias"):
        advice = "give one value a feature"
        checks.shape("layer_norm", name, values[name], x.shape[-1:], "K", advice)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """Off-centre rows, with and without weights, of lengths that fill no block."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return [
        ((draw(2, 9, 320) + 3, draw(320), draw(320)), {}),
        ((draw(5, 77),), {"eps": 1e-6}),
    ]


define(Op("layer_norm", reference.layer_norm, check, samples))


# torch


def layer_norm_torch(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# Triton


def layer_norm_triton(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    from mirage_hello.kernels.triton.layer_norm import layer_norm

    return layer_norm(x, weight, bias, eps)


def supports_triton(call: Call) -> str | None:
    length = call.args["x"].shape[-1]
    if length > MAX_TRITON_ROW:
        return f"the last dimension must be at most {MAX_TRITON_ROW} (got {length})"
    return None


# Registrations

register(
    Kernel(
        "layer_norm",
        "torch",
        layer_norm_torch,
        devices=("cpu", "cuda"),
        dtypes=(*FLOATS, torch.float64),
        differentiable=True,
    )
)
register(
    Kernel(
        "layer_norm",
        "triton",
        layer_norm_triton,
        supports_triton,
        source="kernels/triton/layer_norm.py",
        arch="sm_80",
    )
)
