"""attention_fp8: attention on e4m3 tensors with one scale a head, an explicit choice on Hopper.

    out = softmax_m(scale (q_scale q) . (k_scale k)) @ (v_scale v) + v_mean

Not an op of the registry: nothing chooses it for you, since its error is that of 3 mantissa bits.
Row sums are float32; probabilities are rounded to e4m3 at up to 256 of its 448.

Rows of a softmax sum to 1, so softmax(s) v = softmax(s) (v - mean) + mean for any row `mean`:
`quantize_values` takes the mean over the keys off before it rounds, and the kernel adds it in
float32. What is left has either sign, and needs fewer of the 3 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import attention_mma
from mirage_hello.ptx import loader
from mirage_hello.reference import attention

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # finite value of e4m3
# Summed in wgmma's short accumulator before float32 takes over. Where all that a query looks at has
# one sign, 1024 keys lose up to 1.6 %, 2048 3.5 %, all of 8192 7 %: docs/attention.md.
PROMOTED_KEYS = 1024
LEAST_BLOCKS = 8  # of keys, in a part of a tile: fewer do not pay for its first block and its merge


@dataclass(frozen=True)
class Tile:
    """64 * warpgroups queries by block_n keys (a multiple of 32), `stages` key blocks in flight.

    promote: key blocks whose P V wgmma's short accumulator sums before float32 does; 0: all.
    sums_in_shared: those float32 sums, instead of a second set of registers.
    """

    warpgroups: int
    block_n: int
    stages: int
    promote: int = 1
    sums_in_shared: bool = False

    def __post_init__(self) -> None:
        if self.block_n % 32:
            raise ValueError(
                f"attention_fp8: block_n must be a multiple of 32 (got {self.block_n})"
            )

    def smem_bytes(self, head_dim: int, split: bool = False) -> int:
        """Q rows, as wide as the bfloat16 output; K, V and V^T of each stage; sums; barriers; which
        part of which tile a block has."""
        rows = -(-head_dim // 64) * 64 * self.warpgroups
        stage = 2 * self.block_n + -(-self.block_n // 128) * head_dim
        sums = 64 * self.warpgroups * head_dim * 4 if self.promote and self.sums_in_shared else 0
        return (rows + self.stages * stage) * 128 + sums + (36 if split else 8) + 48 * self.stages

    def program(self, head_dim: int, split: bool = False) -> loader.Program:
        return loader.program(
            "attention_fp8.sm90a",
            SPLIT=split,
            HEAD_DIM=head_dim,
            WARPGROUPS=self.warpgroups,
            BLOCK_N=self.block_n,
            STAGES=self.stages,
            PROMOTE=self.promote,
            SUMS_IN_SHARED=self.sums_in_shared,
        )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale as e4m3, scale [H] float32) with scale_h = max|x[:, :, h]| / 448.

    Args:
        x: [B, N, H, D], any floating dtype.
    """
    if x.numel() == 0:
        return x.to(E4M3), torch.ones(x.shape[2], device=x.device)
    largest = x.detach().abs().amax(dim=(0, 1, 3)).float()
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (x.float() / scale[:, None]).to(E4M3), scale


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(v - mean as e4m3, its scale [H] float32, mean [B, H, D] float32 over the keys).

    Args:
        v: [B, M, H, D], any floating dtype.
    """
    mean = v.detach().float().sum(1) / max(1, v.shape[1])
    return *quantize(v.float() - mean[:, None]), mean


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same in float64 on the dequantised tensors."""

    def wide(t: Tensor, s: Tensor) -> Tensor:
        return t.double() * s.double()[:, None]

    values = wide(v, v_scale)
    if v_mean is not None:
        values = values + v_mean.double()[:, None]
    return attention(wide(q, q_scale), wide(k, k_scale), values, scale)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None = None,
    scale: float | None = None,
    tile: Tile | None = None,
    multiprocessors: int | None = None,
) -> Tensor:
    """softmax(scale q_scale k_scale q k^T) v_scale v + v_mean, not causal.

    Args:
        q: [B, N, H, D] float8_e4m3fn, D contiguous, a multiple of 16 up to 128.
        k, v: [B, M, H, D] float8_e4m3fn, the same.
        q_scale, k_scale, v_scale: [H] float32, above 0.
        v_mean: [B, H, D] float32, what `quantize_values` took off v; None: nothing.
        scale: factor on the scores, above 0; default D**-0.5.
        tile: overrides the choice.
        multiprocessors: that the tiles are to fill; default those of the card.

    Returns:
        [B, N, H, D] bfloat16, contiguous. M = 0 gives zeros.

    Raises:
        TypeError: another dtype. ValueError: shapes, strides or scale that the kernel cannot take.

    Numerics: scores in wgmma's accumulator of about 14 bits; p v in it over some blocks of keys
        (`Tile.promote`) and in float32 beyond; p has 3 mantissa bits; row sums in float32.
    """
    _check(q, k, v, {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}, v_mean, scale)
    b, n, h, d = q.shape
    m = k.shape[1]
    out = torch.empty(b, n, h, d, dtype=torch.bfloat16, device=q.device)
    if out.numel() == 0 or m == 0:
        return out.zero_()
    _, scale_log2 = attention_mma.positive_scale(q, scale)
    tile = tile or choose_tile(b * h, n, m, d)
    block_m, block_n = 64 * tile.warpgroups, tile.block_n
    tiles, blocks = -(-n // block_m), -(-m // block_n)
    multiprocessors = multiprocessors or attention_mma.multiprocessors(q)
    whole, parts = split_last(tiles * h * b, blocks, multiprocessors)
    maps = (_heads(q, 128, block_m), _heads(k, 128, block_n), _heads(v, 128, block_n))
    args = (*maps, _heads(out, 64, 64), q_scale, k_scale, v_scale, v_mean, m, blocks, scale_log2)
    more: tuple = ()
    grid: tuple[int, ...] = (tiles, h, b)
    if parts > 1:
        rest = tiles * h * b - whole
        partial = torch.empty(rest * parts, tile.warpgroups, d // 2 + 4, 128, device=q.device)
        more = (tiles, h, whole, parts, partial)
        grid = (whole + rest * parts,)
    tile.program(d, parts > 1).launch(
        "attention_fp8",
        grid=grid,
        block=(128 * (tile.warpgroups + 1),),
        args=(*args, *more),
        smem_bytes=tile.smem_bytes(d, parts > 1),
    )
    if parts > 1:
        merge = loader.program("attention_fp8_merge", HEAD_DIM=d, WARPGROUPS=tile.warpgroups)
        merge.launch(
            "attention_fp8_merge",
            grid=(rest * tile.warpgroups, 4 if d % 32 == 0 else 2),
            block=(128,),
            args=(partial, v_scale, v_mean, out, n, tiles, h, whole, parts),
        )
    return out


def split_last(tiles: int, blocks: int, multiprocessors: int) -> tuple[int, int]:
    """(tiles run as they are, parts along the keys of each of the others).

    Every multiprocessor has one tile at a time: 688 of them are 5 rounds of 132 and 28 more, which
    take a round of their own unless 4 x 28 multiprocessors share them.

    Args:
        tiles: in all. blocks: of keys, of each tile.
    """
    rest = tiles % multiprocessors
    parts = min(multiprocessors // rest, blocks // LEAST_BLOCKS) if rest else 1
    return (tiles - rest, parts) if parts > 1 else (tiles, 1)


def choose_tile(heads: int, n: int, m: int, d: int) -> Tile:
    """The tile for `heads` (batch x heads) times n queries and m keys; see docs/attention.md."""

    def blocks(warpgroups: int) -> int:
        return heads * -(-n // (64 * warpgroups))

    if blocks(3) >= 96:
        often = PROMOTED_KEYS // 96
        return Tile(3, 96, 3, often) if d <= 64 else Tile(3, 96, 2, often, sums_in_shared=True)
    return Tile(2 if blocks(2) >= 96 else 1, 128, 3, PROMOTED_KEYS // 128)


def _heads(t: Tensor, columns: int, rows: int) -> loader.TensorMap:
    """[B, N, H, D] as {D, H, N, B}, boxes of `rows` rows of one head."""
    b, n, h, d = t.shape
    size = t.element_size()
    strides = (t.stride(2) * size, t.stride(1) * size, t.stride(0) * size)
    return loader.tensor_map(t, (columns, 1, rows, 1), dims=(d, h, n, b), strides=strides)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: dict[str, Tensor],
    v_mean: Tensor | None,
    scale: float | None,
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != E4M3:
            raise TypeError(f"attention_fp8: {name} must be {E4M3} (got {t.dtype}); quantize() it")
        if t.dim() != 4 or t.stride(3) != 1 or any(s % 16 for s in t.stride()[:3]):
            raise ValueError(
                f"attention_fp8: {name} must be [B, N, H, D] D contiguous, strides in 16s "
                f"(got {tuple(t.shape)}, strides {t.stride()})"
            )
    b, _, h, d = q.shape
    if d % 16 or d > 128:
        raise ValueError(f"attention_fp8: D must be a multiple of 16, at most 128 (got {d})")
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (b, h, d):
        raise ValueError(
            f"attention_fp8: k and v must be [{b}, M, {h}, {d}] "
            f"(got {tuple(k.shape)}, {tuple(v.shape)})"
        )
    wanted = {name: (h,) for name in scales} | ({} if v_mean is None else {"v_mean": (b, h, d)})
    for name, s in (scales | {"v_mean": v_mean}).items():
        if s is not None and (
            s.shape != wanted[name] or s.dtype != torch.float32 or not s.is_contiguous()
        ):
            raise ValueError(
                f"attention_fp8: {name} must be contiguous float32 {list(wanted[name])} "
                f"(got {s.dtype} {tuple(s.shape)})"
            )
    if scale is not None and not scale > 0:
        raise ValueError(f"attention_fp8: scale must be above 0 (got {scale}); negate q")
