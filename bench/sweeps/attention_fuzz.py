"""Random calls of the hand-written attention kernels against the float64 reference, on a GPU.

    python bench/sweeps/attention_fuzz.py [CASES [SECONDS]]    10000 cases, at most 90 s

Lengths, head dimensions, dtypes, layouts, scales and magnitudes are drawn from a printed seed;
each case goes to one kernel in turn. Every second one is for sm_90a, with a tile drawn from all
of its candidates, also those meant for much larger calls. A case is
some dozens of small kernels and the host's work between them, so WORKERS processes share the card.
Prints every failure and exits with 1 if there is one, or if a worker did not end.
Writes $OUT/attention-fuzz.json.
"""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.kernels import attention_mma, parity
from mirage_hello.kernels.attention import attention_torch
from mirage_hello.kernels.attention_sm90a import SHORT_NAME, Tile, attention_sm90a, candidates
from mirage_hello.reference import attention

WORKERS = 10
GRACE_S = 30  # what a worker may take to start, beyond its own seconds
# Not cuDNN, which plans anew for every shape: with it a case took 54 ms.
PLAIN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HEAD_DIMS = (8, 40, 64, 72, 80, 128, 160, 256)
DTYPES = (torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., Tensor]] = {
    "ptx/sm_90a": attention_sm90a,
    "ptx/sm_80": attention_mma.attention_sm80,
    "ptx/sm_90a again": attention_sm90a,
    "cuda": attention_mma.attention_cuda,
}


@functools.cache
def tiles(keys: int, head_dim: int, dtype: torch.dtype) -> list[Tile]:
    """Of few keys also those that walk blocks of keys, which such calls are not given."""
    found = candidates(keys, head_dim, dtype) + candidates(400, head_dim, dtype)
    return list(dict.fromkeys(found))


def draw(rng: random.Random) -> dict:
    """The parameters of one case; half of the lengths are at the edges of tiles."""

    def length() -> int:
        near = rng.choice((1, 2, 16, 63, 64, 65, 77, 127, 128, 129, 192, 255, 256, 257))
        return near if rng.random() < 0.5 else rng.randint(1, 400 if rng.random() < 0.9 else 2000)

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
            every = {tile for keys in (16, 100, 400) for tile in tiles(keys, d, dtype)}
            jobs += [tile.program(d, SHORT_NAME[dtype]) for tile in every]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda program: program.compile("sm_90a"), set(jobs)))


def work(seed: int, wanted: int, seconds: float, report: Path) -> None:
    """Run `wanted` cases of one seed, fewer if the time ends, and write what was found."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    begin, failures, counts = time.perf_counter(), [], Counter[str]()
    names = list(KERNELS)
    while counts.total() < wanted and time.perf_counter() - begin < seconds:
        case, name = draw(rng), names[counts.total() % len(names)]
        q, k, v = tensors(case)
        truth = attention(q.double(), k.double(), v.double(), case["scale"])
        with sdpa_kernel(PLAIN):
            plain = attention_torch(q, k, v, case["scale"])
        options = {}
        if KERNELS[name] is attention_sm90a:
            case["tile"] = options["tile"] = rng.choice(
                tiles(case["keys"], case["head_dim"], case["dtype"])
            )
        result = parity.judge(KERNELS[name](q, k, v, case["scale"], **options), plain, truth)
        if not result.passed:
            failures.append({"kernel": name, **{key: str(x) for key, x in case.items()}})
            print(name, case, result, flush=True)
        counts[name] += 1
    report.write_text(json.dumps({"seed": seed, "cases": counts, "failures": failures}))


def share(seed: int, wanted: int, seconds: float) -> tuple[list[dict], int]:
    """The reports of WORKERS processes, and how many did not end well."""
    begin, reports, lost = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(WORKERS):
            path = Path(folder, f"{i}.json")
            words = ["--work", seed + i, (wanted + i) // WORKERS, seconds, path]
            running.append((subprocess.Popen([sys.executable, __file__, *map(str, words)]), path))
        for process, path in running:
            try:
                process.wait(max(1.0, begin + seconds + GRACE_S - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if path.exists():
                reports.append(json.loads(path.read_text()))
            else:
                lost += 1
    return reports, lost


def main() -> int:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 90.0
    seed = int(time.time())
    print("seeds", seed, "to", seed + WORKERS - 1, flush=True)
    compile_all()
    begin = time.perf_counter()
    reports, lost = share(seed, wanted, seconds)
    elapsed = time.perf_counter() - begin
    failures = [failure for report in reports for failure in report["failures"]]
    kernels: Counter[str] = sum((Counter(r["cases"]) for r in reports), Counter())
    cases = kernels.total()
    print(
        f"{cases} cases, {len(failures)} failed, {lost} workers lost, {elapsed:.0f} s", flush=True
    )
    found = {"seed": seed, "workers": WORKERS, "cases": cases, "kernels": kernels}
    found |= {"seconds": elapsed, "lost": lost, "failures": failures}
    with open(f"{os.environ.get('OUT', '.')}/attention-fuzz.json", "w") as f:
        json.dump(found, f, indent=1)
    return 1 if failures or lost or cases < wanted else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]))
        sys.exit(0)
    sys.exit(main())
