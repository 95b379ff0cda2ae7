"""attention_fp8: attention on e4m3 tensors with one scale a head, an explicit choice on Hopper.

    out = softmax_m(scale (q_scale q) . (k_scale k)) @ (v_scale v)

Not an op of the registry: nothing chooses it for you, since its error is that of 3 mantissa bits.
Row sums are float32; probabilities are rounded to e4m3 at up to 256 of its 448.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import attention_mma
from mirage_hello.ptx import loader
from mirage_hello.reference import attention

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # finite value of e4m3


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

    def smem_bytes(self, head_dim: int) -> int:
        """Q rows, as wide as the bfloat16 output; K, V and V^T of each stage; sums; barriers."""
        rows = -(-head_dim // 64) * 64 * self.warpgroups
        stage = 2 * self.block_n + -(-self.block_n // 128) * head_dim
        sums = 64 * self.warpgroups * head_dim * 4 if self.promote and self.sums_in_shared else 0
        return (rows + self.stages * stage) * 128 + sums + 8 + 48 * self.stages

    def program(self, head_dim: int) -> loader.Program:
        return loader.program(
            "attention_fp8.sm90a",
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
    largest = x.detach().abs().amax(dim=(0, 1, 3)).float()
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (x.float() / scale[:, None]).to(E4M3), scale


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    scale: float | None = None,
) -> Tensor:
    """The same in float64 on the dequantised tensors."""

    def wide(t: Tensor, s: Tensor) -> Tensor:
        return t.double() * s.double()[:, None]

    return attention(wide(q, q_scale), wide(k, k_scale), wide(v, v_scale), scale)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    scale: float | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """softmax(scale q_scale k_scale q k^T) v_scale v, not causal.

    Args:
        q: [B, N, H, D] float8_e4m3fn, D contiguous, a multiple of 16 up to 128.
        k, v: [B, M, H, D] float8_e4m3fn, the same.
        q_scale, k_scale, v_scale: [H] float32, above 0.
        scale: factor on the scores, above 0; default D**-0.5.
        tile: overrides the choice.

    Returns:
        [B, N, H, D] bfloat16, contiguous. M = 0 gives zeros.

    Raises:
        TypeError: another dtype. ValueError: shapes, strides or scale that the kernel cannot take.

    Numerics: scores in wgmma's accumulator of about 14 bits; p v in it over some blocks of keys
        (`Tile.promote`) and in float32 beyond; p has 3 mantissa bits; row sums in float32.
    """
    _check(q, k, v, q_scale, k_scale, v_scale, scale)
    b, n, h, d = q.shape
    m = k.shape[1]
    out = torch.empty(b, n, h, d, dtype=torch.bfloat16, device=q.device)
    if out.numel() == 0 or m == 0:
        return out.zero_()
    _, scale_log2 = attention_mma.positive_scale(q, scale)
    tile = tile or choose_tile(b * h, n, m, d)
    block_m, block_n = 64 * tile.warpgroups, tile.block_n
    k_map, v_map = _heads(k, 128, block_n), _heads(v, 128, block_n)
    maps = (_heads(q, 128, block_m), k_map, v_map, _heads(out, 64, 64))
    tile.program(d).launch(
        "attention_fp8",
        grid=(-(-n // block_m), h, b),
        block=(128 * (tile.warpgroups + 1),),
        args=(*maps, q_scale, k_scale, v_scale, m, -(-m // block_n), scale_log2),
        smem_bytes=tile.smem_bytes(d),
    )
    return out


def choose_tile(heads: int, n: int, m: int, d: int) -> Tile:
    """The tile for `heads` (batch x heads) times n queries and m keys; see docs/attention.md."""

    def blocks(warpgroups: int) -> int:
        return heads * -(-n // (64 * warpgroups))

    if blocks(3) >= 96:
        return Tile(3, 96, 3) if d <= 64 else Tile(3, 96, 2, promote=4, sums_in_shared=True)
    return Tile(2 if blocks(2) >= 96 else 1, 128, 3)


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
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
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
    for name, s in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if s.shape != (h,) or s.dtype != torch.float32 or not s.is_contiguous():
            raise ValueError(
                f"attention_fp8: {name} must be contiguous float32 [{h}] "
                f"(got {s.dtype} {tuple(s.shape)})"
            )
    if scale is not None and not scale > 0:
        raise ValueError(f"attention_fp8: scale must be above 0 (got {scale}); negate q")
