"""How a frame grows: with pixels, with denoising steps and with the batch, as one figure.

    python -P tools/growth.py frame-growth.json [...] docs/plots/frame-growth.png

frame-growth.json is of bench/sweeps/frame_growth.py: its cases `sizes`, `sizes_391m` and `batch`.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mirage_hello.tools.figure import draw

COLOURS = {"880m": "#0072b2", "391m": "#009e73", "torch": "#8a929b"}
CASES = {"880m": "sizes", "391m": "sizes_391m"}
STEPS = "512x512 {} steps"

Points = list[tuple[float, float]]


def by_pixels(sizes: dict[str, Any], guidance: bool) -> Points:
    """(megapixels, ms) of the frames of one step, with or without guidance."""
    found = []
    for name, measured in sizes.items():
        size, _, rest = name.partition(" ")
        if rest == ("guidance" if guidance else "") and "x" in size:
            width, height = map(int, size.split("x"))
            found.append((width * height / 1e6, measured["frame_us"]["p50"] / 1e3))
    return sorted(found)


def by_steps(sizes: dict[str, Any]) -> Points:
    """(steps, ms) of a frame of 512x512."""
    names = {1: "512x512"} | {steps: STEPS.format(steps) for steps in (2, 3, 4)}
    return [(n, sizes[name]["frame_us"]["p50"] / 1e3) for n, name in names.items() if name in sizes]


def by_batch(batch: dict[str, Any], policy: str) -> Points:
    """(ms of a step, images a second) of each batch, the smallest first."""
    rows = sorted((int(count), times[policy]) for count, times in batch.items())
    return [(us / 1e3, count / us * 1e6) for count, us in rows]


def growth(measured: dict[str, Any]) -> Figure:
    """Three panels; what was not measured is left out."""
    figure, (pixels, steps, batch) = plt.subplots(1, 3, figsize=(11, 3.6))
    for preset, case in CASES.items():
        sizes = {k: v for k, v in measured.get(case, {}).items() if isinstance(v, dict)}
        colour = COLOURS[preset]
        _line(pixels, by_pixels(sizes, guidance=False), colour, preset)
        _line(pixels, by_pixels(sizes, guidance=True), colour, f"{preset}, guidance", "--")
        _line(steps, by_steps(sizes), colour, preset)
    rows = measured.get("batch", {})
    _line(batch, by_batch(rows, "auto"), COLOURS["880m"], "ours")
    _line(batch, by_batch(rows, "torch"), COLOURS["torch"], "torch, CUDA graph")
    for (ms, rate), count in zip(by_batch(rows, "auto"), sorted(map(int, rows)), strict=True):
        batch.annotate(str(count), (ms, rate), (0, 6), textcoords="offset points", fontsize=8)
    _label(pixels, "frame against its size, 1 step", "megapixels", "ms")
    _label(steps, "frame of 512x512 against steps", "steps", "ms")
    _label(batch, "880m's U-Net, batch 1 to 8", "ms a step", "images a second")
    figure.tight_layout()
    return figure


def _line(axis: Axes, points: Points, colour: str, label: str, style: str = "-") -> None:
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, y, style, marker="o", markersize=4, color=colour, label=label)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    sys.exit(draw(__doc__ or "", dict, growth))
