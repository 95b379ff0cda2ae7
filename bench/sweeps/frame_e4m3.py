"""The 880m's step in e4m3: which layers, how much faster, how far from float32.

python3.12 bench/sweeps/frame_e4m3.py OUT.json                            about 60 s
python3.12 bench/sweeps/frame_e4m3.py tiles OUT.json [SECONDS [NEAR BEST [CHOSEN.json]]]

The first captures the step with prepared conditions in bfloat16 and with each set of layers in
e4m3, replays them in turn, and says where the time of the fastest goes. The second times tiles in
the captured step in e4m3, place by place, as frame_tiles.py does in bfloat16.
"""

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_hello.bench import frame_profile, harness
from mirage_hello.bench.sweeps import frame_tiles
from mirage_hello.bench.tune import unlaunched
from mirage_hello.model import fp8
from mirage_hello.model.ways import Ways, going

EFFORT = harness.Effort(rounds=24, sample_us=2000.0)
# What multiplies in e4m3, each with all above it.
SETS = {
    "bf16": None,
    "convolutions, second feed-forward": Ways(e4m3_rows=False, e4m3_merges=False),
    "rows": Ways(e4m3_merges=False),
    "merged products": Ways(e4m3_raw=False),
    "shortcuts, down, up": Ways(e4m3_raw=True),
    "the same, shortcuts folded": Ways(e4m3_raw=True, shortcuts=True),
}
# Against the tiles' step (`Ways()`).
WAYS = {
    "shortcuts, down, up in bfloat16": {"e4m3_raw": False},
    "shortcuts folded": {"shortcuts": True},
    "no merged products": {"e4m3_merges": False},
}


@dataclasses.dataclass
class Network:
    """The U-Net, what it is given, and its output in float32."""

    unet: Any
    x: Tensor
    level: Tensor
    context: Tensor
    truth: Tensor

    def error(self, y: Tensor) -> float:
        return ((y.double() - self.truth).norm() / self.truth.norm()).item()

    def calibrated(self) -> dict[str, float]:
        """Scales of what every layer reads of this input."""
        with fp8.noted() as maxima:
            self.unet(self.x, self.level, self.unet.context_keys(self.context, lasting=True))
        return fp8.scales_for(self.unet, maxima)

    def step(self, scales: dict[str, float]) -> Callable[[], Tensor]:
        """The step of a copy of its own, so that no other changes what it made of its weights."""
        unet = copy.deepcopy(self.unet)
        fp8.use(unet, scales)
        biases = unet.noise_biases(self.level)
        keys = unet.context_keys(self.context, lasting=True)
        return lambda: unet(self.x, biases, keys)


@torch.no_grad()
def compare(out: Path, device: str = "cuda") -> int:
    started = time.perf_counter()
    of = Network(*frame_tiles.drawn(device))
    scales = of.calibrated()
    print(f"{len(scales)} layers calibrated, {time.perf_counter() - started:.0f} s", flush=True)
    made = {name: set_of(of, ways, scales) for name, ways in SETS.items()}
    compile_all(made.values(), device)
    print(f"compiled, {time.perf_counter() - started:.0f} s", flush=True)
    steps, results = {}, dict[str, Any]()
    for name, step in made.items():
        y, again = step(), step()
        results[name] = {"error": of.error(y), "same_bits": torch.equal(y, again)}
        print(f"{name}: {results[name]}, {time.perf_counter() - started:.0f} s", flush=True)
        if results[name]["error"] < 0.3:
            steps[name] = step
    out.write_text(json.dumps(results, indent=1))
    timed = harness.measure(steps, device, effort=EFFORT)
    for name, found in timed.items():
        results[name] |= found.percentiles_us
        if found.output is not None:
            results[name]["error_replayed"] = of.error(found.output)
        print(f"{found.median_us:8.1f} us  {results[name]['error']:.2e}  {name}", flush=True)
    out.write_text(json.dumps(results, indent=1))
    if device == "cuda":
        results["profile"] = {name: profiled(steps[name]) for name in steps}
    out.write_text(json.dumps(results, indent=1))
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    return 0


def set_of(of: Network, ways: Ways | None, scales: dict[str, float]) -> Callable[[], Tensor]:
    """The step with these layers in e4m3; None: in bfloat16."""
    taken = ways or Ways()
    with going(taken):
        step = of.step(scales if ways else {})

    def run() -> Tensor:
        with going(taken):
            return step()

    return run


def compile_all(steps: Iterable[Callable[[], object]], device: str) -> None:
    """Every kernel of the steps on every core, before the first of them runs alone."""
    if device != "cuda":
        return
    with unlaunched() as programs:
        for step in steps:
            step()
    with ThreadPoolExecutor(16) as pool:  # ptxas is a process of its own
        list(pool.map(lambda program: program.compile("sm_90a"), programs))


def profiled(step: Callable[[], Tensor]) -> dict[str, Any]:
    """Microseconds of every kernel of the captured step, as the profiler takes them apart."""
    graph = harness.capture(step)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    found = frame_profile.profile(run, 10)
    for kernel in found["kernels"][:16]:
        print(f"  {kernel['us']:7.1f} us {kernel['calls']:4.0f} x {kernel['name']}", flush=True)
    return found


@torch.no_grad()
def in_e4m3(device: str = "cuda") -> tuple[Callable[[], Tensor], Callable[[Tensor], str | None]]:
    """frame_tiles.network in e4m3: 1.1 times the error of the tiles in use is allowed."""
    of = Network(*frame_tiles.drawn(device))
    step = of.step(of.calibrated())
    allowed = 1.1 * of.error(step())

    def wrong(y: Tensor) -> str | None:
        found = of.error(y)
        return None if found <= allowed else f"the step's error is {found:.2e} of {allowed:.2e}"

    return step, wrong


if __name__ == "__main__":
    if sys.argv[1] in ("tiles", "--measure"):
        frame_tiles.network, frame_tiles.__file__, frame_tiles.WAYS = in_e4m3, __file__, WAYS
        if sys.argv[1] == "tiles":
            sys.exit(frame_tiles.main(*sys.argv[2:]))
        target, limit, *counts = sys.argv[2:]
        earlier = Path(counts[2]) if len(counts) > 2 else None
        with torch.no_grad():
            frame_tiles.measure(Path(target), float(limit), int(counts[0]), int(counts[1]), earlier)
        sys.exit(0)
    sys.exit(compare(Path(sys.argv[1])))
