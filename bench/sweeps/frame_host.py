"""What the host does for one frame, call by call: `python3.12 bench/sweeps/frame_host.py OUT.json`.

Each call of `FrameStream.submit` and `collect` is timed alone, after the device is idle; then their
sum as `bench/bus.py` takes it. 880m, 512x512, one step; about 10 s.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mirage_hello.bench import bus
from mirage_hello.model import FrameStream, build

FRAMES = 200
SIZE = (512, 512)


def timed_us(call: Callable[[], Any]) -> list[float]:
    spans = []
    for _ in range(FRAMES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        spans.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return spans


def main(out: str) -> int:
    stream = FrameStream(*build("880m", 0, torch.bfloat16, "cuda"), size=SIZE)
    frames = np.random.default_rng(0).integers(0, 256, (64, *SIZE, 3), dtype=np.uint8)
    for frame in frames[:20]:
        stream.push(frame)
    buffers = stream._buffers
    assert buffers is not None and buffers.plan is not None and stream._stream is not None
    graph, own = buffers.plan.graph, stream._stream
    slot = buffers.bus._free[0]
    pinned, event, turn = slot.host_in[0].numpy(), torch.cuda.Event(), iter(range(10**9))
    down = torch.empty_like(slot.host_in).pin_memory()

    def scope() -> None:
        with stream._running(ordered=False):
            pass

    def ordered() -> None:
        with stream._running():
            pass

    def wait_events() -> None:
        event.record()
        event.synchronize()

    assert graph is not None
    calls = {
        "copy into pinned memory": lambda: np.copyto(pinned, frames[next(turn) % 64]),
        "copy into fresh memory": lambda: frames[next(turn) % 64].copy(),
        "scope": scope,
        "ordered scope": ordered,
        "noise": lambda: buffers.draws.normal_(generator=stream._generator),
        "upload": lambda: buffers.frame_in.copy_(slot.host_in, non_blocking=True),
        "graph": graph.replay,
        "download": lambda: down.copy_(buffers.frame_out, non_blocking=True),
        "event, recorded and waited for": wait_events,
        "submit and collect": lambda: stream.push(frames[next(turn) % 64]),
    }
    result: dict[str, Any] = {}
    with torch.no_grad(), torch.cuda.stream(own):
        for name, call in calls.items():
            p50, p90 = np.percentile(timed_us(call), (50, 90))
            result[name] = {"p50": p50, "p90": p90}
            print(f"{p50:8.1f} {p90:8.1f} us  {name}", flush=True)
    source = [torch.from_numpy(frame) for frame in frames]
    for threads in (1, 4):
        torch.set_num_threads(threads)
        spans = timed_us(lambda: slot.host_in[0].copy_(source[next(turn) % 64]))
        name = f"torch's copy into pinned memory, {threads} threads"
        result[name] = float(np.median(spans))
        print(f"{result[name]:8.1f}          us  {name}", flush=True)
    result["host_us"] = bus.host_us(stream, [frames[i % 64] for i in range(FRAMES)])
    print({name: round(us) for name, us in result["host_us"].items()}, flush=True)
    pinned_frames = [frame.pin_memory() for frame in source[:8]]
    result["pinned"] = bus.host_us(stream, pinned_frames * (FRAMES // 8))
    print("pinned", {name: round(us) for name, us in result["pinned"].items()}, flush=True)
    with open(out, "w") as f:
        json.dump(result, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
