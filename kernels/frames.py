"""frame_to_model: x / 127.5 - 1.  model_to_frame: clamp(round_half_even((x + 1) * 127.5), 0, 255).

uint8 [B, H, W, 3] and channels_last [B, 3, H, W] are the same order in memory, so both conversions
are flat; a contiguous [B, 3, H, W] takes a kernel of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import checks
from mirage_hello.kernels.call import Call
from mirage_hello.kernels.elementwise import (
    CUDA_TYPE,
    MAX_GRID_Y,
    OTHER_BACKENDS,
    SUFFIX,
    imported,
    overlaps,
)
from mirage_hello.kernels.kernel import FLOATS, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.ptx import loader
from mirage_hello.reference import frames as reference

THREADS = 256
CHANNELS = 3


# Checks


def check_frame_to_model(values: Mapping[str, Any]) -> None:
    frames, dtype = values["frames"], values["dtype"]
    if frames.dtype != torch.uint8:
        raise TypeError(
            f"frame_to_model: frames must be uint8 (got {frames.dtype}); convert with .to"
        )
    if frames.dim != 4 or frames.shape[3] != CHANNELS:
        raise ValueError(
            f"frame_to_model: frames must be [B, H, W, 3] (got {tuple(frames.shape)}); "
            "permute or expand them"
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"frame_to_model: dtype must be a floating torch dtype (got {dtype})")


def check_model_to_frame(values: Mapping[str, Any]) -> None:
    x = values["x"]
    checks.one_floating_dtype("model_to_frame", {"x": x})
    if x.dim != 4 or x.shape[1] != CHANNELS:
        raise ValueError(
            f"model_to_frame: x must be [B, 3, H, W] (got {tuple(x.shape)}); permute or expand it"
        )


def supports_contiguous_frames(call: Call) -> str | None:
    frames = call.args["frames"]
    if not frames.is_contiguous:
        return f"needs contiguous frames (got strides {frames.stride}); .contiguous()"
    return None


def supports_layout(call: Call) -> str | None:
    x = call.args["x"]
    if not (x.is_channels_last or x.is_contiguous):
        return f"needs x channels_last or contiguous (got strides {x.stride}); .contiguous()"
    return None


# PTX and CUDA C++


def frame_to_model_with(program: Callable[[Tensor], loader.Program]) -> Callable[..., Tensor]:
    def frame_to_model(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        out = torch.empty(frames.shape, dtype=dtype, device=frames.device)
        if out.numel():
            launch_flat(program(out), f"frame_to_model_{SUFFIX[dtype]}", frames, out, out)
        return out.permute(0, 3, 1, 2)

    return frame_to_model


def model_to_frame_with(program: Callable[[Tensor], loader.Program]) -> Callable[..., Tensor]:
    def model_to_frame(x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        out = torch.empty(images, height, width, CHANNELS, dtype=torch.uint8, device=x.device)
        if x.numel() == 0:
            return out
        if x.permute(0, 2, 3, 1).is_contiguous():
            launch_flat(program(x), f"model_to_frame_{SUFFIX[x.dtype]}", x, out, x)
        else:
            pixels = height * width
            grid = (-(-pixels // THREADS), min(images, MAX_GRID_Y), 1)
            entry, args = f"model_to_frame_planar_{SUFFIX[x.dtype]}", (x, out, pixels, images)
            program(x).launch(entry, grid, (THREADS, 1, 1), args)
        return out

    return model_to_frame


def launch_flat(
    program: loader.Program, entry: str, source: Tensor, out: Tensor, model: Tensor
) -> None:
    """One 16-byte vector of the model's side a thread."""
    vectors = -(-model.numel() * model.element_size() // 16)
    grid = (-(-vectors // THREADS), 1, 1)
    program.launch(entry, grid, (THREADS, 1, 1), (source, out, model.numel()))


def ptx_program(model: Tensor) -> loader.Program:
    overlap = overlaps(model.get_device())
    return loader.program("frame", dtype=SUFFIX[model.dtype], THREADS=THREADS, OVERLAP=overlap)


def cuda_program(model: Tensor) -> loader.Program:
    defines = {
        "ELEMENT": CUDA_TYPE[model.dtype],
        "SUFFIX": SUFFIX[model.dtype],
        "THREADS": str(THREADS),
        "VECS": "1",
    }
    return loader.cuda_program("elementwise", defines=defines)


# Contracts


def frame_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    if not dtype.is_floating_point:  # asked by the frames' own dtype
        dtype = torch.float32
    shapes = [(2, 5, 7, CHANNELS), (1, 16, 16, CHANNELS)]
    frames = [torch.randint(0, 256, s, dtype=torch.uint8, device=device) for s in shapes]
    return [((f, dtype), {}) for f in frames]


def model_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    x = torch.randn(2, CHANNELS, 16, 17, device=device, dtype=dtype)
    return [((x,), {}), ((x.to(memory_format=torch.channels_last),), {})]


define(Op("frame_to_model", reference.frame_to_model, check_frame_to_model, frame_samples))
define(Op("model_to_frame", reference.model_to_frame, check_model_to_frame, model_samples))


# Registrations

for _name, _with, _supports in (
    ("frame_to_model", frame_to_model_with, supports_contiguous_frames),
    ("model_to_frame", model_to_frame_with, supports_layout),
):
    register(
        Kernel(
            _name,
            "torch",
            getattr(reference, _name),
            source="reference/frames.py",
            devices=("cpu", "cuda"),
            dtypes=(*FLOATS, torch.float64),
            differentiable=_name == "frame_to_model",
        )
    )
    for _backend, _program, _source in (
        ("ptx", ptx_program, "ptx/frame.ptx.j2"),
        ("cuda", cuda_program, "kernels/cuda/elementwise.cu"),
    ):
        register(
            Kernel(
                _name, _backend, _with(_program), supports=_supports, source=_source, arch="sm_80"
            )
        )
    for _backend, _devices in OTHER_BACKENDS.items():
        register(
            Kernel(
                _name,
                _backend,
                imported(_backend, _name),
                source=f"kernels/{_backend}/elementwise.py",
                devices=_devices,
            )
        )
