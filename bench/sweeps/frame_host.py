"""What the host does for one frame, call by call: `python3.12 bench/sweeps/frame_host.py OUT.json`.

First whole frames, as `bench/bus.py` takes them: by
as many threads as torch has and by fewer, of a clip that the caches have forgotten (cold) and of
frames just written, as a decoder leaves them. Then every call in its place, behind a frame that has
been waited for. `cores` is what the process burns meanwhile: torch's threads wait for work by
spinning, unless OMP_WAIT_POLICY is passive, which a process of its own shows. 880m, 512x512, one
step; about 25 s.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mirage_hello.bench import bus
from mirage_hello.model import FrameStream, build
from mirage_hello.model.bus import Pinned
from mirage_hello.model.frame_buffers import check_frame

FRAMES = 100
PUSHED = 500  # frames timed whole, for what the copy does to the slowest
SIZE = (512, 512)
FRAME_CYCLES = 4_500_000  # about a frame's 2.4 ms
Found = dict[str, Any]


def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, *SIZE, 3), dtype=np.uint8)


def whole_frames(stream: FrameStream, frames: np.ndarray, found: Found) -> None:
    """submit and collect, for each way of copying."""
    default = torch.get_num_threads()
    for threads in sorted({default, 4, 1}, reverse=True):
        torch.set_num_threads(threads)
        some = list(itertools.islice(itertools.cycle(frames), FRAMES))
        for state, source in {"cold": some, "just written": bus.just_written(some)}.items():
            name = f"frame: {threads} threads, {state}"
            _keep(found, name, lambda: bus.host_us(stream, source))  # noqa: B023
        _keep(found, f"push: {threads} threads", lambda: pushed(stream, frames))
    torch.set_num_threads(default)
    pinned = [torch.from_numpy(frame).pin_memory() for frame in frames]
    for name, kind in {"NumPy": list(frames) * 2, "pinned": pinned * 2}.items():
        _keep(found, f"frame: {name}", lambda: bus.host_us(stream, kind))  # noqa: B023
        _keep(found, f"submit under way: {name}", lambda: submit_under_way(stream, kind))  # noqa: B023


def pushed(stream: FrameStream, frames: np.ndarray) -> dict[str, float]:
    """Microseconds of `push`, the wait for the device included."""
    spans = []
    for i in range(PUSHED):
        begin = time.perf_counter()
        stream.push(frames[i % len(frames)])
        spans.append((time.perf_counter() - begin) * 1e6)
    p50, p99 = np.percentile(spans, (50, 99))
    return {"p50": p50, "p99": p99, "ratio": p99 / p50}


def submit_under_way(stream: FrameStream, frames: list[Any]) -> dict[str, float]:
    """Microseconds of `submit` while another frame is computed."""
    spans = []
    stream.submit(frames[0])
    for frame in frames[1:]:
        begin = time.perf_counter()
        stream.submit(frame)
        spans.append((time.perf_counter() - begin) * 1e6)
        stream.collect()
    stream.collect()
    return {"p50": float(np.percentile(spans, 50)), "p99": float(np.percentile(spans, 99))}


def _keep(found: Found, name: str, measure: Callable[[], dict[str, float]]) -> None:
    cpu, begin = time.process_time(), time.perf_counter()
    found[name] = measure()
    cores = (time.process_time() - cpu) / (time.perf_counter() - begin)
    found[name]["cores"] = cores
    times = " ".join(f"{key} {us:.1f}" for key, us in found[name].items())
    print(f"{name:45} {times}", flush=True)


def in_place(found: Found, name: str, call: Callable[[], Any], frame: Callable[[], Any]) -> None:
    """Times a call, each time after a whole frame on the device."""

    def spans() -> dict[str, float]:
        measured = []
        for _ in range(FRAMES):
            frame()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            measured.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
        p10, p50, p90 = np.percentile(measured, (10, 50, 90))
        return {"p50": p50, "p10": p10, "p90": p90}

    _keep(found, name, spans)


def calls(stream: FrameStream, frames: np.ndarray, found: Found) -> None:
    """Each call of `submit` and `collect`, and their sum."""
    buffers, own = stream._buffers, stream._own.cuda
    assert buffers is not None and own is not None
    assert buffers.plan is not None and buffers.plan.graph is not None
    frame_in, frame_out = buffers.frame_in[0], buffers.frame_out[0]
    memory, outputs = buffers.bus._free[0].host_in.tensor, buffers.bus._outputs
    graph = buffers.plan.graph
    event, down = torch.cuda.Event(), Pinned.like(frame_in).tensor
    event.record(own)
    turn = itertools.cycle(torch.from_numpy(frame) for frame in frames)

    def frame() -> None:
        frame_in.copy_(memory, non_blocking=True)
        graph.replay()

    def scope() -> None:
        with stream._own:
            pass

    pieces = {
        "check the frame": lambda: check_frame(frames[0]),
        "scope": scope,
        "noise": lambda: buffers.draw(stream._generator, stream.noise_correlation),
        "copy": lambda: memory.copy_(next(turn)),
        "upload": lambda: frame_in.copy_(memory, non_blocking=True),
        "the policy": stream._wanted,
        "graph": graph.replay,
        "download": lambda: down.copy_(frame_out, non_blocking=True),
        "event, record": lambda: event.record(own),
        "event, wait for a past one": event.synchronize,
        "lend an output, take it back": lambda: outputs.lend(outputs.take()),
    }
    with torch.no_grad(), stream._own:
        for name, call in pieces.items():
            in_place(found, name, call, frame)
    found["sum"] = sum(found[name]["p50"] for name in pieces)
    print(f"sum {found['sum']:.0f} us; each call alone finds the caches colder than in its row")


def copies(out: str) -> None:
    """torch's copies behind 2.4 ms of a device at work, in this process's environment."""
    found: Found = {}
    memory, frames = Pinned.like(torch.empty(*SIZE, 3, device="cuda")).tensor, clip()
    turn = itertools.cycle(torch.from_numpy(frame) for frame in frames)
    for threads in (4, 1):
        torch.set_num_threads(threads)
        name = f"copy: {threads} threads, cold, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
        copy = lambda: memory.copy_(next(turn))  # noqa: E731
        in_place(found, name, copy, lambda: torch.cuda._sleep(FRAME_CYCLES))
    with open(out, "w") as f:
        json.dump(found, f)


def main(out: str) -> int:
    if "OMP_WAIT_POLICY" in os.environ:
        copies(out)
        return 0
    stream = FrameStream(*build("880m", 0, torch.bfloat16, "cuda"), size=SIZE)
    frames = clip()
    for frame in frames[:20]:
        stream.push(frame)
    with open("/proc/cpuinfo") as f:
        cpu = next(line for line in f if line.startswith("model name")).split(":")[1].strip()
    found: Found = {"cpu": cpu, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(found, flush=True)
    for measure in (whole_frames, calls):
        measure(stream, frames, found)
        with open(out, "w") as f:
            json.dump(found, f, indent=1)
    aside = os.environ | {"OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, f"{out}.part"]
    if subprocess.run(command, env=aside, timeout=20, check=False).returncode == 0:
        with open(f"{out}.part") as f:
            found |= json.load(f)
        with open(out, "w") as f:
            json.dump(found, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
