"""attention on Hopper: the launch of ptx/attention.sm90a.ptx.j2 and the choice of its tile."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mirage_hello.kernels import attention_mma, tuning
from mirage_hello.kernels.call import Call
from mirage_hello.ptx import loader

SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16"}
MULTIPROCESSORS = 132  # of an H100 or H200
SHARE = {1: 1.2, 2: 0.9, 3: 0.75, 4: 0.78}  # of a round, by warpgroups; see Tile.clocks


@dataclass(frozen=True)
class Tile:
    """64 * warpgroups queries by block_n keys, `stages` key blocks in flight.

    ping_pong: the warpgroups issue their products in turns.
    poly: how many of every 16 exponentials run as polynomials on the FMA units.
    lazy: the first block's row maxima serve all blocks; see the header of the source.
    pv_first: p v of a block is issued before q k^T of the next and both are awaited.
    unroll: the loop over the keys is unrolled by the stages.
    short: warpgroups with rows in the tiles of the last round, 2 at least if they take turns; 0:
        all.
    """

    warpgroups: int
    block_n: int
    stages: int
    ping_pong: bool
    poly: int
    lazy: bool = False
    pv_first: bool = False
    unroll: bool = False
    short: int = 0

    def __post_init__(self) -> None:
        # A turn goes from one warpgroup to another: a barrier's two sides cannot be the same warps.
        least = 2 if self.ping_pong else 1
        if self.short and not least <= self.short < self.warpgroups:
            raise ValueError(
                f"attention: short must be 0 or from {least} to {self.warpgroups - 1} of "
                f"{self.warpgroups} warpgroups (got {self.short}); choose another tile"
            )

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    def smem_bytes(self, head_dim: int) -> int:
        """Q rows and 2 x stages key blocks of 128-byte rows, one row per 64 columns; barriers."""
        rows = 64 * self.warpgroups + 2 * self.stages * self.block_n
        return -(-head_dim // 64) * rows * 128 + 12 + 32 * self.stages

    def clocks(self, heads: int, n: int, m: int, head_dim: int) -> float:
        """Estimated clocks of `heads` times n queries and m keys.

        A round of all warpgroups over one block of keys takes SHARE of what the exponential unit
        (16 a clock) and the tensor cores (4096 FLOP a clock) would take one after the other; 2500
        clocks are what no round overlaps. One block a multiprocessor; docs/attention.md.
        """
        steps = -(-head_dim // 16) * self.block_n // 2 + self.block_n // 16 * head_dim // 2
        each = 64 * self.block_n / 16 + steps  # clocks of a warpgroup and block of keys

        def tile(groups: int) -> float:
            return 2500 + -(-m // self.block_n) * SHARE[groups] * groups * each

        def waves(tiles: int) -> int:
            return -(-tiles // MULTIPROCESSORS)

        if not self.short:
            return waves(heads * -(-n // (64 * self.warpgroups))) * tile(self.warpgroups)
        tall, short = (heads * tiles for tiles in self.rounds(heads, n))
        return waves(tall) * tile(self.warpgroups) + waves(short) * tile(self.short)

    def rounds(self, heads: int, n: int) -> tuple[int, int]:
        """Tiles of a head with all their rows, as many as fill every multiprocessor equally often,
        and those of `short` warpgroups for the rows that are left."""
        block_m = 64 * self.warpgroups
        full = heads * -(-n // block_m) // MULTIPROCESSORS  # rounds
        tall = full * MULTIPROCESSORS // heads
        return tall, max(0, -(-(n - tall * block_m) // (64 * (self.short or self.warpgroups))))

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
            SHORT=self.short,
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
    block_m, kind = 64 * tile.warpgroups, SHORT_NAME[q.dtype]
    maps = (_heads(q, block_m), _heads(k, tile.block_n), _heads(v, tile.block_n), _heads(out, 64))
    grid: tuple[int, ...] = (-(-n // block_m), h, b)
    more: tuple[int, ...] = ()
    if tile.short:
        tall, short = tile.rounds(b * h, n)
        grid, more = (b * h, tall + short), (h, tall)
    tile.program(d, kind).launch(
        f"attention_{kind}",
        grid=grid,
        block=(tile.threads,),
        args=(*maps, m, -(-m // tile.block_n), scale_log2, *more),
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
    """The measured tile of this shape, else the one of the least estimated time.

    Args:
        heads: batch x heads. n, m: queries and keys.
    """
    return tuning.tile_for(
        "attention",
        {"heads": heads, "n": n, "m": m, "d": d, "dtype": SHORT_NAME[dtype]},
        lambda: candidates(m, d, dtype),
        lambda tile: tile.clocks(heads, n, m, d),
    )


def candidates(m: int, d: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles for m keys of head dimension d, right for any number; docs/attention.md has times."""
    # A lazy maximum needs a second block to pay; half precision overflows beyond 2^15 equal keys.
    lazy = m > 128 and (dtype == torch.bfloat16 or m <= 16384)
    small, last = d <= 128, 3 if d <= 80 or 128 < d <= 192 else 2
    found = [
        Tile(2, 96 if small else 64, 3 if d <= 192 else 2, False, 0, lazy),
        Tile(1, 128 if small else 64, last, False, 0, lazy, unroll=lazy),
    ]
    if d <= 64:
        turns = Tile(3, 128, 2, True, int(lazy), lazy, pv_first=True, unroll=lazy)
        found.append(turns)
    if 48 < d <= 64:
        found += [replace(turns, short=2), Tile(4, 64, 3, True, 0, lazy, unroll=lazy)]
    if d <= 48:
        once = Tile(4, 80, 2, False, 0)
        many = Tile(4, 80, 3, True, 2 * lazy, lazy)
        found.append(once if m <= 80 else many)
    return found


def supports(call: Call) -> str | None:
    """What the products and the tensor maps need; None when all is there."""
    for name in ("q", "k", "v"):
        spec = call.args[name]
        if any(s == 0 and n > 1 for s, n in zip(spec.stride, spec.shape, strict=True)):
            return f"a tensor map takes no expanded {name} (got strides {spec.stride})"
    return attention_mma.supports(call)
