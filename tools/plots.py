"""Figures of a benchmark: speedup bars, a roofline, frame times. Each returns a matplotlib figure.

Colours are Okabe and Ito's (2008), distinct under every common colour blindness; nothing is said
by colour alone (bars carry labels, points carry shapes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mirage_hello.bench.summary import speedup
from mirage_hello.tools.report_rows import (
    Row,
    best_rows,
    case_title,
    geometric_mean,
    peers_of,
    three_digits,
    time_text,
)

# Text, lines and the background take the page's colours (tools/report.html maps these three).
INK, FAINT, PAPER = "#1b1f24", "#8a929b", "#ffffff"
HALO = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}  # behind text that lines may cross
PEER_COLOURS = {
    "torch-eager": "#56b4e9",
    "torch-compile": "#0072b2",
    "cuda-graph": "#cc79a7",
    "diffusers-eager": "#a6761d",
    "diffusers-graph": "#d9c48f",
    "stream-diffusion": "#7b5ea7",
    "cudnn": "#e69f00",
    "flash": "#d55e00",
    "cublas": "#009e73",
    "bf16": "#8a929b",
}
OUR_COLOUR = "#009e73"
FAMILIES = {
    "attention": ("attention", "#d55e00"),
    "attention_fp8": ("attention", "#d55e00"),
    "conv2d_fp8": ("conv2d", "#e69f00"),
    "linear_fp8": ("linear, geglu", "#009e73"),
    "layer_norm_linear": ("linear, geglu", "#009e73"),
    "layer_norm_geglu": ("linear, geglu", "#009e73"),
    "residual_norm_linear": ("linear, geglu", "#009e73"),
    "residual_norm_geglu": ("linear, geglu", "#009e73"),
    "conv2d": ("conv2d", "#e69f00"),
    "linear": ("linear, geglu", "#009e73"),
    "geglu": ("linear, geglu", "#009e73"),
    "group_norm": ("normalisation", "#0072b2"),
    "group_norm_silu": ("normalisation", "#0072b2"),
    "layer_norm": ("normalisation", "#0072b2"),
    "norm_conv2d": ("conv2d", "#e69f00"),
    "residual_block": ("model", "#cc79a7"),
    "unet_step": ("model", "#cc79a7"),
}
ELEMENTWISE = ("elementwise", "#56b4e9")
MARKERS = {"ptx": "o", "cuda": "s", "triton": "^", "cupy": "D", "numba": "v", "torch": "x"}
OTHER_MARKER = "P"  # auto, ptx-emulated
# What a live picture must beat, in milliseconds a frame (see docs/benchmarks.md).
FRAME_LINES = ((40.0, "40 ms: Mirage"), (16.0, "16 ms: its next version"), (10.0, "10 ms: stretch"))

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def speedup_overview(rows: Sequence[Row], caption: str) -> Figure:
    """One group of bars an op: the geometric mean of peer time / our time, for each peer.

    Args:
        rows: of one machine.
        caption: said under the title, such as the GPU, commit and date.
    """
    groups = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in best_rows(rows) if row["op"] == op]
        bars = []
        for peer in peers_of(of_op):
            ratios = [ratio for row in of_op if (ratio := speedup(row, peer))]
            shapes = "1 shape" if len(ratios) == 1 else f"{len(ratios)} shapes"
            bars.append((peer, geometric_mean(ratios), shapes))
        if bars:
            groups.append((op, bars))
    title = "Speedup of our best kernel over each peer (geometric mean over the shapes)"
    return _bars(groups, title, caption)


def speedup_of_op(rows: Sequence[Row], op: str, caption: str) -> Figure:
    """One group of bars a shape: peer time / our best kernel's time, labelled with both."""
    groups = []
    for row in (r for r in best_rows(rows) if r["op"] == op):
        ours = f"{row['backend']} {time_text(row['time_us']['p50'])}"
        bars = [
            (peer, speedup(row, peer) or 0.0, f"{time_text(row['peers'][peer])} vs {ours}")
            for peer in peers_of([row])
        ]
        if bars:
            groups.append((case_title(row), bars))
    return _bars(groups, f"{op}: speedup of our best kernel", caption)


def _bars(
    groups: list[tuple[str, list[tuple[str, float, str]]]], title: str, caption: str
) -> Figure:
    """Horizontal bars from 0, grouped, with a line at 1 (as fast as the peer)."""
    with plt.rc_context(STYLE):
        count = sum(len(bars) + 0.7 for _, bars in groups)
        figure, axes = plt.subplots(figsize=(9.5, 1.5 + 0.21 * max(count, 3)))
        y, ticks = 0.0, []
        longest = max((r for _, bars in groups for _, r, _ in bars), default=1.0)
        for name, bars in groups:
            ticks.append((y + (len(bars) - 1) / 2, name))
            for peer, ratio, note in bars:
                axes.barh(y, ratio, height=0.86, color=PEER_COLOURS[peer])
                label = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"
                _beside(axes, ratio, y, label, 4, fontsize=9, weight="bold")
                _beside(axes, ratio, y, note, 41, fontsize=8, color=FAINT)
                y += 1
            y += 0.7
        axes.axvline(1.0, color=INK, linewidth=1.1)
        axes.set_yticks([t for t, _ in ticks], [n for _, n in ticks])
        axes.set_ylim(y - 0.3, -0.9)
        axes.set_xlim(0, 1.38 * max(longest, 1.2))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("times as fast as the peer (right of the line: faster)")
        used = dict.fromkeys(peer for _, bars in groups for peer, _, _ in bars)
        handles = [
            Line2D([], [], color=PEER_COLOURS[peer], linewidth=8, label=f"over {peer}")
            for peer in used
        ]
        _heading(figure, axes, title, caption)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(5, len(handles) or 1), fontsize=9
        )
    return figure


def _beside(axes: Any, x: float, y: float, text: str, points: float, **style: Any) -> None:
    """Text `points` to the right of (x, y), whatever the scale."""
    axes.annotate(text, (x, y), (points, 0), textcoords="offset points", va="center", **style)


def roofline(rows: Sequence[Row], limits: dict[str, Any], caption: str) -> Figure:
    """TFLOP/s against FLOPs a byte for every kernel, under the measured ceilings.

    A hot kernel whose data stays in L2 may stand above the memory line, which is device memory's.
    """
    points = [r for r in rows if r.get("flops") and r.get("bytes") and r["time_us"]["p50"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 6.0))
        intensities = [r["flops"] / r["bytes"] for r in points] or [1.0]
        low, high = 0.5 * min(intensities), 3 * max(*intensities, 300.0)
        _roofs(axes, limits, low, high)
        for row, x in zip(points, intensities, strict=False):
            marker = MARKERS.get(row["backend"], OTHER_MARKER)
            colour = FAMILIES.get(row["op"], ELEMENTWISE)[1]
            open_ = row["backend"] == "torch"
            axes.scatter(
                x, row["flops"] / row["time_us"]["p50"] * 1e-6, s=34, marker=marker, color=colour,
                alpha=0.85, linewidths=1.2 if open_ else 0.5, edgecolors=None if open_ else PAPER,
                zorder=3,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        axes.grid(which="major")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("useful FLOPs per byte that must move")
        axes.set_ylabel("TFLOP/s")
        _heading(figure, axes, "Roofline: every kernel under the measured ceilings", caption)
        _roofline_legends(axes, points)
    return figure


def _roofs(axes: Any, limits: dict[str, Any], low: float, high: float) -> None:
    bandwidth = limits["copy_gbps"] * 1e-3  # TB/s, so that intensity times it is in TFLOP/s
    for dtype, peak in sorted(limits["matrix_tflops"].items(), key=lambda item: -item[1]):
        ridge = peak / bandwidth
        axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color=INK, linewidth=1.3)
        if dtype != "float16":  # within a percent or two of bfloat16: one label is enough
            label = f"{dtype} matrix product {three_digits(peak)} TFLOP/s"
            axes.text(high * 0.93, peak * 1.1, label, ha="right", fontsize=8.5)
    x, y = low * 1.2, low * 1.2 * bandwidth * 1.15
    axes.text(
        x, y, f"copy {three_digits(bandwidth)} TB/s", fontsize=8.5, rotation_mode="anchor",
        # Along a line of slope 1 in logarithms, whatever the figure's shape.
        rotation=math.degrees(math.atan2(y, x)), transform_rotates_text=True,
    )  # fmt: skip


def _roofline_legends(axes: Any, points: Sequence[Row]) -> None:
    """Colours and shapes in the lower right, where no kernel should be."""
    families = dict.fromkeys(FAMILIES.get(r["op"], ELEMENTWISE) for r in points)
    backends = dict.fromkeys(r["backend"] for r in points)
    colours = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in families
    ]
    shapes = [
        Line2D([], [], marker=MARKERS.get(b, OTHER_MARKER), linestyle="", color=INK, label=b)
        for b in backends
    ]
    legend = axes.legend(handles=colours, loc="lower right", fontsize=9)
    axes.add_artist(legend)
    axes.legend(handles=shapes, loc="lower right", bbox_to_anchor=(0.82, 0), fontsize=9)


def frame_times(rows: Sequence[Row], caption: str) -> Figure:
    """Median time of a whole frame for each way of running it, whiskers to p99, and the goals."""
    frames = [row for row in rows if row["op"] == "frame"]
    bars: list[tuple[str, str, str, dict[str, float]]] = []  # case, label, colour, percentiles
    for row in frames:
        ways = {**row.get("peer_frames", {}), "ours": row.get("frame_us", row["time_us"])}
        for name, times in ways.items():
            label = f"ours ({row['backend']})" if name == "ours" else name
            bars.append((row["case"], label, PEER_COLOURS.get(name, OUR_COLOUR), times))
    longest = max((t.get("p99", t["p50"]) * 1e-3 for *_, t in bars), default=40.0)
    with plt.rc_context(STYLE):
        cases = list(dict.fromkeys(case for case, *_ in bars))
        figure, axes = plt.subplots(figsize=(9.5, 2.0 + 0.34 * (len(bars) + len(cases))))
        y, labels = 0.0, []
        right = 1.28 * max(longest, 42.0)
        for case in cases:
            axes.text(
                0.004 * right,
                y,
                case,
                weight="bold",
                va="center",
                fontsize=9.5,
                bbox=HALO,
                zorder=4,
            )
            y += 0.85
            for _, label, colour, times in (bar for bar in bars if bar[0] == case):
                _frame_bar(axes, y, times, colour)
                labels.append((y, label))
                y += 1
            y += 0.5
        for level, (line_ms, text) in enumerate(FRAME_LINES):
            axes.axvline(line_ms, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            axes.annotate(
                text, (line_ms, 1), (-3, 3 + 12 * level), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=8.5,
            )  # fmt: skip
        axes.set_yticks([t for t, _ in labels], [n for _, n in labels])
        axes.set_ylim(y - 0.4, -0.85)
        axes.set_xlim(0, right)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("milliseconds a frame: median (bar), 99th percentile (whisker)")
        _heading(figure, axes, "Time of a whole frame, autoencoder included", caption, pad=60)
    return figure


def _frame_bar(axes: Any, y: float, times: dict[str, float], colour: str) -> None:
    median, worst = times["p50"] * 1e-3, times.get("p99", times["p50"]) * 1e-3
    axes.barh(y, median, height=0.8, color=colour)
    axes.plot([median, worst], [y, y], color=INK, linewidth=1.3)
    axes.plot([worst, worst], [y - 0.2, y + 0.2], color=INK, linewidth=1.3)
    text = f"{three_digits(median)} ms = {three_digits(1000 / median)} FPS"
    _beside(axes, max(worst, median), y, text, 6, fontsize=9, bbox=HALO, zorder=4)


def _heading(figure: Figure, axes: Any, title: str, caption: str, pad: float = 22) -> None:
    axes.set_title(title, pad=pad)
    axes.annotate(
        caption, (0, 1), (0, pad - 14), xycoords="axes fraction", textcoords="offset points",
        fontsize=8.5, color=FAINT,
    )  # fmt: skip
    figure.set_layout_engine("constrained")


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write `<name>.png` and `<name>.svg` into the folder, close the figure, return the SVG's text.

    The hash salt keeps identifiers apart where several SVGs stand in one page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor=PAPER)
        svg = folder / f"{name}.svg"
        figure.savefig(svg, facecolor=PAPER, metadata={"Date": None})
    plt.close(figure)
    return svg.read_text(encoding="utf-8")
