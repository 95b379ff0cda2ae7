"""Random calls of the hand-written attention kernels against the float64 reference, on a GPU.

    python bench/sweeps/attention_fuzz.py [CASES [SECONDS]]    10000 cases, at most 90 s

Lengths, head dimensions, dtypes, layouts, scales and magnitudes are drawn from a printed seed;
each case goes to one kernel in turn. Every second one is for sm_90a, with a tile drawn from all
that its launcher knows for the head dimension, also those meant for much larger calls. Prints
every failure and exits with 1 if there is one. Writes $OUT/attention-fuzz.json.
"""

import functools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.kernels import attention_mma, parity
from mirage_hello.kernels.attention import attention_torch
from mirage_hello.kernels.attention_sm90a import SHORT_NAME, Tile, attention_sm90a, choose_tile
from mirage_hello.reference import attention

# Not cuDNN, which plans anew for every shape: with it a case took 54 ms.
PLAIN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HEAD_DIMS = (8, 40, 64, 72, 80, 128, 160, 256)
DTYPES = (torch.bfloat16, torch.float16)
# heads x batch, queries, keys: one of each kind of call that choose_tile tells apart
CALLS = [
    (4, 400, 1),
    (4, 400, 400),
    (8, 256, 256),
    (8, 1024, 1024),
    (8, 4096, 77),
    (64, 1024, 1024),
    (16, 4096, 4096),
    (16, 8192, 8192),
]
KERNELS: dict[str, Callable[..., Tensor]] = {
    "ptx/sm_90a": attention_sm90a,
    "ptx/sm_80": attention_mma.attention_sm80,
    "ptx/sm_90a again": attention_sm90a,
    "cuda": attention_mma.attention_cuda,
}


@functools.cache
def tiles(head_dim: int, dtype: torch.dtype) -> list[Tile]:
    return sorted({choose_tile(*call, head_dim, dtype) for call in CALLS}, key=str)


def draw(rng: random.Random) -> dict:
    """The parameters of one case; half of the lengths are at the edges of tiles."""

    def length() -> int:
        near = rng.choice((1, 2, 16, 63, 64, 65, 77, 127, 128, 129, 192, 255, 256, 257))
        return near if rng.random() < 0.5 else rng.randint(1, 400)

    return {
        "batch": rng.randint(1, 2),
        "heads": rng.randint(1, 3),
        "queries": length(),
        "keys": length(),
        "head_dim": rng.choice(HEAD_DIMS),
        "dtype": rng.choice(DTYPES),
        "scale": rng.choice((None, None, 0.1, 1.0, -0.3, 0.0)),
        "magnitude": rng.choice((1.0, 1.0, 1e-2, 10.0, 60.0)),  # 60: scores of some 1e4
        "dominating": rng.random() < 0.2,
        "fused": rng.random() < 0.5,
    }


def tensors(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, h, d, dtype = case["batch"], case["heads"], case["head_dim"], case["dtype"]
    n, m = case["queries"], case["keys"]
    qkv = torch.randn(b, max(n, m), 3, h, d, device="cuda") * case["magnitude"] ** 0.5
    qkv[:, :, 2] = torch.randn_like(qkv[:, :, 2])
    if case["dominating"]:
        qkv[:, m // 2, 1] *= 30
    q, k, v = qkv.to(dtype).unbind(2)
    q, k, v = q[:, :n], k[:, :m], v[:, :m]
    return (q, k, v) if case["fused"] else (q.contiguous(), k.contiguous(), v.contiguous())


def compile_all() -> None:
    """Every program the cases need, on all cores, before the clock starts."""
    jobs = []
    for d in HEAD_DIMS:
        for dtype in DTYPES:
            kind = attention_mma.ELEMENT[dtype][1]
            jobs.append(attention_mma.choose_tile(d, 400, 4, 132).program(d, kind))
            jobs.append(attention_mma.cuda_source(d, dtype))
            jobs += [tile.program(d, SHORT_NAME[dtype]) for tile in tiles(d, dtype)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda program: program.compile("sm_90a"), set(jobs)))


def main() -> int:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 90.0
    seed = int(time.time())
    print("seed", seed, flush=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    compile_all()
    begin, failures, done = time.perf_counter(), [], 0
    names = list(KERNELS)
    while done < wanted and time.perf_counter() - begin < seconds:
        case, name = draw(rng), names[done % len(names)]
        q, k, v = tensors(case)
        truth = attention(q.double(), k.double(), v.double(), case["scale"])
        with sdpa_kernel(PLAIN):
            plain = attention_torch(q, k, v, case["scale"])
        options = {}
        if KERNELS[name] is attention_sm90a:
            case["tile"] = options["tile"] = rng.choice(tiles(case["head_dim"], case["dtype"]))
        result = parity.judge(KERNELS[name](q, k, v, case["scale"], **options), plain, truth)
        if not result.passed:
            failures.append({"kernel": name, **{key: str(x) for key, x in case.items()}})
            print(name, case, result, flush=True)
        done += 1
    elapsed = time.perf_counter() - begin
    print(f"{done} cases, {len(failures)} failed, {elapsed:.0f} s")
    with open(f"{os.environ.get('OUT', '.')}/attention-fuzz.json", "w") as f:
        report = {"seed": seed, "cases": done, "seconds": elapsed, "failures": failures}
        json.dump(report, f, indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
