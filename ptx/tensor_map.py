"""Tensor maps: how the TMA unit sees a tensor (PTX ISA, "Tensors"; cuda.h, cuTensorMapEncode*).

A TensorMap describes; `encode` gives the 128 bytes that a kernel receives. The emulator reads the
description itself.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_DTYPES = {
    torch.uint8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTION_128B = 2


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A box-wise view of a tensor; dims, box and element_strides innermost first, in elements.

    Args:
        kind: "tiled" or "im2col".
        tensor: keeps the memory alive.
        dims: sizes.
        strides: bytes, of dims[1:]; multiples of 16.
        box: tiled: elements per dimension that one instruction moves.
        element_strides: every n-th element along each dimension.
        swizzle: 0, 32, 64 or 128 bytes.
        dtype: element type.
        lower, upper: im2col: corners of the pixel box, (W, H).
        channels, pixels: im2col: channels per pixel and pixels per column.
    """

    kind: str
    tensor: Tensor
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: int
    dtype: torch.dtype
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    channels: int = 0
    pixels: int = 0

    def encode(self) -> bytes:
        """The 128 bytes of a CUtensorMap. RuntimeError when the driver refuses them."""
        return _encode(
            self.kind, self.tensor.data_ptr(), self.dims, self.strides, self.box,
            self.element_strides, self.swizzle, self.dtype, self.lower, self.upper,
            self.channels, self.pixels,
        )  # fmt: skip


def tensor_map(
    tensor: Tensor,
    box: tuple[int, ...],
    swizzle: int = 128,
    element_strides: tuple[int, ...] | None = None,
    dims: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> TensorMap:
    """A tiled map. dims and strides (bytes, of dims[1:]) default to the tensor's own.

    Raises:
        ValueError: what the TMA unit cannot address (alignment, box sizes, swizzle span).
    """
    dims = tuple(reversed(tensor.shape)) if dims is None else dims
    if strides is None:
        own = reversed(tensor.stride()[:-1])
        strides = tuple(s * tensor.element_size() for s in own)
    element_strides = (1,) * len(dims) if element_strides is None else element_strides
    made = TensorMap(
        "tiled", tensor, dims, strides, tuple(box), element_strides, swizzle, tensor.dtype
    )
    _check(made)
    inner_bytes = box[0] * tensor.element_size()
    if inner_bytes % 16 or (swizzle and inner_bytes > swizzle):
        raise ValueError(
            f"tensor_map: the innermost box must be a multiple of 16 bytes and at most the "
            f"swizzle span (got {inner_bytes} bytes, swizzle {swizzle}); choose another box"
        )
    if len(box) != len(dims) or not all(1 <= b <= 256 for b in box):
        raise ValueError(f"tensor_map: box must have {len(dims)} sizes in 1..256 (got {box})")
    return made


def im2col_map(
    tensor: Tensor,
    lower: tuple[int, int],
    upper: tuple[int, int],
    channels: int,
    pixels: int,
    swizzle: int = 128,
    element_strides: tuple[int, ...] | None = None,
) -> TensorMap:
    """An im2col map of a channels_last tensor [B, C, H, W]; lower and upper are (W, H) corners.

    A 3x3 convolution with padding 1 and stride 1 has lower = upper = (-1, -1).

    Raises:
        ValueError: not channels_last, or what the TMA unit cannot address.
    """
    b, c, h, w = tensor.shape
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"im2col_map: needs a channels_last tensor (got stride {tensor.stride()})")
    size = tensor.element_size()
    made = TensorMap(
        "im2col", tensor, (c, w, h, b), (c * size, w * c * size, h * w * c * size), (),
        element_strides or (1,) * 4, swizzle, tensor.dtype, lower, upper, channels, pixels,
    )  # fmt: skip
    _check(made)
    if not (1 <= channels <= 256 and 1 <= pixels <= 1024):
        raise ValueError(
            f"im2col_map: channels must be in 1..256 and pixels in 1..1024 "
            f"(got {channels} and {pixels})"
        )
    return made


def _check(made: TensorMap) -> None:
    if made.dtype not in _DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ValueError(f"tensor_map: dtype must be one of {known} (got {made.dtype})")
    if made.swizzle not in _SWIZZLES:
        raise ValueError(f"tensor_map: swizzle must be 0, 32, 64 or 128 (got {made.swizzle})")
    if made.tensor.data_ptr() % 16:
        raise ValueError("tensor_map: the tensor must start on a 16-byte boundary; clone it")
    if len(made.strides) != len(made.dims) - 1 or any(s % 16 for s in made.strides):
        raise ValueError(
            f"tensor_map: needs {len(made.dims) - 1} strides, multiples of 16 bytes "
            f"(got {made.strides}); pad the innermost dimension"
        )


@functools.lru_cache(maxsize=4096)
def _encode(
    kind: str,
    pointer: int,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    element_strides: tuple[int, ...],
    swizzle: int,
    dtype: torch.dtype,
    lower: tuple[int, ...],
    upper: tuple[int, ...],
    channels: int,
    pixels: int,
) -> bytes:
    # ctypes rather than cuda-bindings: the driver writes the map to an address that must be a
    # multiple of 128 (64 before CUDA 13), and only here is the alignment ours to choose.
    rank = len(dims)
    raw = ctypes.create_string_buffer(128 + 128)
    offset = -ctypes.addressof(raw) % 128
    u64s, u32s, ints = (
        ctypes.c_uint64 * rank,
        ctypes.c_uint32 * rank,
        ctypes.c_int * max(rank - 2, 0),
    )
    head = (
        ctypes.c_void_p(ctypes.addressof(raw) + offset), ctypes.c_int(_DTYPES[dtype]),
        ctypes.c_uint32(rank), ctypes.c_void_p(pointer), u64s(*dims), u64s(*strides, 0),
    )  # fmt: skip
    tail = (
        u32s(*element_strides), ctypes.c_int(0), ctypes.c_int(_SWIZZLES[swizzle]),
        ctypes.c_int(_L2_PROMOTION_128B), ctypes.c_int(0),  # out of bounds reads give zeros
    )  # fmt: skip
    driver = ctypes.CDLL("libcuda.so.1")
    if kind == "tiled":
        code = driver.cuTensorMapEncodeTiled(*head, u32s(*box), *tail)
    else:
        corners = (ints(*lower), ints(*upper), ctypes.c_uint32(channels), ctypes.c_uint32(pixels))
        code = driver.cuTensorMapEncodeIm2col(*head, *corners, *tail)
    if code:
        raise RuntimeError(
            f"tensor_map: the driver refused the {kind} map with CUresult {code} "
            f"(dims {dims}, strides {strides}, box {box}, swizzle {swizzle})"
        )
    return raw.raw[offset : offset + 128]
