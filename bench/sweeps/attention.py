"""Tile sweep of attention.sm90a on a GPU: parity first, then time beside cuDNN and flash.

    python bench/sweeps/attention.py [CASE-SUBSTRING ...]      writes $OUT/sweep-attention.json

Each case runs in a process of its own with a time limit, so a kernel that hangs costs little.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import attention_mma, parity
from mirage_hello.kernels.attention_sm90a import Tile, attention_sm90a, candidates
from mirage_hello.reference import attention

LIMIT_S = 60
# name: (B, H, N, M, D)
CASES = {
    "h8 4096x4096 d40": (1, 8, 4096, 4096, 40),
    "b2 h8 4096x4096 d40": (2, 8, 4096, 4096, 40),
    "h10 4096x4096 d64": (1, 10, 4096, 4096, 64),
    "h5 4096x4096 d64": (1, 5, 4096, 4096, 64),
    "h8 1024x1024 d80": (1, 8, 1024, 1024, 80),
    "h20 1024x1024 d64": (1, 20, 1024, 1024, 64),
    "h8 256x256 d160": (1, 8, 256, 256, 160),
    "h8 4096x77 d40": (1, 8, 4096, 77, 40),
    "h8 1024x77 d80": (1, 8, 1024, 77, 80),
    "h8 256x77 d160": (1, 8, 256, 77, 160),
    "h16 8192x8192 d64": (1, 16, 8192, 8192, 64),
    "h16 8192x8192 d128": (1, 16, 8192, 8192, 128),
    "h8 4096x16384 d64": (1, 8, 4096, 16384, 64),
}
SMEM = 232448  # bytes a block may have on Hopper


def tiles(m: int, d: int) -> list[Tile]:
    """The launcher's candidates, and each with one thing changed."""
    found = candidates(m, d, torch.bfloat16)
    for tile in tuple(found):
        found += [replace(tile, stages=tile.stages + 1), replace(tile, poly=tile.poly + 1)]
        if tile.lazy:
            found.append(replace(tile, unroll=not tile.unroll))
    return [tile for tile in dict.fromkeys(found) if tile.smem_bytes(d) <= SMEM]


def run_case(name: str) -> dict:
    b, h, n, m, d = CASES[name]
    draw = lambda length: torch.randn(b, length, h, d, device="cuda").bfloat16()  # noqa: E731
    q, k, v = draw(n), draw(m), draw(m)
    rows = slice(0, min(n, 512))  # the float64 truth of 512 queries is enough to find a wrong tile
    last = slice(max(0, n - 64), n)
    pick = lambda x: torch.cat([x[:, rows], x[:, last]], 1)  # noqa: E731
    truth = attention(pick(q).double(), k.double(), v.double())
    sdpa = lambda: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)
    plain = pick(sdpa())
    timed_tiles = tiles(m, d)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda t: t.program(d, "bf16").compile("sm_90a"), timed_tiles))
    # Scores of some thousands, larger in the keys that are walked last: a lazy maximum overflows.
    steep_k = (k.float() * torch.linspace(400, 40, m, device="cuda")[None, :, None, None]).to(k)
    steep_q = q * 10
    steep_truth = attention(pick(steep_q).double(), steep_k.double(), v.double())
    steep_plain = torch.nn.functional.scaled_dot_product_attention(
        pick(steep_q).transpose(1, 2), steep_k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)
    good, rows_out = {}, []
    for tile in timed_tiles:
        out = attention_sm90a(q, k, v, None, tile)
        result = parity.judge(pick(out), plain, truth)
        if result.passed:
            out = attention_sm90a(steep_q, steep_k, v, None, tile)
            result = parity.judge(pick(out), steep_plain, steep_truth)
        if not result.passed:
            rows_out.append({"tile": str(tile), "parity": str(result)})
            print(f"{name} {tile} {result}", flush=True)
            continue
        good[str(tile)] = lambda tile=tile: attention_sm90a(q, k, v, None, tile)

    def backend(which):
        def call():
            with sdpa_kernel(which):
                return sdpa()

        return call

    portable: dict[str, Any] = {
        "ptx sm_80": attention_mma.attention_sm80,
        "cuda": attention_mma.attention_cuda,
    }
    for label, run in portable.items():
        result = parity.judge(pick(run(q, k, v)), plain, truth)
        if result.passed:
            good[label] = lambda run=run: run(q, k, v)
        else:
            rows_out.append({"tile": label, "parity": str(result)})
            print(f"{name} {label} {result}", flush=True)
    peers = {
        "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "flash": backend(SDPBackend.FLASH_ATTENTION),
    }
    found: dict[str, dict[str, float]] = {}
    for kind in ("hot", "cold"):
        effort = harness.Effort(rounds=6, sample_us=600.0)
        timed = harness.measure({**peers, **good}, "cuda", cold=kind == "cold", effort=effort)
        found[kind] = medians = {key: t.median_us for key, t in timed.items()}
        best_peer = min(medians["cudnn"], medians["flash"])
        print(
            f"{name} {kind}: cudnn {medians['cudnn']:.1f} flash {medians['flash']:.1f} us",
            flush=True,
        )
        for us, key in sorted((us, key) for key, us in medians.items() if key not in peers):
            print(f"   {us:8.2f} us  {us / best_peer:.3f}  {key}", flush=True)
    return {"case": name, "time_us": found, "wrong": rows_out}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "attention", CASES, run_case, LIMIT_S))
