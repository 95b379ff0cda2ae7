"""Tiles of the 880m's U-Net, each timed in the captured step:
`python3.12 bench/sweeps/frame_tiles.py OUT.json [SECONDS [NEAR BEST [CHOSEN.json | folded]]]`.

First other ways of the layers, then place by place, the heaviest first, until SECONDS are over
(default 110): at most NEAR tiles that differ in one field and the BEST by the model (6, 6). A
tile counts if the recorded call is right with it, twice the same, and the step is. A fresh process
goes on without the tile that hung or crashed the last one; every place is written as it ends.
CHOSEN.json: results of an earlier run, whose tiles are taken first. folded: with shortcuts in the
second convolution of their block, whose tiles alone are timed.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_hello.bench import model_calls, step_tiles, tune
from mirage_hello.kernels import tuning, use
from mirage_hello.kernels.parity import exact_float32
from mirage_hello.model import build
from mirage_hello.model.ways import Ways, going, ways

WAYS: dict[str, dict[str, Any]] = {
    "shortcuts apart": {"shortcuts": False},
    "shortcuts folded": {"shortcuts": True},
    "no merged products": {"merges_from": 2**31},
    "products merged from 640": {"merges_from": 640},
    "sums from 32x32": {"sums_from": 1024},
}
PRESET, SIZE, RESTARTS = "880m", 64, 3  # of the latents of 512 x 512 pixels
GRACE_S = 20  # of a process past its time


def drawn(device: str = "cuda") -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """The U-Net in bfloat16; what it is given: x, level, context; and its output in float32."""
    truth_unet = build(PRESET, 0, torch.float32, device)[0].unet
    config = truth_unet.config
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = draw(1, config.in_channels, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    level, context = draw(1), draw(1, config.context_tokens, config.context_dim)
    with torch.no_grad(), use("torch"), exact_float32():
        truth = truth_unet(x, level, context).double()
    del truth_unet
    unet = build(PRESET, 0, torch.bfloat16, device)[0].unet
    return unet, x.bfloat16(), level, context.bfloat16(), truth


def network(device: str = "cuda") -> tuple[Callable[[], Tensor], Callable[[Tensor], str | None]]:
    """The step with prepared conditions, and what is wrong with an output of it."""
    unet, x, level, context, truth = drawn(device)

    def error(y: Tensor) -> float:
        return ((y.double() - truth).norm() / truth.norm()).item()

    with torch.no_grad():
        with use("torch"):
            allowed = 2 * error(unet(x, level, context))
        biases, keys = unet.noise_biases(level), unet.context_keys(context, lasting=True)

    def wrong(y: Tensor) -> str | None:
        found = error(y)
        return None if found <= allowed else f"the step's error is {found:.2e} of {allowed:.2e}"

    return lambda: unet(x, biases, keys), wrong


def whole_ways(step: step_tiles.Step, pool: Any) -> dict[str, float]:
    """Microseconds that other ways of the layers add to the step, with the tiles that they have."""
    graphs = {"now": step.captured({}, pool), "twin": step.captured({}, pool)}
    for name, change in WAYS.items():
        with going(Ways(**change)):
            step.with_tiles({})
            graphs[name] = step.captured({}, pool)
    times = step_tiles.replays_us(graphs, 40)
    now = times.pop("now")
    found = {n: statistics.median(map(float.__sub__, t, now)) for n, t in times.items()}
    return {"now": statistics.median(now), **found}


def right(
    step: step_tiles.Step, place: step_tiles.Place, tiles: list[Any], called: tune.Called,
    wrong: Callable[[Tensor], str | None], begin: Callable[[Any], None],
) -> tuple[list[Any], dict[str, str]]:  # fmt: skip
    """The tiles that may be timed, and why the others may not."""
    tuned, good, bad = tune.Tuned(called, step.requests[place], 0), [], {}
    for tile in tiles:
        begin(tile)
        problem = tuned.problem(tile)
        if problem is None:  # also for what depends on a tile: sums of rows have its width
            problem = wrong(step.with_tiles({place: tile}))
        if problem is None:
            good.append(tile)
        else:
            bad[tuning.name(tile)] = problem
    return good, bad


@torch.no_grad()
def measure(out: Path, seconds: float, near: int, best: int, chosen: Path | None) -> None:
    started = time.perf_counter()
    run, wrong = network()
    with model_calls.recorded() as calls:
        run()
    step = step_tiles.Step(run)
    results: dict[str, Any] = {"ways": {}, "places": [], "lost": []}
    if out.exists():
        results = json.loads(out.read_text())
    for earlier in (json.loads(chosen.read_text()) if chosen else {"places": []}, results):
        step.take({(p["op"], p["key"]): p["tile"] for p in earlier["places"]})
    before = dict(step.tiles)
    pool = torch.cuda.graph_pool_handle()
    keeper = step.captured({}, pool)  # while it lives, graphs find the pool's memory where it was
    step_tiles.still()
    print(
        f"{len(step.tiles)} places, begun after {time.perf_counter() - started:.0f} s", flush=True
    )
    if not results["ways"]:
        results["ways"] = whole_ways(step, pool)
        print(json.dumps(results["ways"]), flush=True)
        out.write_text(json.dumps(results))
    done = {(p["op"], p["key"]) for p in results["places"]}
    places = [p for p in step.heaviest() if p not in done and p in calls]
    if ways().shortcuts:
        places = [p for p in places if " short=" in p[1]]
    candidates = {p: step.candidates(p, near, best) for p in places}
    step_tiles.compile_all(step, candidates)
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
    for place in places:
        if time.perf_counter() - started > seconds:
            break
        lost = {name for *at, name in results["lost"] if tuple(at) == place}
        tiles = [t for t in candidates[place] if tuning.name(t) not in lost]

        def begin(tile: Any, place: step_tiles.Place = place) -> None:
            out.with_suffix(".now").write_text(json.dumps([*place, tuning.name(tile)]))

        run_, args, kwargs = calls[place]
        judge = model_calls.held_against_its_own(run_, args, kwargs)
        called = tune.Called({}, run_, args, kwargs, judge)
        good, bad = right(step, place, tiles, called, wrong, begin)
        found = step_tiles.best(step, place, good, pool) if len(good) > 1 else {}
        found = {"op": place[0], "key": place[1], "calls": step.calls[place], **found, "wrong": bad}
        found |= {"was": tuning.encoded(before[place])}
        results["places"].append(found)
        out.write_text(json.dumps(results, indent=1))
        three = list(found.get("effects_us", {}).items())[:3]
        print(f"{found.get('effect_us', 0):7.2f} us {place} {three} {len(bad)} wrong", flush=True)
    graphs = {
        "now": keeper,
        "before": step.captured(before, pool),
        "after": step.captured({}, pool),
    }
    results["step_us"] = step_tiles.replays_us(graphs, 100)
    results["ways_after"] = whole_ways(step, pool)
    results["seconds"] = time.perf_counter() - started
    out.write_text(json.dumps(results, indent=1))
    medians = {name: statistics.median(us) for name, us in results["step_us"].items()}
    print(medians, results["ways_after"], f"{results['seconds']:.0f} s", flush=True)


def main(out: str, seconds: str = "110", near: str = "6", best: str = "6", *chosen: str) -> int:
    """Runs the measuring process again, without what it was at, while it is lost."""
    path, begun = Path(out), time.time()
    path.unlink(missing_ok=True)
    for _ in range(RESTARTS):
        left = float(seconds) - (time.time() - begun)
        command = [sys.executable, __file__, "--measure", out, str(left), near, best, *chosen]
        try:
            if not subprocess.run(command, timeout=left + GRACE_S, check=False).returncode:
                return 0
        except subprocess.TimeoutExpired:
            print("timed out", flush=True)
        at = path.with_suffix(".now")
        if not path.exists() or not at.exists():
            return 1
        results = json.loads(path.read_text())
        results["lost"].append(json.loads(at.read_text()))
        path.write_text(json.dumps(results))
        print(f"lost {results['lost'][-1]}", flush=True)
    return 1


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        target, limit, *counts = sys.argv[2:]
        earlier = Path(counts[2]) if len(counts) > 2 and counts[2] != "folded" else None
        with going(Ways(shortcuts="folded" in counts)):
            measure(Path(target), float(limit), int(counts[0]), int(counts[1]), earlier)
        sys.exit(0)
    sys.exit(main(*sys.argv[1:]))
