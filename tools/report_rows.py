"""Chooses rows for plots and tables: the newest of each, the best backend, the peers in order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mirage_hello.bench import run_file
from mirage_hello.bench.case import PEERS

Row = dict[str, Any]
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def newest_rows(runs: Sequence[run_file.Run]) -> list[Row]:
    """The newest row of each op, case, dtype, kernel and cache state, in the order of the ops.

    Args:
        runs: of one machine, oldest first. Ratios are taken within a row, whose peers ran beside
            it, so rows of different runs may stand in one table; each keeps its `run`.
    """
    rows: dict[tuple, Row] = {}
    for run in runs:
        source = {"commit": run["meta"]["commit"], "date": run["meta"]["date"]}
        for row in run["rows"]:
            rows[run_file.row_key(row)] = {**row, "run": source}
    return sorted(rows.values(), key=_order)


def _order(row: Row) -> tuple:
    ops = ("frame", "unet_step", "residual_block", "norm_conv2d", "attention", "conv2d",
           "group_norm_silu", "group_norm", "linear", "geglu", "layer_norm", "silu",
           "axpby")  # fmt: skip
    place = ops.index(row["op"]) if row["op"] in ops else len(ops)
    size = re.fullmatch(r"(\d+) (KiB|MiB)", row["case"])
    size_bytes = int(size[1]) * {"KiB": 1, "MiB": 1024}[size[2]] if size else 0
    return place, row["op"], row["dtype"], size_bytes


def best_rows(rows: Iterable[Row], cache: str = "hot") -> list[Row]:
    """The fastest row of each op, case and dtype among our backends.

    The torch backend is PyTorch itself behind our registry, so it stands for us only where no
    other backend ran (on a CPU).
    """
    best: dict[tuple, Row] = {}
    for row in rows:
        if row.get("cache", "hot") != cache:
            continue
        key = row["op"], row["case"], row["dtype"]
        if key not in best or _rank(row) < _rank(best[key]):
            best[key] = row
    return list(best.values())


def _rank(row: Row) -> tuple[bool, float]:
    return row["backend"] == "torch", row["time_us"]["p50"]


def peers_of(rows: Iterable[Row]) -> list[str]:
    """The peers that any of the rows was timed against, without `copy`, in a fixed order."""
    found = {name for row in rows for name in row["peers"]}
    return [name for name in (*run_file.MODEL_PEERS, *PEERS) if name in found and name != "copy"]


def dtype_name(row: Row) -> str:
    """fp32, fp16, bf16; another dtype by torch's name."""
    name: str = row["dtype"]
    return SHORT.get(name, name)


def case_title(row: Row) -> str:
    """The case and the short name of the dtype."""
    return f"{row['case']} {dtype_name(row)}"


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log(values))); 0 for none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else 0.0


def time_text(time_us: float) -> str:
    """Three significant digits with the unit that reads best: "8.61 us", "4.53 ms", "1.2 s"."""
    if time_us >= 1e6:
        return f"{three_digits(time_us * 1e-6)} s"
    return f"{three_digits(time_us * 1e-3)} ms" if time_us >= 1e3 else f"{three_digits(time_us)} us"


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{digits}f}"
