"""conv2d, linear and geglu for sm_80 and newer: kernels/cuda/product.cu, ptx/product.sm80.ptx.j2.

Both compute the same, step by step, and take the same arguments. A linear layer is a 1x1
convolution of one image, a row of M pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import conv2d_sm90a, linear_sm90a, tuning
from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader
from mirage_hello.reference import Padding, sides

ELEMENTS = {torch.float16: ("__half", "f16"), torch.bfloat16: ("__nv_bfloat16", "bf16")}
BLOCK_M = 128
CPU_MULTIPROCESSORS = 108  # what the emulator stands for: an A100's


@dataclass(frozen=True)
class Tile:
    """128 pixels by block_n rows of the weight; 64 or 128."""

    block_n: int


TILES = (Tile(64), Tile(128))
# Clocks of a multiprocessor on an H200, from bench/sweeps/product_sm80.py, by block_n: start and
# end of a block; 16 of its K; 16 of K of the first block, which nothing hides.
BLOCK, STEP, FIRST = {64: 3500, 128: 9900}, {64: 150, 128: 285}, {64: 140, 128: 140}

# (dtype, gated, tile) -> the program and its entry
Source = Callable[[torch.dtype, bool, Tile], tuple[loader.Program, str]]


def cuda_source(
    dtype: torch.dtype, gated: bool, tile: Tile, switches: Mapping[str, int] | None = None
) -> tuple[loader.Program, str]:
    """`switches` take steps of the ladder back: {"SWIZZLE": 0, "ASYNC": 0, "RING": 2}."""
    element, mma = ELEMENTS[dtype]
    numbers = {"GATED": int(gated), "BLOCK_N": tile.block_n, **(switches or {})}
    defines = {"ELEMENT": element, "MMA": mma} | {k: str(v) for k, v in numbers.items()}
    return loader.cuda_program("product", defines), "product"


def ptx_source(dtype: torch.dtype, gated: bool, tile: Tile) -> tuple[loader.Program, str]:
    short = ELEMENTS[dtype][1]
    program = loader.program("product.sm80", dtype=short, GATED=gated, BLOCK_N=tile.block_n)
    return program, f"product_{short}"


def choose_tile(pixels: int, rows: int, depth: int, multiprocessors: int) -> Tile:
    """The wide tile reads less of the shared memory; the narrow one makes twice the blocks, of
    which three share a multiprocessor, and stores sooner. The wide one pays for deep products of
    many tiles: 512 channels at 128 x 128, 207 us against 240."""

    def cost(tile: Tile) -> float:
        blocks = -(-pixels // BLOCK_M) * -(-rows // tile.block_n)
        turns, steps, n = -(-blocks // multiprocessors), -(-depth // 16), tile.block_n
        return turns * (BLOCK[n] + steps * STEP[n]) + steps * FIRST[n]

    key = {"pixels": pixels, "rows": rows, "depth": depth}
    return tuning.tile_for("product_sm80", key, lambda: TILES, cost)


def conv2d_with(source: Source) -> Callable[..., Tensor]:
    """ops.conv2d, without skip and upsample; `tile` overrides the choice."""

    def conv2d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int = 1,
        padding: Padding = 0,
        channel_bias: Tensor | None = None,
        residual: Tensor | None = None,
        skip: Tensor | None = None,
        upsample: bool = False,
        tile: Tile | None = None,
    ) -> Tensor:
        (batch, channels, height, width), (outputs, _, r, s) = x.shape, weight.shape
        before, after = sides(padding)
        p, q = ((n + before + after - t) // stride + 1 for n, t in ((height, r), (width, s)))
        layout = torch.channels_last
        size = (batch, outputs, p, q)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
        tensors = (x, weight, bias, channel_bias, residual, out)
        sizes = (channels, height, width, outputs, p, q, s, r * s, stride, before, batch * p * q)
        return _launch(source, tensors, sizes, False, tile)

    return conv2d


def linear_with(source: Source) -> Callable[..., Tensor]:
    """ops.linear; `tile` overrides the choice."""

    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        n, k = weight.shape
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
        tensors = (x, weight, bias, None, residual, out)
        return _launch(source, tensors, _as_convolution(x, n, k), False, tile)

    return linear


def geglu_with(source: Source) -> Callable[..., Tensor]:
    """ops.geglu; `tile` overrides the choice."""

    def geglu(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None
    ) -> Tensor:
        n, k = weight.shape[0] // 2, weight.shape[1]
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
        tensors = (x, weight, bias, None, None, out)
        return _launch(source, tensors, _as_convolution(x, n, k), True, tile)

    return geglu


def _as_convolution(x: Tensor, n: int, k: int) -> tuple[int, ...]:
    rows = x.shape[:-1].numel()
    return (k, 1, rows, n, 1, rows, 1, 1, 1, 0, rows)


def _launch(
    source: Source, tensors: tuple, sizes: tuple[int, ...], gated: bool, tile: Tile | None
) -> Tensor:
    """`tensors` ends with the output; `sizes` are the kernel's, from C to the pixels."""
    out, outputs, pixels, depth = tensors[-1], sizes[3], sizes[-1], sizes[0] * sizes[7]
    rows = outputs * (2 if gated else 1)
    tile = tile or choose_tile(pixels, rows, depth, _multiprocessors(out))
    if out.numel():
        program, entry = source(out.dtype, gated, tile)
        program.launch(
            entry,
            grid=(-(-pixels // BLOCK_M), -(-rows // tile.block_n), 1),
            block=(128, 1, 1),
            args=(*tensors, *sizes),
        )
    return out


def _multiprocessors(t: Tensor) -> int:
    if not t.is_cuda:
        return CPU_MULTIPROCESSORS
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def supports_conv2d(call: Call) -> str | None:
    if call.args["skip"] is not None or call.args["upsample"]:
        return "takes one input at its own size; use ptx, triton or torch for skip and upsample"
    return conv2d_sm90a.supports(call) or _refuses_pixels(call)


def _refuses_pixels(call: Call) -> str | None:
    x = call.args["x"].shape
    around = sum(sides(call.args["padding"]))
    pixels = x[0] * (x[2] + around) * (x[3] + around)
    return f"must have fewer than 2^31 pixels (got {pixels})" if pixels >= 2**31 else None


supports_linear = linear_sm90a.supports
