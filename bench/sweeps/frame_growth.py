"""How a frame grows, how steady it is and how far it drifts from the plain model:
`python3.12 bench/sweeps/frame_growth.py OUT.json [CASE ...]`.

    parity    error of the pictures after 1 and after 100 frames in closed loop, against float32
    long      10,000 frames of the 880m at 512x512: percentiles, the host's own time, the rate
    sizes, sizes_391m
              880m and 391m at 512x512, 768x432 and 1024x576, with and without guidance, and at 1 to
              4 steps: frame, plan, seconds to build
    swap      frames while another size is prepared, and the first one of it
    full      a plan is built while the card is full
    batch     880m's U-Net at batch 1 to 8

Every case runs in a process of its own.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
import unittest.mock
from typing import Any

import numpy as np
import torch

from mirage_hello.bench import bus, harness
from mirage_hello.kernels import use
from mirage_hello.kernels.parity import ROUNDING, exact_float32
from mirage_hello.model import FrameStream, budget, build

SIZES = {"512x512": (512, 512), "768x432": (432, 768), "1024x576": (576, 1024)}
LIMIT_S = 120


def clip(size: tuple[int, int], count: int = 8) -> np.ndarray:
    """Frames that change smoothly: a drifting pattern and a little noise."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    frames = [np.stack([x + 9 * i, y + 5 * i, x + y], -1) / 3 % 256 for i in range(count)]
    return np.stack([f + draw.normal(0, 4, f.shape) for f in frames]).clip(0, 255).astype(np.uint8)


def played(frames: np.ndarray, count: int) -> list[np.ndarray]:
    return [frames[i % len(frames)] for i in range(count)]


def pushed_us(stream: FrameStream, frames: np.ndarray, count: int) -> dict[str, float]:
    spans = []
    for frame in played(frames, count):
        begin = time.perf_counter()
        stream.push(frame)
        spans.append((time.perf_counter() - begin) * 1e6)
    p10, p50, p90, p99 = np.percentile(spans, (10, 50, 90, 99))
    return {"p10": p10, "p50": p50, "p90": p90, "p99": p99, "worst": max(spans), "frames": count}


def plan_of(stream: FrameStream) -> dict[str, Any]:
    record, plan = stream.record(), stream.plan
    return {
        "launches": len(record.launches),
        "hand_written": sum(launch.grid is not None for launch in record.launches),
        "arena_mib": plan.arena_bytes / 2**20 if plan else 0,
        "peak_mib": record.peak_bytes / 2**20,
    }


def parity() -> dict:
    frames, count = clip((512, 512)), 100

    def pictures(stream: FrameStream) -> tuple[np.ndarray, np.ndarray]:
        outputs = [stream.push(frame) for frame in played(frames, count)]
        return outputs[0].astype(np.float64), outputs[-1].astype(np.float64)

    with exact_float32():
        pair = build("880m", 0, torch.float32, "cuda")
        truth = pictures(FrameStream(*pair, policy="torch", arena=False))
    pair = build("880m", 0, torch.bfloat16, "cuda")
    ways = {
        "plain": FrameStream(*pair, policy="torch", arena=False),
        "ours": FrameStream(*pair),
        "again": FrameStream(*pair),
    }
    found = {name: pictures(stream) for name, stream in ways.items()}
    result: dict = {"two plans have the same bits": True}
    for i, moment in enumerate(("1 frame", "100 frames")):
        norm = np.linalg.norm(truth[i])
        error = {n: np.linalg.norm(p[i] - truth[i]) / norm for n, p in found.items()}
        allowed = 2 * error["plain"] + ROUNDING[torch.uint8]
        result[moment] = {**error, "allowed": allowed, "passed": bool(error["ours"] <= allowed)}
        result["two plans have the same bits"] &= bool(
            (found["ours"][i] == found["again"][i]).all()
        )
    return result


def long() -> dict:
    frames = clip((512, 512))
    stream = FrameStream(*build("880m", 0, torch.bfloat16, "cuda"), size=(512, 512))
    pushed_us(stream, frames, 50)
    result = {"frame_us": pushed_us(stream, frames, 10_000), "plan": plan_of(stream)}
    result["host_us"] = bus.host_us(stream, played(frames, 300))
    result["under_way"] = bus.pipelined(stream, played(frames, 300))
    return result


def sizes(preset: str = "880m") -> dict:
    pair = build(preset, 0, torch.bfloat16, "cuda")
    result: dict = {"parameters": sum(p.numel() for p in pair[0].parameters())}

    def measure(name: str, size: tuple[int, int], **options: Any) -> None:
        started = time.perf_counter()
        stream = FrameStream(*pair, size=size, **options)
        seconds = time.perf_counter() - started
        frames = clip(size)
        pushed_us(stream, frames, 5)
        timed = pushed_us(stream, frames, 60)
        result[name] = {"frame_us": timed, "build_seconds": seconds, "plan": plan_of(stream)}
        print(f"  {preset} {name}: {timed['p50']:.0f} us, built in {seconds:.1f} s", flush=True)

    for name, size in SIZES.items():
        measure(name, size)
        measure(f"{name} guidance", size, guidance=3.0)
    for steps in (2, 3, 4):
        measure(f"512x512 {steps} steps", (512, 512), steps=steps)
    return result


def sizes_391m() -> dict:
    return sizes("391m")


def swap() -> dict:
    """Frames of 512x512 go on while a thread prepares 768x432; then its first frame comes."""
    stream = FrameStream(*build("880m", 0, torch.bfloat16, "cuda"), size=(512, 512))
    small, large = clip((512, 512)), clip((432, 768))
    pushed_us(stream, small, 50)
    done: list[float] = []

    def prepare() -> None:
        started = time.perf_counter()
        stream.prepare(432, 768)
        done.append(time.perf_counter() - started)

    thread, spans = threading.Thread(target=prepare), []
    thread.start()
    while thread.is_alive():
        spans.append(pushed_us(stream, small, 1)["worst"])
    before, plan = pushed_us(stream, small, 50), stream.plan
    first = pushed_us(stream, large, 1)["worst"]
    swapped = stream.plan is not plan
    rest = pushed_us(stream, large, 20)
    result = {"swap_us": first, "swapped": swapped, "before_us": before, "after_us": rest}
    p50, p99 = np.percentile(spans, (50, 99))
    result["while preparing"] = {"p50": p50, "p99": p99, "worst": max(spans), "frames": len(spans)}
    return result | {"prepare_seconds": done[0]}


def full() -> dict:
    """A plan of another size while the card is full: refused, and the old one goes on."""
    stream = FrameStream(*build("880m", 0, torch.bfloat16, "cuda"), size=(512, 512))
    frames = clip((512, 512))
    before = pushed_us(stream, frames, 50)
    held: list[torch.Tensor] = []
    for nbytes in (2**30, 2**26, 2**22, 2**20):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
    errors = []
    for available in (None, 2**50):  # by the prediction; then it is told that there is room
        told = budget.available if available is None else (lambda device: 2**50)
        with unittest.mock.patch.object(budget, "available", told):
            try:
                stream.prepare(576, 1024)
            except (ValueError, torch.OutOfMemoryError) as error:
                errors.append(f"{type(error).__name__}: {str(error)[:120]}")
    while_full = pushed_us(stream, frames, 50)
    held.clear()
    stream.prepare(576, 1024)
    after = pushed_us(stream, clip((576, 1024)), 10)
    return {"errors": errors, "before": before, "while full": while_full, "after": after}


def batch() -> dict:
    unet = build("880m", 0, torch.bfloat16, "cuda")[0].unet
    result = {}
    for count in (1, 2, 3, 4, 6, 8):
        x = torch.randn(count, unet.config.in_channels, 64, 64, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last).bfloat16()
        level = torch.full((count,), 601.0, device="cuda")
        tokens = torch.randn(count, 77, 768, device="cuda").bfloat16()

        with torch.no_grad():
            conditions = unet.noise_biases(level), unet.context_keys(tokens, lasting=True)

            def step(x: torch.Tensor = x, conditions: tuple = conditions) -> torch.Tensor:
                return unet(x, *conditions)

            times: dict = {}
            for policy in ("auto", "torch"):
                with use(policy):
                    timed = harness.measure({policy: step}, "cuda", effort=harness.QUICK)
                times[policy] = timed[policy].median_us
        result[count] = times
        print(f"  batch {count}: {times['auto']:.0f} us, torch {times['torch']:.0f}", flush=True)
    return result


CASES = {f.__name__: f for f in (parity, sizes, sizes_391m, swap, full, batch, long)}


def main() -> int:
    out, *wanted = sys.argv[1:]
    if out == "--case":
        path, name = wanted
        with open(path, "w") as f:
            json.dump(CASES[name](), f)
        return 0
    results = {}
    for name in wanted or CASES:
        started = time.perf_counter()
        command = [sys.executable, "-P", __file__, "--case", f"{out}.part", name]
        try:
            code: int | str = subprocess.run(command, timeout=LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if code:
            print(f"{name}: failed ({code})", flush=True)
            continue
        with open(f"{out}.part") as f:
            results[name] = json.load(f)
        with open(out, "w") as f:
            json.dump(results, f, indent=1)
        print(json.dumps(results[name])[:1500], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
