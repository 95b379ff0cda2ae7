"""attention_fp8: attention on e4m3 tensors with one scale a head, an explicit choice on Hopper.

    out = softmax_m(scale (q_scale q) . (k_scale k)) @ (v_scale v)

Not an op of the registry: nothing chooses it for you, since its error is that of 3 mantissa bits.
Scores and sums are float32; probabilities are rounded to e4m3 at up to 256 of its 448.
"""

import torch
from torch import Tensor

from mirage_hello.kernels import attention_mma
from mirage_hello.ptx import loader
from mirage_hello.reference import attention

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # finite value of e4m3
BLOCK_N, WARPGROUPS, STAGES = 128, 2, 3


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
    block_m = 64 * WARPGROUPS
    maps = (
        _heads(q, 128, block_m),
        _heads(k, 128, BLOCK_N),
        _heads(v, 128, BLOCK_N),
        _heads(out, 64, 64),
    )
    program = loader.program(
        "attention_fp8.sm90a", HEAD_DIM=d, WARPGROUPS=WARPGROUPS, STAGES=STAGES
    )
    program.launch(
        "attention_fp8",
        grid=(-(-n // block_m), h, b),
        block=(128 * (WARPGROUPS + 1),),
        args=(*maps, q_scale, k_scale, v_scale, m, -(-m // BLOCK_N), scale_log2),
        smem_bytes=smem_bytes(d),
    )
    return out


def smem_bytes(head_dim: int) -> int:
    """Q rows, as wide as the bfloat16 output; K, V and V^T of each stage; barriers."""
    rows = -(-head_dim // 64) * 64 * WARPGROUPS + 3 * STAGES * BLOCK_N
    return rows * 128 + 8 + 48 * STAGES


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
