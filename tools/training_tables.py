"""The measured tables of docs/training.md, from JSON under bench/sweeps/results/."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.model_card import read
from mirage_hello.tools.report_tables import Table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "training.md"
RESULTS = ROOT / "bench" / "sweeps" / "results"
MARKED = re.compile(
    r"(<!-- training:(?P<name>[\w-]+) (?P<files>[\w. -]+) -->\n).*?(<!-- /training -->)", re.DOTALL
)


def measured(row: dict[str, Any]) -> tuple[str, ...]:
    """What `bench/sweeps/closed_loop.py` found of a row."""
    psnr = ", ".join(f"{row[k]:.1f}" for k in ("psnr_1", "psnr_20", "psnr"))
    return (
        psnr, f"{row['warp']:.4f} ({row['warp_truth']:.4f})", f"{row['sharpness']:.2f}",
        f"{row['edges']:.3f}", f"{row['least_edges']:.2f}",
    )  # fmt: skip


MEASURED = (
    "PSNR at frames 1, 20, late (dB)", "warp error (truth)", "sharpness of the truth's", "edges",
    "least edges of a stream, over those without a memory",
)  # fmt: skip


def noise(found: dict[str, Any]) -> Table:
    """One step of the student, by the correlation of its start noise."""
    rows = [r for r in found["rows"] if r["share"] == 1 and r["steps"] == 1]
    cells = [
        (f"{r['correlation']:g}", "yes" if r["remember"] else "no", *measured(r)) for r in rows
    ]
    return Table(("r", "memory", *MEASURED), tuple(cells))


def shares(found: dict[str, Any]) -> Table:
    """Means of the teacher's and the student's weights, r = 0.5."""
    rows = [r for r in found["rows"] if r["remember"] and r["correlation"] == 0.5]
    rows = sorted(rows, key=lambda r: (r["steps"], r["rho"], r["share"]))
    cells = [
        (
            f"{r['share']:g}",
            f"{r['steps']}",
            f"{r['rho']:g}" if r["steps"] > 1 else "",
            *measured(r),
        )
        for r in rows
    ]
    return Table(("student's share", "steps", "rho", *MEASURED), tuple(cells))


def throughput(one: dict[str, Any], two: dict[str, Any]) -> Table:
    """Training on one GPU and on several."""
    cells = []
    for stage in ("autoencoder", "video"):
        a, b = one[stage], two[stage]
        scaling = b["frames_per_s"] / a["frames_per_s"] / (two["ranks"] / one["ranks"])
        cells.append((
            stage, f"{a['steps_per_s']:.1f}, {a['frames_per_s']:,.0f}",
            f"{b['steps_per_s']:.1f}, {b['frames_per_s']:,.0f}", f"{scaling:.1%}",
            f"{a['tflops']:.0f}, {a['utilisation']:.0%}",
        ))  # fmt: skip
    return Table(
        ("stage", f"{one['device']}: steps, frames a second", f"{two['ranks']} of them", "scaling",
         "TFLOP/s of one, share of the peak"),
        tuple(cells),
    )  # fmt: skip


TABLES: dict[str, Callable[..., Table]] = {
    "noise": noise, "shares": shares, "throughput": throughput,
}  # fmt: skip


def fill(text: str) -> str:
    """The text with the tables between its `<!-- training:NAME FILE ... -->` markers made again.

    Raises:
        BadInput: a NAME that is no table, or a file that cannot be read.
    """

    def replaced(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise BadInput(f"publish: no table {match['name']!r}; known: {', '.join(TABLES)}")
        found = [read(RESULTS / name) for name in match["files"].split()]
        return f"{match[1]}{TABLES[match['name']](*found).markdown()}\n{match[4]}"

    return MARKED.sub(replaced, text)


def write() -> Path:
    """docs/training.md with its tables made again."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    return DOCUMENT
