"""Tile sweep of attention_fp8 on a GPU: error against float64 first, then time beside bfloat16.

    python bench/sweeps/attention_fp8.py [CASE-SUBSTRING ...]  writes $OUT/sweep-attention-fp8.json

About 15 s a case, each in a process of its own with a time limit.
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
from mirage_hello.kernels import attention_fp8 as kernel
from mirage_hello.kernels.attention_fp8 import Tile, attention_fp8, quantize
from mirage_hello.kernels.attention_sm90a import attention_sm90a
from mirage_hello.reference import attention

LIMIT_S = 60
ALLOWED = 0.04  # tests/test_attention_fp8.py has the arithmetic
SMEM = 232448  # bytes a block may have on Hopper
# name: (B, H, N, M, D)
CASES = {
    "h16 8192x8192 d128": (1, 16, 8192, 8192, 128),
    "h16 8192x8192 d64": (1, 16, 8192, 8192, 64),
    "h8 1024x1024 d80": (1, 8, 1024, 1024, 80),
}


def tiles(d: int) -> list[Tile]:
    """Tiles worth timing, by what the first sweep said; docs/attention.md has it."""
    if d == 128:
        promoted = [Tile(2, 128, 3, promote=p) for p in (1, 4)]
        promoted.append(Tile(3, 96, 2, promote=4, sums_in_shared=True))
        short = [Tile(2, 160, 2), Tile(2, 192, 2), Tile(2, 224, 2), Tile(3, 96, 3)]
        short = [replace(t, promote=0) for t in short]
        found = in_turns(promoted + short)
        found += [replace(t, poly=1) for t in found if t.ping_pong == "scores"]
        found += [replace(t, v_turned=True) for t in in_turns([*promoted, short[1], short[3]])]
        wide = [Tile(2, n, 2, promote=4, sums_in_shared=True, v_turned=True) for n in (160, 192)]
        found += in_turns(wide) + in_turns([replace(short[1], q_registers=True)])
        ahead = [Tile(2, n, 3, promote=0, ahead=True) for n in (96, 128)]
        ahead.append(Tile(2, 96, 3, promote=4, sums_in_shared=True, ahead=True))
        found += [
            replace(t, poly=p, v_turned=v) for t in ahead for p in (0, 1) for v in (False, True)
        ]
    elif d == 64:
        base = [Tile(3, 96, 3), Tile(3, 96, 3, promote=4), Tile(2, 192, 2)]
        base += [Tile(3, 128, 3, promote=4, sums_in_shared=True), Tile(3, 128, 3, promote=0)]
        found = in_turns(base) + [replace(t, ping_pong="scores", poly=1) for t in base]
    else:
        found = [Tile(1, 128, 3), Tile(1, 96, 3), Tile(1, 192, 2), Tile(2, 128, 3), Tile(1, 64, 4)]
    return [t for t in found if t.smem_bytes(d) <= SMEM]


def in_turns(found: list[Tile]) -> list[Tile]:
    return [replace(t, ping_pong=p) for t in found for p in ("", "scores")]


def error(out: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return ((out.double() - truth).norm() / truth.norm()).item()


def draw(kind: str, shape: tuple) -> list[Tensor]:
    """q, k, v: "normal"; "mean 1" of v; "steep" scores, larger in the keys walked last."""
    b, h, n, m, d = shape
    q, k, v = (torch.randn(b, x, h, d, device="cuda") for x in (n, m, m))
    if kind == "mean 1":
        v += 1
    if kind == "steep":
        q *= 5
        k *= torch.linspace(20, 1, m, device="cuda")[None, :, None, None]
    return [q, k, v]


def errors(run: Callable, kind: str, shape: tuple) -> tuple[float, float]:
    """Of some rows: against the dequantised inputs, and against those before quantisation."""
    wide = draw(kind, shape)
    (q, qs), (k, ks), (v, vs) = (quantize(t) for t in wide)
    n = q.shape[1]

    def pick(x: Tensor) -> Tensor:
        return torch.cat([x[:, :384], x[:, max(384, n - 96) :]], 1)

    out = pick(run(q, k, v, qs, ks, vs))
    dequantised = kernel.reference(pick(q), k, v, qs, ks, vs)
    exact = attention(pick(wide[0]).double(), wide[1].double(), wide[2].double())
    return error(out, dequantised), error(out, exact)


def run_case(name: str) -> dict:
    shape = b, h, n, m, d = CASES[name]
    torch.manual_seed(0)
    found = tiles(d)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda t: t.program(d).compile("sm_90a"), found))
    wide = draw("normal", shape)
    (q, qs), (k, ks), (v, vs) = (quantize(t) for t in wide)
    turn_keys, turned = kernel.turn_keys, kernel.turn_keys(v)
    good, measured = {}, {}
    for tile in found:
        call = functools.partial(attention_fp8, tile=tile)

        kinds = ["normal", "steep"] + ["mean 1"] * (tile.promote or tile in found[:2])
        measured[str(tile)] = e = {kind: errors(call, kind, shape) for kind in kinds}
        if all(e[kind][0] < ALLOWED for kind in kinds[: 3 if tile.promote else 2]):
            good[str(tile)] = lambda call=call: call(q, k, v, qs, ks, vs)
        else:
            print(f"{name} {tile} wrong: {e}", flush=True)
    q16, k16, v16 = (t.bfloat16() for t in wide)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q16.transpose(1, 2), k16.transpose(1, 2), v16.transpose(1, 2)
            )

    peers = {"bf16": lambda: attention_sm90a(q16, k16, v16), "cudnn bf16": cudnn}
    peers["turn_keys"] = lambda: turn_keys(v)
    kernel.turn_keys = lambda v: turned  # which is timed apart
    timed = harness.measure({**peers, **good}, "cuda", effort=harness.Effort(6, 1500.0))
    kernel.turn_keys = turn_keys
    flops = 4 * b * h * n * m * d
    medians = {key: t.median_us for key, t in timed.items()}
    print(f"{name}: tflops, us, errors (dequantised, exact)", flush=True)
    for us, key in sorted((us, key) for key, us in medians.items()):
        said = [f"{kind} {e[0]:.4f} {e[1]:.4f}" for kind, e in measured.get(key, {}).items()]
        print(f"  {flops / us / 1e6:5.0f} {us:7.1f}  {key}  {', '.join(said)}", flush=True)
    return {"case": name, "time_us": medians, "errors": measured}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "attention-fp8", CASES, run_case, LIMIT_S))
