"""Tile sweep of attention_fp8 on a GPU: error against float64 first, then time beside bfloat16.

    python bench/sweeps/attention_fp8.py [CASE-SUBSTRING ...]  writes $OUT/sweep-attention-fp8.json

About 25 s a case, each in a process of its own with a time limit.
"""

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels.attention_fp8 import (
    Tile,
    attention_fp8,
    choose_tile,
    quantize,
    quantize_values,
    reference,
)
from mirage_hello.kernels.attention_sm90a import attention_sm90a
from mirage_hello.reference import attention

LIMIT_S = 60
ALLOWED = 0.04  # tests/test_attention_fp8.py has the arithmetic
KINDS = ("normal", "steep", "mean 1", "halves")
SMEM = 232448  # bytes a block may have on Hopper
# name: (B, H, N, M, D)
CASES = {
    "h16 8192x8192 d128": (1, 16, 8192, 8192, 128),
    "h16 8192x8192 d64": (1, 16, 8192, 8192, 64),
    "h8 1024x1024 d80": (1, 8, 1024, 1024, 80),
}


def tiles(name: str) -> list[tuple[Tile, bool]]:
    """(tile, whether the last tiles are split along the keys) worth timing."""
    b, h, n, m, d = CASES[name]
    chosen = choose_tile(b * h, n, m, d)
    found = [(chosen, False), (chosen, True), (replace(chosen, promote=0), True)]
    if d == 128:
        found += [(replace(chosen, promote=p), True) for p in (4, 21)]
        found += [(replace(chosen, promote=4), False), (Tile(3, 96, 3, 0), True)]
        found += [(Tile(2, 224, 2, 0), True), (Tile(2, 128, 3, 8), True)]
    elif d == 64:
        found += [(replace(chosen, promote=1), False), (Tile(2, 128, 3, 8), True)]
        found += [(Tile(3, 64, 4, 16), True)]
    else:
        found += [(Tile(1, 64, 4, 16), False), (Tile(2, 128, 3, 8), False)]
    return [(t, split) for t, split in found if t.smem_bytes(d, split) <= SMEM]


def error(out: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return ((out.double() - truth).norm() / truth.norm()).item()


def draw(kind: str, shape: tuple) -> list[Tensor]:
    """q, k, v: "normal"; "mean 1" of v; "steep" scores, larger in the keys walked last; "halves":
    values of opposite mean, and queries that look at one of them."""
    b, h, n, m, d = shape
    q, k, v = (torch.randn(b, x, h, d, device="cuda") for x in (n, m, m))
    if kind == "mean 1":
        v += 1
    if kind == "steep":
        q *= 5
        k *= torch.linspace(20, 1, m, device="cuda")[None, :, None, None]
    if kind == "halves":
        sign = torch.where(torch.arange(m, device="cuda") < m // 2, 1.0, -1.0)[None, :, None, None]
        k += sign
        q += torch.where(torch.arange(n, device="cuda") % 2 == 0, 1.0, -1.0)[None, :, None, None]
        v += 3 * sign
    return [q, k, v]


def errors(run: Callable, kind: str, shape: tuple) -> tuple[float, float]:
    """Of some rows: against the dequantised inputs, and against those before quantisation."""
    wide = draw(kind, shape)
    (q, qs), (k, ks), values = quantize(wide[0]), quantize(wide[1]), quantize_values(wide[2])
    n = q.shape[1]

    def pick(x: Tensor) -> Tensor:
        return torch.cat([x[:, :384], x[:, max(384, n - 96) :]], 1)

    out = pick(run(q, k, values[0], qs, ks, *values[1:]))
    dequantised = reference(pick(q), k, values[0], qs, ks, *values[1:])
    exact = attention(pick(wide[0]).double(), wide[1].double(), wide[2].double())
    return error(out, dequantised), error(out, exact)


def run_case(name: str) -> dict:
    shape = b, h, n, m, d = CASES[name]
    torch.manual_seed(0)
    found = tiles(name)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda t: t[0].program(d, t[1]).compile("sm_90a"), found))
    wide = draw("normal", shape)
    (q, qs), (k, ks), (v, vs, mean) = *map(quantize, wide[:2]), quantize_values(wide[2])
    q16, k16, v16 = (t.bfloat16() for t in wide)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q16.transpose(1, 2), k16.transpose(1, 2), v16.transpose(1, 2)
            )

    def bf16() -> Tensor:
        return attention_sm90a(q16, k16, v16)

    flops = 4 * b * h * n * m * d
    times: dict[str, dict[str, float]] = {}

    def time(key: str, run: harness.Function, said: str = "") -> None:
        """Beside bfloat16, and printed at once: what hangs later takes nothing with it."""
        timed = harness.measure({"bf16": bf16, key: run}, "cuda", effort=harness.Effort(6, 1500.0))
        us = {name: t.median_us for name, t in timed.items()}
        times[key] = us
        ratio = us[key] / us["bf16"]
        print(
            f"  {flops / us[key] / 1e6:5.0f} {us[key]:7.1f} {ratio:.3f} {key}  {said}", flush=True
        )

    print(f"{name}: tflops, us, of our bf16; errors (dequantised, exact)", flush=True)
    time("cudnn bf16", cudnn)
    measured = {}
    for tile, split in found:
        key = f"{tile}{' split' * split}"
        call = functools.partial(attention_fp8, tile=tile, multiprocessors=None if split else 1)
        measured[key] = e = {kind: errors(call, kind, shape) for kind in KINDS}
        said = ", ".join(f"{kind} {one:.4f} {two:.4f}" for kind, (one, two) in e.items())
        if all(e[kind][0] < ALLOWED for kind in KINDS[: 4 if tile.promote else 3]):
            time(key, functools.partial(call, q, k, v, qs, ks, vs, mean), said)
        else:
            print(f"{name} {key} wrong: {said}", flush=True)
    return {"case": name, "time_us": times, "errors": measured}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "attention-fp8", CASES, run_case, LIMIT_S))
