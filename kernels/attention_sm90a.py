"""attention on Hopper: the launch of ptx/attention.sm90a.ptx.j2 and the choice of its tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import attention_mma
from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader

SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Tile:
    """64 * warpgroups queries by block_n keys, `stages` key blocks in flight.

    ping_pong: the warpgroups issue their products in turns.
    poly: how many of every 16 exponentials run as polynomials on the FMA units.
    lazy: the first block's row maxima serve all blocks; see the header of the source.
    pv_first: p v of a block is issued before q k^T of the next and both are awaited.
    unroll: the loop over the keys is unrolled by the stages.
    """

    warpgroups: int
    block_n: int
    stages: int
    ping_pong: bool
    poly: int
    lazy: bool = False
    pv_first: bool = False
    unroll: bool = False
    prefetch: bool = False
    early: bool = False
    interleave: bool = False
    short_first: bool = False

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + (self.stages > 1))

    def smem_bytes(self, head_dim: int) -> int:
        """Q rows and 2 x stages key blocks of 128-byte rows, one row per 64 columns; barriers."""
        rows = 64 * self.warpgroups + 2 * self.stages * self.block_n
        return -(-head_dim // 64) * rows * 128 + 12 + 32 * self.stages

    def program(self, head_dim: int, dtype: str) -> loader.Program:
        return loader.program(
            "attention.sm90a",
            HEAD_DIM=head_dim,
            BLOCK_N=self.block_n,
            WARPGROUPS=self.warpgroups,
            STAGES=self.stages,
            PING_PONG=self.ping_pong,
            POLY=self.poly,
            LAZY=self.lazy,
            PV_FIRST=self.pv_first,
            UNROLL=self.unroll,
            PREFETCH=self.prefetch,
            EARLY=self.early,
            INTERLEAVE=self.interleave,
            SHORT_FIRST=self.short_first,
            dtype=dtype,
        )


def attention_sm90a(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, tile: Tile | None = None
) -> Tensor:
    """See ops.attention; `tile` overrides the choice."""
    b, n, h, d = q.shape
    m = k.shape[1]
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if m == 0:
        return out.zero_()
    q, scale_log2 = attention_mma.positive_scale(q, scale)
    tile = tile or choose_tile(b * h, n, m, d, q.dtype)
    if tile.stages == 1 and not tile.block_n - 16 < m <= tile.block_n:
        raise ValueError(f"attention: {tile} is for {tile.block_n - 15} to {tile.block_n} keys")
    block_m, short = 64 * tile.warpgroups, SHORT_NAME[q.dtype]
    maps = (_heads(q, block_m), _heads(k, tile.block_n), _heads(v, tile.block_n), _heads(out, 64))
    tile.program(d, short).launch(
        f"attention_{short}",
        grid=(-(-n // block_m), h, b),
        block=(tile.threads,),
        args=(*maps, m, -(-m // tile.block_n), scale_log2),
        smem_bytes=tile.smem_bytes(d),
    )
    return out


def _heads(t: Tensor, rows: int) -> loader.TensorMap:
    """[B, N, H, D] with any strides as {D, H, N, B}, boxes of `rows` rows of one head."""
    b, n, h, d = t.shape
    size = t.element_size()
    strides = (t.stride(2) * size, t.stride(1) * size, t.stride(0) * size)
    return loader.tensor_map(t, (64, 1, rows, 1), dims=(d, h, n, b), strides=strides)


def choose_tile(heads: int, n: int, m: int, d: int, dtype: torch.dtype) -> Tile:
    """The tile for `heads` (batch x heads) times n queries and m keys; see docs/attention.md.

    Small heads want many consumer warps, which hide the latency of the exponential unit; few
    tiles want 64-row tiles, which fill the H200's 132 multiprocessors.
    """

    def tiles(groups: int) -> int:
        return heads * -(-n // (64 * groups))

    # A lazy maximum needs a second block to pay; half precision overflows beyond 2^15 equal keys.
    lazy = m > 128 and (dtype == torch.bfloat16 or m <= 16384)
    if d <= 48 and m <= 80 and tiles(4) >= 96:
        return Tile(4, 80, 2, False, 0)
    if d <= 48 and tiles(4) >= 96:
        return Tile(4, 80, 3, True, 2 if lazy else 0, lazy)
    if d <= 64 and m >= 8192 and tiles(4) >= 96:
        return Tile(4, 64, 3, True, 0, lazy)
    if d <= 64 and tiles(3) >= 96:
        return Tile(3, 128, 2, True, 1 if lazy else 0, lazy, pv_first=True, unroll=lazy)
    if tiles(2) >= 128:
        return Tile(2, 96 if d <= 128 else 64, 3 if d <= 192 else 2, False, 0, lazy)
    if d <= 128:
        return Tile(1, 128, 3 if d <= 80 else 2, False, 0, lazy, unroll=lazy)
    return Tile(1, 64, 3 if d <= 192 else 2, False, 0, lazy, unroll=lazy)


def supports(call: Call) -> str | None:
    """What the products and the tensor maps need; None when all is there."""
    for name in ("q", "k", "v"):
        spec = call.args[name]
        if any(s == 0 and n > 1 for s, n in zip(spec.stride, spec.shape, strict=True)):
            return f"a tensor map takes no expanded {name} (got strides {spec.stride})"
    return attention_mma.supports(call)
