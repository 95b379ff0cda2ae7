"""layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    x, y [..., K];  weight, bias [K];  var the biased variance

Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
"""

import struct
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import checks
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.elementwise import SUFFIX, overlaps
from mirage_hello.kernels.kernel import FLOATS, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.ptx import loader

MAX_TRITON_ROW = 16384  # a row stays in the registers of one block
MAX_PTX_ROW = 8192  # the same: 8 warps, 8 accesses of 16 bytes a thread in float32

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


# PTX


def layer_norm_ptx(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cut: tuple[int, int] | None = None,
) -> Tensor:
    """`cut`: warps of a row and rows of a block, instead of the choice."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    width = x.shape[-1]
    rows = x.numel() // width
    warps, teams = cut = cut or choose_cut(rows, width * x.element_size())
    program = ptx_program(width, x.dtype, cut, overlaps(x.get_device()))
    grid, block = (-(-rows // teams), 1, 1), (32 * warps * teams, 1, 1)
    args = (x, weight, bias, out, rows, eps)
    program.launch(f"layer_norm_{SUFFIX[x.dtype]}", grid, block, args)
    return out


def ptx_program(
    width: int, dtype: torch.dtype, cut: tuple[int, int], overlap: bool
) -> loader.Program:
    return loader.program(
        "layer_norm",
        dtype=SUFFIX[dtype],
        WIDTH=width,
        INVERSE=float_bits(1 / width),
        WARPS=cut[0],
        TEAMS=cut[1],
        OVERLAP=overlap,
    )


def choose_cut(rows: int, row_bytes: int) -> tuple[int, int]:
    """Warps of a row, at most 8 accesses of 16 bytes a thread in each; rows of a block."""
    warps = next((w for w in (1, 2, 4) if row_bytes <= 32 * w * 8 * 16), 8)
    return warps, 4 if warps == 1 else 1


def float_bits(value: float) -> str:
    """A float32 constant of PTX."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def supports_ptx(call: Call) -> str | None:
    x = call.args["x"]
    if x.numel == 0:
        return None
    width, elements = x.shape[-1], 16 // x.dtype.itemsize
    if width % elements or width > MAX_PTX_ROW:
        return (
            f"the last dimension must be a multiple of {elements}, at most {MAX_PTX_ROW} "
            f"(got {width})"
        )
    for name, t in call.tensors.items():
        if not (t.is_contiguous and t.aligned16):
            return f"needs {name} contiguous and 16-byte aligned (got strides {t.stride})"
    return None


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
        "ptx",
        layer_norm_ptx,
        supports_ptx,
        source="ptx/layer_norm.ptx.j2",
        arch="sm_80",
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
