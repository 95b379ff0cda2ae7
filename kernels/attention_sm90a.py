"""attention on Hopper: the launch of ptx/attention.sm90a.ptx.j2 and the choice of its tile."""

import functools
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

    poly: how many of every 16 exponentials run as polynomials on the FMA units.
    lazy: the first block's row maxima serve all blocks; see the header of the source.
    """

    warpgroups: int
    block_n: int
    stages: int
    ping_pong: bool
    poly: int
    lazy: bool = False
    key_groups: int = 1
    order: str = "qk_pv"
    turn: str = "both"
    ones: bool = False
    unroll: bool = False
    degree: int = 3
    min_ctas: int = 1
    resident: bool = False
    stream: bool = False
    cluster: int = 1

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups * self.key_groups + (not self.resident))

    def smem_bytes(self, head_dim: int) -> int:
        """Q rows and 2 x stages key blocks of 128-byte rows, one row per 64 columns; barriers."""
        rows = 64 * self.warpgroups * (1 + self.stream) + 2 * self.stages * self.block_n
        barriers = 32 * self.stages + (32 if self.stream else 8)
        barriers += 8 * (self.cluster - 1)
        if self.ones:
            barriers += 2048 if head_dim == 64 else 8 * self.stages
        return -(-head_dim // 64) * rows * 128 + barriers

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
            KEY_GROUPS=self.key_groups,
            ORDER=self.order,
            TURN=self.turn,
            ONES=self.ones,
            UNROLL=self.unroll,
            DEGREE=self.degree,
            MIN_CTAS=self.min_ctas,
            RESIDENT=self.resident,
            STREAM=self.stream,
            CLUSTER=self.cluster,
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
    block_m, short = 64 * tile.warpgroups, SHORT_NAME[q.dtype]
    maps = (
        _heads(q, block_m),
        *(_heads(x, tile.block_n // tile.cluster) for x in (k, v)),
        _heads(out, 64),
    )
    tiles, blocks = -(-n // block_m), -(-m // tile.block_n)
    tiles = -(-tiles // tile.cluster) * tile.cluster
    program, smem_bytes = tile.program(d, short), tile.smem_bytes(d)
    args: tuple = (*maps, m, blocks, scale_log2)
    if not tile.stream:
        program.launch(f"attention_{short}", (tiles, h, b), (tile.threads,), args, smem_bytes)
        return out
    units = tiles * h * b * blocks
    ctas = min(_multiprocessors(q.device), units)
    share, extra = divmod(units, ctas)
    partials = torch.empty(ctas, 2, tile.warpgroups, d // 8 + 1, 128, 4, device=q.device)
    args += (partials, tiles, h, share, extra)
    program.launch(f"attention_{short}", (ctas,), (tile.threads,), args, smem_bytes)
    if share % blocks or extra:
        merged = (partials, out, n, blocks, tiles, h, share, extra)
        program.launch(f"attention_merge_{short}", (ctas - 1, tile.warpgroups), (128,), merged)
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 5  # emulated: few enough that a small call has whole tiles and parts
    return torch.cuda.get_device_properties(device).multi_processor_count


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
        return Tile(3, 128, 2, True, 0, lazy)
    if tiles(2) >= 128:
        return Tile(2, 96 if d <= 128 else 64, 3 if d <= 192 else 2, False, 0, lazy)
    return Tile(1, 128 if d <= 160 else 64, 3 if d <= 80 else 2, False, 0, lazy)


def supports(call: Call) -> str | None:
    """What the products and the tensor maps need; None when all is there."""
    for name in ("q", "k", "v"):
        spec = call.args[name]
        if any(s == 0 and n > 1 for s, n in zip(spec.stride, spec.shape, strict=True)):
            return f"a tensor map takes no expanded {name} (got strides {spec.stride})"
    return attention_mma.supports(call)
