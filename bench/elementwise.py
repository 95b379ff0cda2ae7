"""The elementwise family at sizes from 1 KiB to 1 GiB (the size of each tensor in the dtype used).

silu moves x and the output; the others x, y and the output; the frame conversions a uint8 frame
(1 byte a value) and a picture in the dtype. FLOPs are counted (axpby 3, silu 5 a value) but the
copy rate is always the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .case import Case, Draw

KIB = 1024
MIB = 1024 * KIB
# The whole range for the two families; PyTorch must not win at any of them.
SIZES = (KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
LARGE = (64 * MIB, 256 * MIB, 1024 * MIB)
ALL_DTYPES = ("float32", "float16", "bfloat16")


def size_name(size_bytes: int) -> str:
    """1024 -> "1 KiB", 67108864 -> "64 MiB"."""
    unit, text = (MIB, "MiB") if size_bytes >= MIB else (KIB, "KiB")
    return f"{size_bytes // unit} {text}"


def values(draw: Draw, size_bytes: int) -> torch.Tensor:
    """A batch of one whose storage is `size_bytes` in the dtype drawn."""
    return draw.normal(1, size_bytes // draw.dtype.itemsize)


# op -> (arguments of size_bytes, tensors moved, FLOPs a value)
FAMILY: dict[str, tuple[Callable[[Draw, int], tuple], int, int]] = {
    "silu": (lambda d, n: (values(d, n),), 2, 5),
    "axpby": (lambda d, n: (0.7, values(d, n), -1.3, values(d, n)), 3, 3),
    "residual_add": (lambda d, n: (values(d, n), values(d, n)), 3, 1),
    "add_noise": (lambda d, n: (values(d, n), values(d, n), 0.8, 0.6), 3, 3),
    "euler_step": (lambda d, n: (values(d, n), values(d, n), 4.0, 2.5), 3, 4),
    "ddim_step": (lambda d, n: (values(d, n), values(d, n), 0.3, 0.6), 3, 4),
    "guidance": (lambda d, n: (values(d, n), values(d, n), 7.5), 3, 3),
}


class SizedCase(Case):
    """A case whose size is fixed in bytes, so its number of values follows the dtype.

    `flops` holds the FLOPs a byte of one tensor times its bytes, that is those of a 1-byte dtype.
    """

    def flops_in(self, dtype: torch.dtype) -> int:
        """FLOPs a value * size_bytes / itemsize."""
        return self.flops // dtype.itemsize

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """tensors * size_bytes, the same in every dtype."""
        return self.fixed_bytes


def case(
    op: str,
    size_bytes: int,
    dtypes: tuple[str, ...] = ("float32",),
    peers: tuple[str, ...] = ("torch-eager", "copy"),
    quick: bool = False,
) -> Case:
    """`op` on tensors of `size_bytes` each."""
    make, tensors, flops_per_value = FAMILY[op]
    return SizedCase(
        op=op,
        name=size_name(size_bytes),
        make=lambda draw: make(draw, size_bytes),
        flops=flops_per_value * size_bytes,
        elements=0,
        fixed_bytes=tensors * size_bytes,
        dtypes=dtypes,
        peers=peers,
        quick=quick,
    )


def frame_case(op: str, height: int, width: int, peers: tuple[str, ...], quick=False) -> Case:
    """One picture between uint8 [1, H, W, 3] and [1, 3, H, W] channels last."""
    count = 3 * height * width
    make: Callable[[Draw], tuple]
    if op == "frame_to_model":

        def make(draw: Draw) -> tuple:
            return draw.frames(1, height, width, 3), draw.dtype
    else:

        def make(draw: Draw) -> tuple:
            return (draw.image(1, 3, height, width, scale=0.5),)

    return Case(
        op=op,
        name=f"{height}x{width}",
        make=make,
        flops=2 * count,
        elements=count,
        fixed_bytes=count,
        dtypes=("float32", "bfloat16"),
        peers=peers,
        quick=quick,
        layout="nhwc",
    )


COMPILED = ("torch-eager", "torch-compile", "copy")
CASES = (
    *(case("silu", size, ("float32", "bfloat16")) for size in SIZES),
    *(case("silu", size, ALL_DTYPES, COMPILED, quick=size == LARGE[0]) for size in LARGE),
    *(case("axpby", size, ("float32", "bfloat16")) for size in SIZES),
    *(case("axpby", size, ALL_DTYPES, COMPILED, quick=size == LARGE[0]) for size in LARGE),
    *(
        case(op, size, ("float32", "bfloat16"), COMPILED)
        for op in ("residual_add", "add_noise", "euler_step", "ddim_step", "guidance")
        for size in (64 * KIB, 64 * MIB)  # a latent of the model in float32; past the L2
    ),
    frame_case("frame_to_model", 512, 512, COMPILED, quick=True),
    frame_case("model_to_frame", 512, 512, COMPILED, quick=True),
)
SMALL = (
    case("silu", 64 * KIB, quick=True),
    case("silu", MIB),
    case("axpby", 64 * KIB, quick=True),
    case("axpby", MIB),
    *(
        case(op, 64 * KIB)
        for op in ("residual_add", "add_noise", "euler_step", "ddim_step", "guidance")
    ),
    frame_case("frame_to_model", 64, 64, ("torch-eager", "copy"), quick=True),
    frame_case("model_to_frame", 64, 64, ("torch-eager", "copy"), quick=True),
)
