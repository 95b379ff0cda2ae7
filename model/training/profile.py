"""Where the device's time goes: the kernels of a few training steps, slowest first."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS = 6
ROWS = 60  # kernels listed


def write_profile(path: Path, step: Callable[[], Any]) -> None:
    """Run some steps and list their kernels in a text file: time and calls of each, for a step."""
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    wall = 1000 * (time.monotonic() - began) / STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    lines = [f"{wall:.2f} ms a step", "us a step   calls a step   kernel"]
    for e in events[:ROWS]:
        spent, calls = e.self_device_time_total / STEPS, e.count / STEPS
        lines.append(f"{spent:9.1f}   {calls:12.1f}   {e.key[:110]}")
    path.write_text("\n".join(lines) + "\n")
