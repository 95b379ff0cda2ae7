"""group_norm: y = (x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c.  group_norm_silu: silu(y).

The mean and the (biased) variance run over the C / groups channels and all pixels of one image.
x is [B, C, *spatial], channels_last or contiguous; the result has its layout. Sums in float32.
With a skip [B, C', *spatial] it is cat([x, skip], 1), which in channels_last is never made.
group_norm_plan.py chooses between one pass over x (it stays on chip in between) and two.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import checks
from mirage_hello.kernels.call import Call, TensorSpec
from mirage_hello.kernels.group_norm_launch import cuda_program, launch, ptx_program
from mirage_hello.kernels.group_norm_plan import Shape, plan
from mirage_hello.kernels.kernel import FLOATS, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.ptx import loader
from mirage_hello.reference import normalization as reference

MAX_GRID_YZ = 65535
MAX_PIXELS = 2**31 - 2**20  # 32-bit pixel indices, with room for the last chunk


# Checks


def check(op: str, values: Mapping[str, Any]) -> None:
    """x, skip [B, C, *spatial]; C + C' a multiple of groups; weight, bias [C + C']; one dtype."""
    x, skip, groups, eps = (values[name] for name in ("x", "skip", "groups", "eps"))
    checks.one_floating_dtype(op, {n: values[n] for n in ("x", "weight", "bias", "skip")})
    if x.dim < 2:
        raise ValueError(f"{op}: x must be [B, C, *spatial] (got {tuple(x.shape)}); unsqueeze it")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{op}: groups must be an int (got {groups!r}); choose a divisor of C")
    channels = x.shape[1]
    if skip is not None:
        expected = (x.shape[0], *skip.shape[1:2], *x.shape[2:])
        checks.shape(op, "skip", skip, expected, "B, C', *spatial", "crop or pad it")
        channels += skip.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{op}: C must be a multiple of groups (got C={channels}, groups={groups}); "
            "pad C or choose another groups"
        )
    for name in ("weight", "bias"):
        checks.shape(op, name, values[name], (channels,), "C", "give one value a channel")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative (got {eps}); 1e-5 is usual")


def is_channels_last(x: TensorSpec | Tensor) -> bool:
    """Channels next to each other and pixels without gaps, whatever the number of dimensions."""
    channels = x.shape[1]
    strides: list[int] = []
    expected = channels
    for size in reversed(x.shape[2:]):
        strides.insert(0, expected)
        expected *= size
    want = (expected, 1, *strides)
    stride = x.stride() if isinstance(x, Tensor) else x.stride
    return all(s == w for size, s, w in zip(x.shape, stride, want, strict=True) if size != 1)


def supports(call: Call) -> str | None:
    """Why the hand-written kernels cannot take the call, or None."""
    x, skip = call.args["x"], call.args["skip"]
    if x.numel == 0 and (skip is None or skip.numel == 0):
        return None
    if not (is_channels_last(x) or x.is_contiguous):
        return f"needs x channels_last or contiguous (got strides {x.stride}); .contiguous()"
    if skip is not None and not (x.numel and skip.numel):
        return f"needs values in x and skip (got {tuple(x.shape)}, {tuple(skip.shape)})"
    if skip is not None and not (is_channels_last(x) and is_channels_last(skip)):
        return f"needs x and skip channels_last (got strides {x.stride}, {skip.stride})"
    for name in ("weight", "bias"):
        t = call.args[name]
        if t is not None and t.stride != (1,):
            return f"needs {name} contiguous (got strides {t.stride}); .contiguous()"
    if x.shape[0] > MAX_GRID_YZ or call.args["groups"] > MAX_GRID_YZ:
        return f"takes at most {MAX_GRID_YZ} images and groups (got {x.shape[0]} images)"
    pixels = math.prod(x.shape[2:])
    if pixels >= MAX_PIXELS:
        return f"takes at most {MAX_PIXELS} pixels an image (got {pixels})"
    aligned = all(t.aligned16 for t in call.tensors.values())
    access_bytes = 16 if aligned else x.dtype.itemsize
    shape = shape_of(x, call.args["groups"], access_bytes, clusters=False, skip=skip)
    if plan(shape, in_shared=False) is None:
        width = shape.group_channels
        return f"takes groups of at most 1024 vectors of channels (got {width} channels a group)"
    return None


def one_tensor(call: Call) -> str | None:
    """What the kernels that read one tensor say."""
    return None if call.args["skip"] is None else "takes no skip; concatenate, or choose ptx"


def shape_of(
    x: Any, groups: int, access_bytes: int, clusters: bool, sms: int = 132, skip: Any = None
) -> Shape:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return Shape(
        images=x.shape[0],
        channels=channels,
        pixels=math.prod(x.shape[2:]),
        groups=groups,
        size=x.dtype.itemsize,
        channels_last=is_channels_last(x),
        access_bytes=access_bytes,
        clusters=clusters,
        multiprocessors=sms,
        x_channels=0 if skip is None else x.shape[1],
    )


def access_bytes_of(*tensors: Tensor | None) -> int:
    """The widest access, up to 16 bytes, that every pointer allows."""
    low_bits = 16
    for t in tensors:
        if t is not None:
            low_bits |= t.data_ptr()
    return low_bits & -low_bits


# PTX and CUDA C++: the same plans and launches, since their entries have the same parameters


def planned(op: str, program_of: Callable[..., loader.Program]) -> Callable[..., Tensor]:
    """`op` by the kernels of program_of(op, shape, plan, dtype)."""

    def run(
        x: Tensor,
        groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        skip: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(x) if skip is None else empty_beside(x, skip)
        if out.numel() == 0:
            return out
        clusters, sms = device_limits(x.get_device())
        access_bytes = access_bytes_of(x, out, weight, bias, skip)
        shape = shape_of(x, groups, access_bytes, clusters, sms, skip)
        chosen = plan(shape, in_shared=program_of is ptx_program)
        assert chosen is not None, "supports() refuses shapes without a plan"
        sources = (x,) if skip is None else (x, skip)
        launch(program_of, op, shape, chosen, (*sources, weight, bias, out), eps)
        return out

    run.__name__ = op
    return run


def empty_beside(x: Tensor, skip: Tensor) -> Tensor:
    """Channels_last memory for cat([x, skip], 1)."""
    batch, channels, *spatial = x.shape
    memory = x.new_empty(batch, *spatial, channels + skip.shape[1])
    return memory.permute(0, x.dim() - 1, *range(1, x.dim() - 1))


_limits: dict[int, tuple[bool, int]] = {-1: (False, 132)}


def device_limits(device: int) -> tuple[bool, int]:
    """(has thread block clusters, multiprocessors); -1 is the CPU, where the emulator runs."""
    found = _limits.get(device)
    if found is None:
        properties = torch.cuda.get_device_properties(device)
        found = _limits[device] = (properties.major >= 9, properties.multi_processor_count)
    return found


# torch and triton


def group_norm_torch(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    skip: Tensor | None = None,
) -> Tensor:
    x = x if skip is None else torch.cat([x, skip], 1)
    if x.numel() == 0:
        return torch.empty_like(x)
    y = torch.group_norm(x, groups, weight, bias, eps)  # without F.group_norm's batch-size check
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def group_norm_silu_torch(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    skip: Tensor | None = None,
) -> Tensor:
    return torch.nn.functional.silu(group_norm_torch(x, groups, weight, bias, eps, skip))


def triton(op: str) -> Callable[..., Tensor]:
    def run(*args: Any, skip: None = None, **kwargs: Any) -> Tensor:
        module = importlib.import_module("mirage_hello.kernels.triton.group_norm")
        return getattr(module, op)(*args[:5], **kwargs)

    return run


# Contracts and registrations


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """Both layouts, groups of odd width, no weight, a mean far from 0."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    last = randn(2, 40, 9, 7).to(memory_format=torch.channels_last)
    return [
        ((last, 4, randn(40), randn(40)), {}),
        ((randn(2, 12, 8, 8), 4, randn(12), randn(12)), {}),
        ((randn(1, 6, 35) + 30, 3), {"eps": 1e-6}),
        ((last, 4, randn(48), randn(48)), {"skip": last[:, :8] * 2 - 1}),
    ]


TORCH_OF = {"group_norm": group_norm_torch, "group_norm_silu": group_norm_silu_torch}
for _op, _torch in TORCH_OF.items():

    def _check(values: Mapping[str, Any], op: str = _op) -> None:
        check(op, values)

    define(Op(_op, getattr(reference, _op), _check, samples))
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
    _file = "kernels/triton/group_norm.py"
    register(Kernel(_op, "triton", triton(_op), one_tensor, source=_file))
    for _backend, _program, _able, _file in (
        ("ptx", ptx_program, supports, "ptx/group_norm_nhwc.ptx.j2"),
        (
            "cuda",
            cuda_program,
            lambda call: one_tensor(call) or supports(call),
            "kernels/cuda/group_norm.cu",
        ),
    ):
        register(Kernel(_op, _backend, planned(_op, _program), _able, source=_file, arch="sm_80"))
