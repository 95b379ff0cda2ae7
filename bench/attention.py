"""attention: shapes of Stable Diffusion's self- and cross-attention, and two long ones.

FLOPs: 4 B H N M D (two products of 2 B H N M D; the softmax is not counted).
Elements: q and the output B N H D each, k and v B M H D each.
"""

from __future__ import annotations

from .case import Case, Draw

GPU_PEERS = ("flash", "cudnn", "torch-eager")


def case(
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    batch: int = 1,
    quick: bool = False,
    peers=GPU_PEERS,
) -> Case:
    """softmax(q k^T / sqrt(D)) v for q [B, N, H, D] and k, v [B, M, H, D]."""

    def make(draw: Draw) -> tuple:
        q = draw.normal(batch, queries, heads, dim)
        k = draw.normal(batch, keys, heads, dim)
        v = draw.normal(batch, keys, heads, dim)
        return q, k, v, None

    prefix = f"b{batch} " if batch > 1 else ""
    return Case(
        op="attention",
        name=f"{prefix}h{heads} {queries}x{keys} d{dim}",
        make=make,
        flops=4 * batch * heads * queries * keys * dim,
        elements=batch * heads * dim * (2 * queries + 2 * keys),
        peers=peers,
        quick=quick,
    )


CASES = (
    case(8, 4096, 4096, 40, quick=True),
    case(8, 4096, 4096, 40, batch=2),
    case(10, 4096, 4096, 64, quick=True),
    case(5, 4096, 4096, 64),
    case(8, 1024, 1024, 80, quick=True),
    case(20, 1024, 1024, 64),
    case(8, 256, 256, 160),
    case(8, 4096, 77, 40, quick=True),  # cross-attention with 77 text tokens
    case(16, 8192, 8192, 64),
    case(16, 8192, 8192, 128),
    case(8, 4096, 16384, 64),
)
SMALL = (
    case(2, 256, 256, 40, quick=True, peers=("torch-eager",)),
    case(2, 64, 64, 160, peers=("torch-eager",)),
    case(2, 256, 77, 40, quick=True, peers=("torch-eager",)),
)
