"""The HTML page: one file that holds its figures, its tables and how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from mirage_hello.bench import run_file
from mirage_hello.tools import plots, report_tables
from mirage_hello.tools.report_rows import Row, newest_rows
from mirage_hello.tools.report_tables import Table

TEMPLATE = Path(__file__).with_name("report.html")
# matplotlib writes colours into the SVG; the page gives these three its own, light or dark.
PAGE_COLOURS = {
    plots.INK: "var(--ink)",
    plots.FAINT: "var(--faint)",
    plots.PAPER: "var(--paper)",
}


@dataclass
class Figure:
    """A plot as SVG text with the tables that belong under it."""

    name: str
    title: str
    svg: str
    tables: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Machine:
    """Everything the page says of one machine."""

    name: str
    line: str
    on_cpu: bool
    figures: list[Figure]
    summary: Table
    parity: Table
    every: Table
    skipped: list[str]
    runs: list[str]


def by_machine(runs: Sequence[run_file.Run]) -> list[list[run_file.Run]]:
    """Runs of each machine, GPUs first, then the one measured last."""
    groups: dict[str, list[run_file.Run]] = {}
    for run in runs:
        groups.setdefault(run["meta"]["gpu"], []).append(run)
    newest_first = sorted(groups.values(), key=lambda g: g[-1]["meta"]["date"], reverse=True)
    return sorted(newest_first, key=on_cpu)


def on_cpu(runs: Sequence[run_file.Run]) -> bool:
    return runs[-1]["meta"]["cuda"] == "none"


def write_page(runs: Sequence[run_file.Run], problems: Sequence[str], folder: Path) -> Path:
    """Draw every figure into `folder` as PNG and SVG, and `index.html`, which needs none of them.

    Args:
        runs: at least one, oldest first.
        problems: sentences on files that were left out.
        folder: made if it is missing.
    """
    machines = []
    for number, group in enumerate(by_machine(runs)):
        prefix = "" if number == 0 else f"machine{number + 1}-"
        machines.append(_machine(group, folder, prefix))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(machines=machines, notices=list(problems))
    page = folder / "index.html"
    page.write_text(text + "\n", encoding="utf-8")
    return page


def _machine(runs: Sequence[run_file.Run], folder: Path, prefix: str) -> Machine:
    rows, last = newest_rows(runs), runs[-1]
    failures = last.get("failures", [])
    return Machine(
        name=last["meta"]["gpu"],
        line=report_tables.machine(last),
        on_cpu=on_cpu(runs),
        figures=_figures(rows, runs, folder, prefix),
        summary=report_tables.summary(rows),
        parity=report_tables.parity(rows, failures),
        every=report_tables.every_row(rows),
        skipped=_skipped(last),
        runs=[f"{r['meta'].get('file', '')}: {report_tables.machine(r)}" for r in runs],
    )


def _figures(
    rows: Sequence[Row], runs: Sequence[run_file.Run], folder: Path, prefix: str
) -> list[Figure]:
    meta = runs[-1]["meta"]
    hot = [row for row in rows if row.get("cache", "hot") == "hot"]

    def caption(drawn: Sequence[Row]) -> str:
        """The machine, and the commits that the rows are of."""
        commits = ", ".join(dict.fromkeys(row["run"]["commit"] for row in drawn))
        return f"{meta['gpu']}, commit {commits}, {meta['date'][:10]}, hot"

    def figure(name: str, title: str, drawn: Any, *tables: dict[str, Any]) -> Figure:
        svg = plots.save(drawn, folder, prefix + name)
        return Figure(prefix + name, title, _inline(svg), list(tables))

    made = []
    if any(row["op"] == "frame" for row in rows):
        table = {"title": "", "table": report_tables.frames(rows)}
        drawn = plots.frame_times(rows, caption([r for r in rows if r["op"] == "frame"]))
        made.append(figure("frame", "Time of a frame", drawn, table))
    if hot:
        drawn = plots.speedup_overview(hot, caption(hot))
        made.append(figure("speedup", "Speedup", drawn))
    limits = next((r["meta"]["ceilings"] for r in reversed(runs) if "ceilings" in r["meta"]), None)
    if limits and any(row.get("flops") for row in hot):
        drawn = plots.roofline(hot, limits, caption(hot))
        made.append(figure("roofline", "Roofline", drawn))
    for op in dict.fromkeys(row["op"] for row in hot if row["op"] != "frame"):
        drawn = plots.speedup_of_op(hot, op, caption([r for r in hot if r["op"] == op]))
        made.append(figure(f"speedup-{op}", op, drawn, *_tables(rows, op)))
    return made


def _tables(rows: Sequence[Row], op: str) -> list[dict[str, Any]]:
    tables = {
        title: report_tables.speed_of_op(rows, op, cache)
        for cache, title in report_tables.CACHE_NAMES.items()
    }
    return [{"title": title, "table": table} for title, table in tables.items() if table.rows]


def _inline(svg: str) -> str:
    """The <svg> element alone, in the page's colours."""
    text = svg[svg.index("<svg") :]
    for colour, variable in PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    return text


def _skipped(run: run_file.Run) -> list[str]:
    """Each reason once, with the kernels that it holds for."""
    reasons: dict[str, list[str]] = {}
    for item in run.get("skipped", []):
        name = item.get("kernel") or item.get("peer") or item.get("case") or item.get("group", "")
        names = reasons.setdefault(item["reason"], [])
        if name not in names:
            names.append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
