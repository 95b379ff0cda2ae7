"""What crosses the bus during a frame, and what the host itself does for one."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirage_hello.model import FrameStream


def pipelined(stream: FrameStream, frames: Iterable[np.ndarray]) -> dict[str, float]:
    """Frames a second with a frame under way while the next one is brought and the last one taken.

    {"frames_per_second", "us": of a frame, at the median between two outputs}
    """
    spans, last = [], time.perf_counter()
    for _ in stream.run(frames):
        now = time.perf_counter()
        spans.append((now - last) * 1e6)
        last = now
    median = float(np.median(spans[2:] or spans))
    return {"us": median, "frames_per_second": 1e6 / median}


def host_us(stream: FrameStream, frames: Iterable[np.ndarray | torch.Tensor]) -> dict[str, Any]:
    """Microseconds of a frame in which the host works: what it queues, and the two copies of the
    frame in its own memory; the device is waited for between the two and does not count.
    """
    submits, collects = [], []
    for frame in frames:
        begin = time.perf_counter()
        stream.submit(frame)
        queued = time.perf_counter()
        torch.cuda.synchronize()
        ready = time.perf_counter()
        stream.collect()
        collects.append((time.perf_counter() - ready) * 1e6)
        submits.append((queued - begin) * 1e6)
    together = [a + b for a, b in zip(submits, collects, strict=True)]
    return {
        "p50": float(np.percentile(together, 50)),
        "p99": float(np.percentile(together, 99)),
        "submit_p50": float(np.percentile(submits, 50)),
        "collect_p50": float(np.percentile(collects, 50)),
    }


def just_written(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames one after the other in the same memory, as a decoder or a camera leaves them: in
    the processor's caches, where those of a clip in memory no longer are when their turn comes."""
    memory: np.ndarray | None = None
    for frame in frames:
        memory = np.empty_like(frame) if memory is None else memory
        np.copyto(memory, frame)
        yield memory


def transfers(stream: FrameStream, frames: Iterable[np.ndarray]) -> dict[str, Any]:
    """What crosses the bus during some frames, from the profiler's own records.

    Returns:
        {"per_frame": [[{"name", "bytes"}, ...] of each frame], "frame_bytes": H W 3,
         "only_the_frame": one copy in and one copy out of exactly frame_bytes in every frame}
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for i, frame in enumerate(frames):
            with record_function(f"frame {i}"):
                stream.push(frame)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    spans = {
        e["name"]: (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("frame ")
    }
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "DtoD" not in e["name"]]
    per_frame = [
        [
            {"name": e["name"], "bytes": e["args"].get("bytes")}
            for e in copies
            if begin <= e["ts"] < end
        ]
        for begin, end in spans.values()
    ]
    frame_bytes = int(frame.nbytes)
    allowed = functools.partial(_is_the_frame, frame_bytes=frame_bytes)
    return {
        "per_frame": per_frame,
        "frame_bytes": frame_bytes,
        "only_the_frame": bool(per_frame) and all(map(allowed, per_frame)),
    }


COUNTERS = {"active": 1, "multiprocessors": 2, "tensor": 5, "memory": 10}  # NVML's numbers


def device_use(run: Callable[[], Any]) -> dict[str, float] | None:
    """Shares of the time of `run`, half a second or more, by the card's own counters (NVML's GPM),
    which watch without a profiler. None: they are not to be had here.

    {"active": anything ran, "multiprocessors": a warp was on one, mean over them, "tensor": their
    matrix units worked, "memory": of the device memory's bandwidth}
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        before, after = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(handle, before)
        run()
        nvml.nvmlGpmSampleGet(handle, after)
        found = nvml.c_nvmlGpmMetricsGet_t()
        found.version, found.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(COUNTERS)
        found.sample1, found.sample2 = before, after
        for i, number in enumerate(COUNTERS.values()):
            found.metrics[i].metricId = number
        nvml.nvmlGpmMetricsGet(found)
        metrics = [found.metrics[i] for i in range(len(COUNTERS))]
        if any(metric.nvmlReturn for metric in metrics):
            raise RuntimeError(f"codes {[metric.nvmlReturn for metric in metrics]}")
        return {n: m.value / 100 for n, m in zip(COUNTERS, metrics, strict=True)}
    except Exception as error:  # of NVML, of its binding, of the rights to read the counters
        print(f"no counters of the card: {type(error).__name__}: {error}", flush=True)
        return None


def _is_the_frame(copies: list[dict[str, Any]], frame_bytes: int) -> bool:
    """One copy in, one copy out, each of exactly one frame."""
    directions = sorted("in" if "HtoD" in copy["name"] else "out" for copy in copies)
    return directions == ["in", "out"] and all(copy["bytes"] == frame_bytes for copy in copies)
