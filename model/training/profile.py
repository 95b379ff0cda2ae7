"""Where the device's time goes: the kernels of a few training steps, slowest first."""

from __future__ import annotations

import time
from pathlib import Path

import torch

FIRST, STEPS = 60, 8  # the first profiled step of a call, when graphs are captured; how many
ROWS = 50  # kernels


class Profile:
    """Told of every step; writes one text file. Without CUDA it does nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.step, self.began = path, 0, 0.0
        self.profiler: torch.profiler.profile | None = None

    def before_step(self) -> None:
        self.step += 1
        if self.step == FIRST and torch.cuda.is_available():
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            )
            self.profiler.start()
            torch.cuda.synchronize()
            self.began = time.monotonic()
        elif self.step == FIRST + STEPS and self.profiler is not None:
            torch.cuda.synchronize()
            wall = 1000 * (time.monotonic() - self.began) / STEPS
            self.profiler.stop()
            events = sorted(
                self.profiler.key_averages(), key=lambda e: -getattr(e, "self_device_time_total", 0)
            )
            lines = [f"{STEPS} steps, {wall:.2f} ms a step", "us a step   calls a step   kernel"]
            for e in events[:ROWS]:
                spent = getattr(e, "self_device_time_total", 0) / STEPS
                lines.append(f"{spent:9.1f}   {e.count / STEPS:12.1f}   {e.key[:110]}")
            self.path.write_text("\n".join(lines) + "\n")
            self.profiler = None
