"""attention_fp8: attention on e4m3 tensors with one scale a head, an explicit choice on Hopper.

    out = softmax_m(scale (q_scale q) . (k_scale k)) @ (v_scale v)

Not an op of the registry: nothing chooses it for you, since its error is that of 3 mantissa bits.
Scores and sums are float32; probabilities are rounded to e4m3 at up to 256 of its 448.
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
    """64 * warpgroups queries by block_n keys, `stages` key blocks in flight.

    maximum: "exact", "conditional" or "lazy"; see the header of the source.
    headroom: powers of two by which a score may exceed the maximum in force.
    ping_pong: the warpgroups take turns at issuing products, each passing on when its own are
        issued ("issue") or its scores are there ("scores"); "": they do not.
    poly: how many of every 8 exponentials run as polynomials on the FMA units.
    q_registers: Q is read from registers, not from shared memory, by its products.
    v_turned: V is turned by a kernel before this one, not for each block of queries.
    promote: key blocks whose P V wgmma's short accumulator sums before float32 does; 0: all.
    sums_in_shared: those float32 sums, instead of a second set of registers.
    ahead: the scores of the next block are computed under the exponentials of this one.
    """

    warpgroups: int
    block_n: int
    stages: int
    maximum: str = "conditional"
    headroom: int = 4
    ping_pong: str = ""
    poly: int = 0
    q_registers: bool = False
    v_turned: bool = False
    promote: int = 1
    sums_in_shared: bool = False
    ahead: bool = False

    def smem_bytes(self, head_dim: int) -> int:
        """Q rows, as wide as the bfloat16 output; K, V^T and V of each stage; barriers."""
        rows = -(-head_dim // 64) * 64 * self.warpgroups
        stage = (1 if self.v_turned else 2) * self.block_n + -(-self.block_n // 128) * head_dim
        sums = 64 * self.warpgroups * head_dim * 4 if self.promote and self.sums_in_shared else 0
        return (rows + self.stages * stage) * 128 + sums + 8 + 48 * self.stages

    def program(self, head_dim: int) -> loader.Program:
        return loader.program(
            "attention_fp8.sm90a",
            HEAD_DIM=head_dim,
            WARPGROUPS=self.warpgroups,
            BLOCK_N=self.block_n,
            STAGES=self.stages,
            MAXIMUM=self.maximum,
            HEADROOM=self.headroom,
            PING_PONG=self.ping_pong,
            POLY=self.poly,
            Q_REGISTERS=self.q_registers,
            V_TURNED=self.v_turned,
            PROMOTE=self.promote,
            SUMS_IN_SHARED=self.sums_in_shared,
            AHEAD=self.ahead,
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

    Returns:
        [B, N, H, D] bfloat16, contiguous. M = 0 gives zeros.

    Raises:
        TypeError: another dtype. ValueError: shapes, strides or scale that the kernel cannot take.

    Numerics: fp8 products in wgmma's short accumulator, row sums in float32.
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
    v_map = _turned(turn_keys(v)) if tile.v_turned else _heads(v, 128, block_n)
    maps = (_heads(q, 128, block_m), _heads(k, 128, block_n), v_map, _heads(out, 64, 64))
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


def turn_keys(v: Tensor) -> Tensor:
    """[B, M, H, D] as V^T [B, H, D, M'], M' the next multiple of 128, zeros after the last key.

    Each 16 keys lie in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, in which the threads of
    wgmma hold scores.
    """
    b, m, h, d = v.shape
    out = torch.empty(b, h, d, -(-m // 128) * 128, dtype=E4M3, device=v.device)
    maps = (_heads(v, 128, 128), _turned(out))
    program = loader.program("turn_keys.sm90a", HEAD_DIM=d)
    program.launch("turn_keys", (out.shape[3] // 128, h, b), (128,), maps, 128 * (128 + d) + 8)
    return out


def turn_keys_torch(v: Tensor) -> Tensor:
    """What `turn_keys` computes."""
    b, m, h, d = v.shape
    padded = torch.zeros(b, h, d, -(-m // 128) * 128, dtype=torch.uint8, device=v.device)
    padded[..., :m] = v.view(torch.uint8).permute(0, 2, 3, 1)
    pairs = padded.view(b, h, d, -1, 2, 4, 2)  # key = 8 i + 2 j + e: [i, j, e] -> [j, i, e]
    return pairs.transpose(4, 5).reshape(padded.shape).view(E4M3)


def _turned(t: Tensor) -> loader.TensorMap:
    """[B, H, D, M'] as {M', D, H, B}, boxes of 128 keys of one head."""
    b, h, d, m = t.shape
    return loader.tensor_map(t, (128, d, 1, 1), dims=(m, d, h, b), strides=(m, d * m, h * d * m))


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
