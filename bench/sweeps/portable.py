"""Sweep of the Triton, Numba and CuPy kernels on a GPU: parity on real shapes, then time.

    python bench/sweeps/portable.py [--quick]         writes $OUT/sweep-portable.json

Phase 1 checks every kernel and, for the matrix products, the best tiles by the model of
kernels/triton/tiles.py. Its workers run side by side: they mostly wait for compilers. Phase 2
times what passed, one op after the other, each in a process that finds the compiled kernels on
disk. A worker prints a line a result, so one that hangs costs its own case and what follows it.

(Not named triton.py: a script's folder comes first on the path of every sweep beside it.)
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from mirage_hello.bench import (
    attention,
    conv2d,
    elementwise,
    group_norm,
    harness,
    layer_norm,
    linear,
)
from mirage_hello.bench.case import Case, Draw
from mirage_hello.kernels import Kernel, ops, parity

OUT = Path(os.environ.get("OUT", "."))
WORKERS = 14
PARITY_LIMIT_S, TIME_LIMIT_S = 80, 25
TILES_PER_CASE = 5
BACKENDS = ("triton", "numba", "cupy")
REFUSALS = (RuntimeError, TypeError, ValueError, OutOfResources)
MATRIX_OPS = ("attention", "conv2d", "linear", "geglu")
CHECKED_ROWS = 512  # float64 scores of 8192 queries would take 8.6 GB
FAMILIES = {
    "attention": attention.CASES,
    "conv2d": conv2d.CASES,
    "linear": linear.CASES,
    "group_norm": group_norm.CASES,
    "layer_norm": layer_norm.CASES,
    "elementwise": elementwise.CASES,
}


def cases(quick: bool) -> dict[str, Case]:
    """`op case` -> Case."""
    every = [case for family in FAMILIES.values() for case in family]
    return {f"{case.op} {case.name}": case for case in every if case.quick or not quick}


# ------------------------------------------------------------------------------ contenders


def tiles_to_try(case: Case, args: tuple) -> list[Any]:
    """The chosen tile and the runners-up."""
    from mirage_hello.kernels.triton import attention as flash
    from mirage_hello.kernels.triton import device_of, tiles

    x, device = args[0], device_of(args[0])
    if case.op == "attention":
        batch, queries, heads, head_dim = x.shape
        chosen = flash.tiles_for(queries, args[1].shape[1], batch * heads, x, device)
        shapes = [(64, 4), (128, 8), (128, 4), (64, 8)]
        others = [
            flash.Tiles(block_m, block_n, warps, stages)
            for block_m, warps in shapes[: 3 if head_dim <= 64 else 2]
            for block_n in (64, 128)
            for stages in (2, 3)
        ]
        return [chosen, *(t for t in others if t != chosen)]
    if case.op == "conv2d":
        weight, stride, padding = args[1], args[3], args[4]
        window = weight.shape[2:]
        p, q = (
            (n + 2 * padding - w) // stride + 1 for n, w in zip(x.shape[2:], window, strict=True)
        )
        sizes = x.shape[0] * p * q, weight.shape[0], weight.shape[1]
        return shapes_of(tiles.ranked(*sizes, x.dtype, device, taps=window.numel()))
    n, k = args[1].shape
    sizes = x.numel() // k, n // 2 if case.op == "geglu" else n, k
    options = {"weights": 2, "splits": False} if case.op == "geglu" else {}
    return shapes_of(tiles.ranked(*sizes, x.dtype, device, **options))


def shapes_of(ranking: Sequence[Any]) -> list[Any]:
    """The best tile of each shape, then the second best split of the best shape."""
    best: dict[tuple[int, int], Any] = {}
    for tile in ranking:
        best.setdefault((tile.block_m, tile.block_n), tile)
    first = ranking[0]
    same = [t for t in ranking[1:] if (t.block_m, t.block_n) == (first.block_m, first.block_n)]
    return list(best.values())[:TILES_PER_CASE] + same[:1]


def contenders(case: Case, args: tuple) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, call) of every kernel of ours; for the matrix products one for each tile."""
    op = getattr(ops, case.op)
    call = op.describe(args, {})
    if case.op in MATRIX_OPS:
        from mirage_hello.kernels.triton import attention as attention_module
        from mirage_hello.kernels.triton import conv2d as conv2d_module
        from mirage_hello.kernels.triton import linear as linear_module

        modules = {"attention": attention_module, "conv2d": conv2d_module}
        run = getattr(modules.get(case.op, linear_module), case.op)
        for number, tile in enumerate(tiles_to_try(case, args)):
            name = "triton" if number == 0 else f"tile {number}"
            yield f"{name} {tile}", functools.partial(run, *args, tiles=tile)
        return
    for kernel in op.kernels:
        if kernel.backend in BACKENDS and kernel.refuses(call) is None:
            yield kernel.backend, functools.partial(kernel.run, *args)


def peers(case: Case, args: tuple) -> dict[str, Callable[[], Tensor]]:
    """torch's own kernel, and cuDNN's attention."""
    torch_run = getattr(ops, case.op).torch_kernel.run
    found = {"torch": lambda: torch_run(*args)}
    if case.op == "attention":

        def cudnn() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch_run(*args)

        found["cudnn"] = cudnn
    return found


def inputs(case: Case) -> tuple:
    return case.make(Draw("cuda", getattr(torch, case.dtypes[-1]), seed=1))


# ---------------------------------------------------------------------------------- workers


def check(case: Case) -> Iterator[dict]:
    """A row for each contender: passed or the numbers, or the error."""
    args = inputs(case)
    picked = args
    if case.op == "attention":
        q = args[0]
        rows = torch.arange(q.shape[1], device="cuda")
        rows = rows[(rows < CHECKED_ROWS) | (rows >= q.shape[1] - 64)]
        picked = (q[:, rows], *args[1:])
    with torch.no_grad(), parity.exact_float32():
        truth = getattr(ops, case.op).reference(*parity.in_float64(picked))
        plain = getattr(ops, case.op).torch_kernel.run(*picked)
        for name, run in contenders(case, args):
            row = {"case": f"{case.op} {case.name}", "name": name}
            try:
                out = run()
                out = out[:, rows] if case.op == "attention" else out
                result = parity.judge(out, plain, truth)
                yield row | {"passed": result.passed, "parity": str(result)}
            except REFUSALS as error:  # a tile that does not fit is a result, not the end
                yield row | {"passed": False, "parity": f"{type(error).__name__}: {error}"[:300]}


def samples(backend: str) -> Iterator[dict]:
    """Every op's small samples in every dtype: what the self-test runs at first use."""
    device = torch.device("cuda")
    for op in ops:
        for kernel in op.kernels:
            if kernel.backend == backend:
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    yield sample(op.name, kernel, device, dtype)


def sample(op_name: str, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> dict:
    row = {"case": f"{op_name} samples {dtype}", "name": kernel.name}
    try:
        reason = parity.self_test(getattr(ops, op_name), kernel, device, dtype)
        return row | {"passed": reason is None, "parity": reason or "passed"}
    except REFUSALS as error:
        return row | {"passed": False, "parity": f"{type(error).__name__}: {error}"[:300]}


def clock(case: Case, passed: set[str]) -> dict:
    """Median times of the peers and of what passed."""
    args = inputs(case)
    ours = {name: run for name, run in contenders(case, args) if name in passed}
    effort = harness.Effort(rounds=5, sample_us=300.0)
    timed = harness.measure({**peers(case, args), **ours}, "cuda", effort=effort)
    times = {name: timing.median_us for name, timing in timed.items()}
    how = {name: timing.how for name, timing in timed.items() if timing.how != "graph"}
    return {"case": f"{case.op} {case.name}", "time_us": times, "not_in_a_graph": how}


def worker(kind: str, names: list[str], quick: bool) -> None:
    """Print a JSON line for each result."""
    every = cases(quick)
    for name in names:
        if kind == "samples":
            for row in samples(name):
                print(json.dumps(row), flush=True)
        if kind == "parity":
            for row in check(every[name]):
                print(json.dumps(row), flush=True)
        if kind == "time":
            rows = json.loads((OUT / "sweep-portable.json").read_text())["parity"]
            passed = {row["name"] for row in rows if row["case"] == name and row["passed"]}
            print(json.dumps(clock(every[name], passed)), flush=True)
        torch.cuda.empty_cache()  # the workers share one GPU


# ------------------------------------------------------------------------------------- main


def start(kind: str, names: list[str], quick: bool) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", kind, json.dumps(names)]
    command += ["--quick"] if quick else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, limit_s: float) -> tuple[list[dict], str]:
    """(rows, "" or what went wrong), killing the worker at its limit."""
    try:
        out, errors = process.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        errors += f"\nkilled after {limit_s:.0f} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows, "" if process.returncode == 0 else errors.strip()[-600:]


def in_parallel(quick: bool) -> tuple[list[dict], list[str]]:
    """Phase 1: long cases are dealt out first, one to each worker in turn."""
    names = sorted(cases(quick), key=lambda name: not name.startswith(MATRIX_OPS))
    shares = [names[i::WORKERS] for i in range(WORKERS)]
    processes = [start("samples", [backend], quick) for backend in BACKENDS]
    processes += [start("parity", share, quick) for share in shares if share]
    deadline = time.monotonic() + PARITY_LIMIT_S
    results = [finish(process, deadline - time.monotonic()) for process in processes]
    return [row for rows, _ in results for row in rows], [error for _, error in results if error]


def table(row: dict) -> str:
    """`case: torch us, ours us (ratio), best tile` on one line."""
    times = row["time_us"]
    best_peer = min(us for name, us in times.items() if name in ("torch", "cudnn"))
    ours = {name: us for name, us in times.items() if name not in ("torch", "cudnn")}
    parts = [f"{name.split(' Tiles')[0]} {us:.1f}" for name, us in times.items() if us < 1e6]
    text = f"{row['case']:<44} {'  '.join(p for p in parts if not p.startswith('tile'))}"
    if ours:
        name = min(ours, key=lambda key: ours[key])
        text += f"   best / peer {ours[name] / best_peer:.2f} {name}"
    return text


def main() -> int:
    quick = "--quick" in sys.argv
    if "--worker" in sys.argv:
        at = sys.argv.index("--worker")
        worker(sys.argv[at + 1], json.loads(sys.argv[at + 2]), quick)
        return 0
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "times": []}
    report["parity"], report["errors"] = in_parallel(quick)
    failed = [row for row in report["parity"] if not row["passed"]]
    print(f"parity: {len(report['parity']) - len(failed)} passed, {len(failed)} failed")
    for row in failed:
        print(f"  {row['case']} {row['name']}: {row['parity']}")
    (OUT / "sweep-portable.json").write_text(json.dumps(report, indent=1))
    for family in FAMILIES.values():
        names = [f"{case.op} {case.name}" for case in family if case.quick or not quick]
        rows, error = finish(start("time", names, quick), TIME_LIMIT_S)
        report["times"] += rows
        report["errors"] += [error] if error else []
        print("\n".join(table(row) for row in rows), flush=True)
        (OUT / "sweep-portable.json").write_text(json.dumps(report, indent=1))
    for error in report["errors"]:
        print(f"ERROR {error}")
    return int(bool(failed or report["errors"]))


if __name__ == "__main__":
    sys.exit(main())
