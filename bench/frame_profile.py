"""Where a frame's microseconds go: every kernel of some frames, by the profiler's own records.

Times of kernels that overlap (programmatic dependent launch, parallel branches) are shared out: a
microsecond in which two kernels run counts for the one that began first, so that the families and
the idle time add up to the frame.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

FRAMES = 20
# Family -> pattern of a kernel's name; the first that matches. What none matches is named itself.
FAMILIES = (
    ("copies over the bus", r"HtoD|DtoH"),
    ("attention", r"attention|fmha|flash"),
    ("normalisation", r"group_norm|layer_norm|GroupNorm|LayerNorm|RowwiseMoments"),
    ("compiled passes", r"^triton_"),
    ("convolution", r"conv2d|conv|cudnn|implicit|nchwToNhwc|nhwcToNchw|xmma_fprop|wgrad|dgrad"),
    ("linear", r"linear|geglu|gemm|cublas|nvjet|splitK|sm90_xmma"),
    ("random numbers", r"distribution|normal|philox"),
    ("copies on the device", r"DtoD|Memset|CatArray|copy_kernel|direct_copy"),
    ("elementwise", r"elementwise|silu|axpby|add_noise|frame|residual_add|euler|ddim|guidance"),
)


def family(name: str) -> str:
    """The family of a kernel by its name."""
    return next((f for f, pattern in FAMILIES if re.search(pattern, name)), "other")


def profile(run: Callable[[], Any], frames: int = FRAMES) -> dict[str, Any]:
    """Profile `frames` calls of `run`, each of which waits for its result.

    Returns:
        {"span_us": from the first to the last device record of a frame, mean; "busy_us": in which
        anything ran; "idle_share": 1 - busy / span; "families": {family: us a frame};
        "kernels": [{"name", "family", "calls", "us"} a frame, the longest first];
        "launches": records a frame}
    """
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for i in range(frames + 2):  # the first two warm the profiler up
            with record_function(f"frame {i}"):
                run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return summary(events, skip=2)


def summary(events: list[dict[str, Any]], skip: int = 0) -> dict[str, Any]:
    """`profile`'s result from the events of a chrome trace; frames are its annotations."""
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("frame ")
    )[skip:]
    records = sorted(
        (e["ts"], e["dur"], e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    span_us = busy_us = 0.0
    shares: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for begin, end in spans:
        mine = [r for r in records if begin <= r[0] < end]
        if not mine:
            continue
        clock = mine[0][0]
        for at, length, name in mine:
            own = max(0.0, at + length - max(at, clock))
            clock = max(clock, at + length)
            busy_us += own
            shares[family(name)] += own
            kernels[name][0] += 1
            kernels[name][1] += own
        span_us += clock - mine[0][0]
    frames = max(len(spans), 1)
    listed = [
        {"name": name[:120], "family": family(name), "calls": n / frames, "us": us / frames}
        for name, (n, us) in kernels.items()
    ]
    return {
        "frames": len(spans),
        "span_us": span_us / frames,
        "busy_us": busy_us / frames,
        "idle_share": 1 - busy_us / span_us if span_us else 0.0,
        "families": {name: us / frames for name, us in sorted(shares.items())},
        "kernels": sorted(listed, key=lambda k: -k["us"]),
        "launches": sum(n for n, _ in kernels.values()) / frames,
    }
