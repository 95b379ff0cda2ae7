"""Tables of a report as data, and as Markdown: the page and the README show the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mirage_hello.bench import run_file
from mirage_hello.bench.summary import best_peer, speedup
from mirage_hello.tools.report_rows import (
    Row,
    best_rows,
    case_title,
    dtype_name,
    geometric_mean,
    peers_of,
    time_text,
)

CACHE_NAMES = {"hot": "hot", "cold": "cold", "cold-weights": "cold weights"}


Cell = tuple[str, float | str]  # the text, and what its column sorts by


@dataclass(frozen=True)
class Table:
    """Cells are text; where a column sorts by a number, `keys` holds it beside the text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: tuple[tuple[float | str, ...], ...] = ()

    def is_text(self, column: int) -> bool:
        """Whether the column sorts by its words."""
        return any(isinstance(keys[column], str) for keys in self.keys)

    def markdown(self) -> str:
        """A pipe table, numbers to the right."""
        align = ["---" if i == 0 else "---:" for i in range(len(self.columns))]
        lines = [self.columns, align, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(columns: Sequence[str], cells: Sequence[Sequence[Cell]]) -> Table:
    texts = tuple(tuple(text for text, _ in row) for row in cells)
    return Table(tuple(columns), texts, tuple(tuple(key for _, key in row) for row in cells))


def _text(value: str) -> Cell:
    return value, value


def _time(time_us: float | None) -> Cell:
    return ("", float("inf")) if time_us is None else (time_text(time_us), time_us)


def _ratio(value: float | None) -> Cell:
    return ("", 0.0) if not value else (f"{value:.2f}x", value)


def summary(rows: Sequence[Row]) -> Table:
    """An op a line: shapes, the geometric mean over the best peer and over each peer."""
    best = best_rows(rows)
    names = peers_of(best)
    cells: list[list[Cell]] = []
    for op in dict.fromkeys(row["op"] for row in best):
        of_op = [row for row in best if row["op"] == op]
        rivals: list[str | None] = [None, *names]
        means = [
            geometric_mean([r for row in of_op if (r := speedup(row, peer))]) for peer in rivals
        ]
        backends = ", ".join(sorted({row["backend"] for row in of_op}))
        shapes: Cell = (str(len(of_op)), len(of_op))
        cells.append([_text(op), shapes, _text(backends), *map(_ratio, means)])
    columns = ["op", "shapes", "our backend", "over the best peer", *(f"over {n}" for n in names)]
    return _table(columns, cells)


def speed_of_op(rows: Sequence[Row], op: str, cache: str = "hot") -> Table:
    """A case a line: our best kernel beside every peer, and the share of the ceiling."""
    best = [row for row in best_rows(rows, cache) if row["op"] == op]
    peers = peers_of(best)
    cells: list[list[Cell]] = []
    for row in best:
        cells.append(
            [
                _text(case_title(row)),
                _text(row["backend"]),
                _time(row["time_us"]["p50"]),
                *(_time(row["peers"].get(peer)) for peer in peers),
                _ratio(speedup(row)),
                _percent(row["fraction_of_ceiling"]),
            ]
        )
    columns = ["case", "backend", "ours", *peers, "over the best peer", "of the ceiling"]
    return _table(columns, cells)


def hot_and_cold(rows: Sequence[Row], op: str) -> Table:
    """A case a line: ours and every peer, hot, then as a layer meets it, and TFLOP/s.

    The second state is `cold-weights` where the op has weights that rotate, else `cold`. The last
    line holds the geometric means of the ratios.
    """
    of_op = [row for row in rows if row["op"] == op]
    states = ["hot", next((c for c in ("cold-weights", "cold") if _has(of_op, c)), "cold")]
    best = {state: best_rows(of_op, state) for state in states}
    peers = peers_of([row for rows in best.values() for row in rows])
    cold = {_key(row): row for row in best[states[1]]}
    cells: list[list[Cell]] = []
    ratios: list[list[float]] = [[], []]
    for row in best["hot"]:
        line: list[Cell] = [_text(case_title(row))]
        for i, found in enumerate((row, cold.get(_key(row)))):
            ratio = speedup(found) if found else None
            ratios[i] += [ratio] if ratio else []
            times = [found["peers"].get(peer) for peer in peers] if found else [None] * len(peers)
            ours = found["time_us"]["p50"] if found else None
            line += [*map(_time, times), _time(ours), _ratio(ratio)]
        cells.append([*line, _number(row["tflops"], 0), _text(_way(row))])
    gaps: list[Cell] = [_text("")] * (len(peers) + 1)
    means = [_ratio(geometric_mean(found)) for found in ratios]
    cells.append([_text("geometric mean"), *gaps, means[0], *gaps, means[1], _text(""), _text("")])
    columns = ["case"]
    for state in states:
        name = CACHE_NAMES[state]
        columns += [f"{peer}, {name}" for peer in peers] + [f"ours, {name}", "over the best"]
    return _table([*columns, "TFLOP/s", "kernel"], cells)


def kernels_of_op(rows: Sequence[Row], op: str) -> Table:
    """A case a line, a column for each of our kernels: hot times, the best peer beside them."""
    hot = [row for row in rows if row["op"] == op and row.get("cache", "hot") == "hot"]
    ways = list(dict.fromkeys(_way(row) for row in hot))
    cells: list[list[Cell]] = []
    for key in dict.fromkeys(map(_key, hot)):
        of_case = {_way(row): row for row in hot if _key(row) == key}
        first = next(iter(of_case.values()))
        best = best_peer(first)
        times = [of_case[w]["time_us"]["p50"] if w in of_case else None for w in ways]
        cells.append(
            [_text(case_title(first)), _time(best[1] if best else None), *map(_time, times)]
        )
    return _table(["case", "best peer", *ways], cells)


def _has(rows: Sequence[Row], cache: str) -> bool:
    return any(row.get("cache") == cache for row in rows)


def _key(row: Row) -> tuple[str, str]:
    return row["case"], row["dtype"]


def _way(row: Row) -> str:
    """`attention/ptx/sm_90a` -> `ptx sm_90a`."""
    return str(row.get("kernel") or row["backend"]).removeprefix(f"{row['op']}/").replace("/", " ")


def every_row(rows: Sequence[Row]) -> Table:
    """Everything that was measured, one line a row."""
    cells: list[list[Cell]] = []
    for row in rows:
        best, time_us = best_peer(row), row["time_us"]
        cells.append(
            [
                _text(row["op"]),
                _text(row["case"]),
                _text(dtype_name(row)),
                _text(row.get("kernel") or row["backend"]),
                _text(CACHE_NAMES[row.get("cache", "hot")]),
                _time(time_us["p50"]),
                (f"{time_text(time_us['p10'])} to {time_text(time_us['p90'])}", time_us["p10"]),
                _number(row["tflops"], 1),
                _number(row["gbps"], 0),
                _percent(row["fraction_of_ceiling"]),
                _text("" if best is None else best[0]),
                _ratio(speedup(row)),
                _text(row["run"]["commit"]),
            ]
        )
    columns = (
        "op", "case", "dtype", "kernel", "data", "median", "p10 to p90", "TFLOP/s", "GB/s",
        "of the ceiling", "best peer", "over it", "commit",
    )  # fmt: skip
    return _table(columns, cells)


def _percent(value: float | None) -> Cell:
    return ("", 0.0) if value is None else (f"{100 * value:.0f} %", value)


def _number(value: float | None, digits: int) -> Cell:
    return ("", 0.0) if value is None else (f"{value:,.{digits}f}", value)


def parity(rows: Sequence[Row], failures: Sequence[dict[str, Any]]) -> Table:
    """Error and what the rule allows, the closest to the limit first; failures lead."""
    cells: list[list[Cell]] = [
        [
            *map(_text, (f["op"], f["case"], f["dtype"], f["kernel"], "", "")),
            (f["reason"], float("inf")),
        ]
        for f in failures
    ]
    seen = set()
    by_share = sorted(rows, key=lambda row: -_share(row))
    for row in by_share:
        key = row["op"], row["case"], row["dtype"], row.get("kernel")
        if key in seen:
            continue
        seen.add(key)
        error, allowed = row["parity"]["error"], row["parity"]["allowed"]
        names = row["op"], row["case"], dtype_name(row), row["kernel"]
        numbers: list[Cell] = [(f"{error:.2e}", error), (f"{allowed:.2e}", allowed)]
        cells.append([*map(_text, names), *numbers, _percent(_share(row))])
    return _table(("op", "case", "dtype", "kernel", "error", "allowed", "of the limit"), cells)


def _share(row: Row) -> float:
    error, allowed = row["parity"]["error"], row["parity"]["allowed"]
    return error / allowed if allowed else 0.0


def frames(rows: Sequence[Row]) -> Table:
    """Every way of running a frame: median, tails, frames a second, memory."""
    cells: list[list[Cell]] = []
    for row in (r for r in rows if r["op"] == "frame"):
        ways = {**row.get("peer_frames", {}), "ours": row.get("frame_us", row["time_us"])}
        for name, times in ways.items():
            peak = times.get("peak_bytes")
            cells.append(
                [
                    _text(row["case"]),
                    _text(name),
                    _time(times["p50"]),
                    _time(times.get("p95")),
                    _time(times.get("p99")),
                    (f"{1e6 / times['p50']:.1f}", 1e6 / times["p50"]),
                    ("", 0.0) if peak is None else (f"{peak / 2**30:.2f} GiB", peak),
                    _number(times.get("frames"), 0),
                ]
            )
    columns = ("frame", "how", "median", "p95", "p99", "frames a second", "peak memory", "frames")
    return _table(columns, cells)


def machine(run: run_file.Run) -> str:
    """One line: what was measured where, of which commit, when."""
    meta = run["meta"]
    limits = meta.get("ceilings")
    text = f"{meta['gpu']}, driver {meta['driver']}, torch {meta['torch']}, CUDA {meta['cuda']}"
    text += f"; commit {meta['commit']}, {meta['date'][:10]}"
    if limits:
        rates = limits["matrix_tflops"]
        matrix = rates.get("bfloat16", rates["float32"])
        text += f"; measured ceilings: copy {limits['copy_gbps']:,.0f} GB/s"
        text += f", bf16 matrix product {matrix:,.1f} TFLOP/s"
        text += f", one launch {limits['launch_us']:.2f} us"
    return text
