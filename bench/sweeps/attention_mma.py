"""Tiles of attention.sm80 and the ladder of attention.cu on a GPU, beside flash and cuDNN.

    python bench/sweeps/attention_mma.py [CASE-SUBSTRING ...]  writes $OUT/sweep-attention-mma.json
    ncu ... python bench/sweeps/attention_mma.py --profile CASE     launches both kernels once

Parity first, also with scores of some thousands, which the lazy maximum has to notice. Each case
runs in a process of its own with a time limit, so a kernel that hangs costs little.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import attention_mma, parity
from mirage_hello.kernels.attention_mma import Tile, attention_sm80, choose_tile
from mirage_hello.ptx import cubin, loader
from mirage_hello.reference import attention

LIMIT_S = 60
# name: (B, H, N, M, D)
CASES = {
    "h8 4096x4096 d40": (1, 8, 4096, 4096, 40),
    "h10 4096x4096 d64": (1, 10, 4096, 4096, 64),
    "h16 8192x8192 d128": (1, 16, 8192, 8192, 128),
    "h5 4096x4096 d64": (1, 5, 4096, 4096, 64),
    "h8 1024x1024 d80": (1, 8, 1024, 1024, 80),
    "h20 1024x1024 d64": (1, 20, 1024, 1024, 64),
    "h8 256x256 d160": (1, 8, 256, 256, 160),
    "h8 4096x77 d40": (1, 8, 4096, 77, 40),
    "b2 h8 4096x4096 d40": (2, 8, 4096, 4096, 40),
    "h16 8192x8192 d64": (1, 16, 8192, 8192, 64),
    "h8 4096x16384 d64": (1, 8, 4096, 16384, 64),
}
LADDER_CASES = ("h8 4096x4096 d40", "h10 4096x4096 d64", "h16 8192x8192 d128")
# Steps of kernels/cuda/attention.cu, each on top of those above it
ONE = {"M_TILES": 1, "RESCALE_ABOVE": 0}
LADDER = {
    "plain copies, rows as they are": {**ONE, "SWIZZLE": 0, "ASYNC": 0},
    "swizzled rows": {**ONE, "ASYNC": 0},
    "cp.async into two buffers": ONE,
    "32 query rows a warp": {"M_TILES": 2, "RESCALE_ABOVE": 0},
    "as it is": {},  # rescaling only where needed; 16 rows a warp above head dimension 64
}
SMEM = 101376  # bytes a block may have on compute capability 8.6 and 8.9, the least of sm_80 on
MULTIPROCESSORS = 132  # of an H200


def tiles(n: int, heads: int, d: int) -> list[Tile]:
    """The chosen tile and its neighbours."""
    found = [choose_tile(d, n, heads, MULTIPROCESSORS), Tile(1, 32), Tile(1, 64), Tile(1, 16)]
    if d <= 128:
        found += [Tile(2, block_n, kept) for block_n in (32, 64) for kept in (2, 4, 16)]
    return [t for t in dict.fromkeys(found) if t.smem_bytes(d) <= SMEM]


@dataclass
class Inputs:
    """One case: q, k, v, and the float64 truth of its first and last queries."""

    q: Tensor
    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        # The truth of 512 + 64 queries is enough to find a wrong tile.
        self.some = self.pick(self.q)
        self.truth = attention(self.some.double(), self.k.double(), self.v.double())
        self.plain = sdpa(self.some, self.k, self.v)

    def pick(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :512], x[:, -64:]], 1)

    def judge(self, run: Callable[..., Tensor]) -> parity.Parity:
        return parity.judge(self.pick(run(self.q, self.k, self.v)), self.plain, self.truth)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def draw(name: str) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, m, d = CASES[name]
    q = torch.randn(b, n, h, d, device="cuda").bfloat16()
    k, v = (torch.randn(b, m, h, d, device="cuda").bfloat16() for _ in range(2))
    return q, k, v


def peer(which: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(which):
            return sdpa(q, k, v)

    return call


def contenders(name: str) -> dict[str, tuple[loader.Program, Callable[..., Tensor]]]:
    """label -> (program, function of q, k, v)."""
    b, h, n, _, d = CASES[name]
    found: dict[str, tuple[loader.Program, Callable[..., Tensor]]] = {}
    for tile in tiles(n, b * h, d):
        run = lambda q, k, v, tile=tile: attention_sm80(q, k, v, None, tile)  # noqa: E731
        found[str(tile)] = tile.program(d, "bf16"), run
    for step, switches in LADDER.items():
        if switches and name not in LADDER_CASES:
            continue
        run = lambda q, k, v, s=switches: attention_mma.attention_cuda(q, k, v, **s)  # noqa: E731
        program = attention_mma.cuda_source(d, torch.bfloat16, **switches)
        found[f"cuda: {step}"] = program, run
    return found


def run_case(name: str) -> dict:
    every = contenders(name)
    with ThreadPoolExecutor(16) as pool:
        cubins = pool.map(lambda c: c[0].compile(loader.device_arch(0)), every.values())
        about = dict(zip(every, map(cubin.resources, cubins), strict=True))
    q, k, v = draw(name)
    # Scores of some thousands, larger in the keys that are walked last: a lazy maximum overflows.
    slope = torch.linspace(400, 40, k.shape[1], device="cuda")[None, :, None, None]
    trials = (Inputs(q, k, v), Inputs(q * 10, (k.float() * slope).to(k), v))
    good, wrong = {}, {}
    for label, (_, run) in every.items():
        results = [trial.judge(run) for trial in trials]
        same = torch.equal(run(q, k, v), run(q, k, v))
        if same and all(r.passed for r in results):
            good[label] = lambda run=run: run(q, k, v)
        else:
            wrong[label] = f"same bits: {same}; {'; '.join(map(str, results))}"
            print(f"{name} WRONG {label}: {wrong[label]}", flush=True)
    peers = {
        "flash": peer(SDPBackend.FLASH_ATTENTION, q, k, v),
        "cudnn": peer(SDPBackend.CUDNN_ATTENTION, q, k, v),
    }
    effort = harness.Effort(rounds=5, sample_us=300.0)
    timed = harness.measure({**peers, **good}, "cuda", effort=effort)
    us = {label: t.median_us for label, t in timed.items()}
    report(name, us, about)
    return {"case": name, "time_us": us, "registers_and_stack": about, "wrong": wrong}


def report(name: str, us: dict[str, float], about: dict[str, tuple[int, int]]) -> None:
    b, h, n, m, d = CASES[name]
    print(f"{name}: flash {us['flash']:.2f} cudnn {us['cudnn']:.2f} us", flush=True)
    ranked = sorted((x for x in about if x in us), key=us.__getitem__)
    shown = [x for x in ranked if not x.startswith("cuda")][:7]
    chosen = str(choose_tile(d, n, b * h, MULTIPROCESSORS))
    shown += [chosen] * (chosen in us and chosen not in shown)
    shown += [x for x in about if x.startswith("cuda") and x in us]
    for label in shown:
        registers, stack_bytes = about[label]
        rate = 4 * b * h * n * m * d / us[label] / 1e6
        print(
            f"  {us[label]:8.2f} us {us[label] / us['flash']:.3f} of flash {rate:4.0f} TFLOP/s  "
            f"{registers} registers, {stack_bytes} B stack  {label}"
            f"{' <- chosen' * (label == chosen)}",
            flush=True,
        )


def profile(name: str) -> int:
    q, k, v = draw(name)
    attention_sm80(q, k, v)
    attention_mma.attention_cuda(q, k, v)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--profile"]:
        sys.exit(profile(sys.argv[2]))
    sys.exit(runner.main(__file__, "attention-mma", CASES, run_case, LIMIT_S))
