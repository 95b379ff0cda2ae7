"""attention on sm_80 and later: the launches of the mma.sync kernels, in CUDA C++ and in PTX."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader

ELEMENT = {torch.bfloat16: ("__nv_bfloat16", "bf16"), torch.float16: ("__half", "f16")}
MAX_GRID_YZ = 65535
MAX_TOKEN_STRIDE = 1 << 24  # 32 MiB: a thread's part of a block is addressed in 32 bits
WARPS = 4  # of a block of either kernel
# Time of 64 rows as one tile of 16 a warp, of two: more reads of K and V for the same products.
# Measured on an H200 over head dimensions 40 to 128: 1.18 to 1.27.
ONE_TILE_COST = 1.2


@dataclass(frozen=True)
class Tile:
    """How a block of either kernel is cut.

    Args:
        m_tiles: tiles of 16 query rows a warp; each fragment of K and V read feeds all of them.
        block_n: keys of a step through shared memory, a multiple of 16.
        q_kept: steps of 16 columns of Q that stay in registers; the others are read for each use.
    """

    m_tiles: int
    block_n: int
    q_kept: int = 16

    @property
    def block_m(self) -> int:
        return 16 * self.m_tiles * WARPS

    def smem_bytes(self, head_dim: int) -> int:
        """Q and two buffers of K and V, rows in pieces of 128 B."""
        return -(-head_dim // 64) * 128 * (self.block_m + 4 * self.block_n)

    def program(self, head_dim: int, kind: str) -> loader.Program:
        return loader.program(
            "attention.sm80",
            HEAD_DIM=head_dim,
            dtype=kind,
            M_TILES=self.m_tiles,
            BLOCK_N=self.block_n,
            Q_KEPT=self.q_kept,
        )


@functools.cache
def choose_tile(head_dim: int, queries: int, heads: int, multiprocessors: int) -> Tile:
    """Two tiles of 16 rows a warp, unless the blocks of one fill the card better.

    Two have room in the registers up to head dimension 128, there with a part of Q only.

    Args:
        queries: N. heads: of all batches. multiprocessors: of the card.
    """
    if head_dim > 128:
        return Tile(1, 32) if head_dim <= 192 else Tile(1, 16, 12)
    one, two = Tile(1, 64), Tile(2, 64) if head_dim <= 64 else Tile(2, 32, 2)

    def cost(tile: Tile) -> float:
        blocks = -(-queries // tile.block_m) * heads
        rows = -(-blocks // multiprocessors) * tile.block_m
        return rows * (ONE_TILE_COST if tile is one else 1.0)

    return two if cost(two) < cost(one) else one


def attention_sm80(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, tile: Tile | None = None
) -> Tensor:
    """See ops.attention; ptx/attention.sm80.ptx.j2. `tile` replaces the chosen one."""
    b, n, h, d = q.shape
    kind = ELEMENT[q.dtype][1]
    tile = tile or choose_tile(d, n, b * h, multiprocessors(q))
    return _launch(tile.program(d, kind), f"attention_{kind}", tile, q, k, v, scale)


def multiprocessors(t: Tensor) -> int:
    """Of the tensor's card; 1 for a CPU tensor: the emulator has no use for a full card."""
    if not t.is_cuda:
        return 1
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **switches: int
) -> Tensor:
    """See ops.attention; kernels/cuda/attention.cu. `switches` take steps of its ladder back."""
    head_dim = q.shape[3]
    program = cuda_source(head_dim, q.dtype, **switches)
    return _launch(program, "attention", cuda_tile(head_dim, **switches), q, k, v, scale)


def cuda_source(head_dim: int, dtype: torch.dtype, **switches: int) -> loader.Program:
    """kernels/cuda/attention.cu; `switches`: SWIZZLE, ASYNC, M_TILES, RESCALE_ABOVE."""
    element, kind = ELEMENT[dtype]
    defines = {"ELEMENT": element, "KIND": kind, "HEAD_DIM": str(head_dim)}
    return loader.cuda_program(
        "attention", defines={**defines, **{k: str(v) for k, v in switches.items()}}
    )


def cuda_tile(head_dim: int, **switches: int) -> Tile:
    """The tile that kernels/cuda/attention.cu takes."""
    block_n = 64 if head_dim <= 128 else 32 if head_dim <= 192 else 16
    return Tile(switches.get("M_TILES", 2 if head_dim <= 64 else 1), block_n)


def _launch(
    program: loader.Program,
    entry: str,
    tile: Tile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
) -> Tensor:
    """One block for `block_m` queries of a head."""
    b, n, h, d = q.shape
    m = k.shape[1]
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if m == 0:
        return out.zero_()
    q, scale = positive_scale(q, scale)
    program.launch(
        entry,
        grid=(-(-n // tile.block_m), h, b),
        block=(32 * WARPS,),
        args=(q, k, v, out, *_strides(q), *_strides(k), *_strides(v), n, m, scale),
        smem_bytes=tile.smem_bytes(d),
    )
    return out


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """(q, scale * log2(e)) with the factor above 0, since the kernels take the largest score for
    the largest exponent; 0 becomes 1e-30, which masked scores of -inf survive."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0:
        q, scale = -q, -scale
    return q, (scale or 1e-30) * math.log2(math.e)


def _strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


def supports(call: Call) -> str | None:
    """Head dimensions in 16-byte pieces, and rows that start on 16 bytes."""
    q = call.args["q"]
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dimension must be a multiple of 8, at most 256 (got {q.shape[-1]})"
    if max(q.shape[0], q.shape[2]) > MAX_GRID_YZ:
        return f"batch and heads must be at most {MAX_GRID_YZ} (got {q.shape[0]}, {q.shape[2]})"
    for name in ("q", "k", "v"):
        spec = call.args[name]
        if not spec.aligned16 or any((s * spec.dtype.itemsize) % 16 for s in spec.stride[:-1]):
            return f"{name} must start and stride on 16 bytes (got strides {spec.stride})"
        if spec.stride[1] > MAX_TOKEN_STRIDE:
            return f"{name} must step at most {MAX_TOKEN_STRIDE} a token (got {spec.stride[1]})"
        if spec.stride[-1] != 1:
            return f"{name} must have D contiguous (got strides {spec.stride})"
    return None
