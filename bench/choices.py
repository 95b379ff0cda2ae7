"""The measured choices: what `auto` prefers at each shape on one GPU, taken from a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage_hello.kernels import measured, ops

from . import run_file

FOLDER = Path(measured.__file__).parent / "choices"
# In a model the weights come from device memory, so that timing speaks where it was taken.
PREFERRED = ("cold-weights", "hot", "cold")
# What the torch backend calls, first found first: a peer's time stands for it where it was not run.
TORCH = ("torch-eager", "cublas", "cudnn")


def choices(run: run_file.Run) -> dict[str, dict[str, dict[str, float]]]:
    """op -> call label -> backend -> median microseconds, of the fastest kernel of a backend."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for cache in reversed(PREFERRED):
        times: dict[tuple[str, str, str], float] = {}
        for row in run["rows"]:
            if row.get("cache") == cache and row.get("label") and row["op"] in ops:
                found = {"torch": next((row["peers"][p] for p in TORCH if p in row["peers"]), None)}
                found[row["backend"]] = row["time_us"]["p50"]
                for backend, time_us in found.items():
                    key = row["op"], row["label"], backend
                    if time_us is not None:
                        times[key] = min(times.get(key, float("inf")), time_us)
        for (op, label, backend), time_us in times.items():
            table.setdefault(op, {}).setdefault(label, {})[backend] = round(time_us, 3)
    return table


def save(run: run_file.Run, folder: Path = FOLDER) -> Path:
    """Merge the run's choices into `<folder>/<gpu>.json`; shapes not measured now stay.

    Returns:
        The file written.
    """
    meta = run["meta"]
    path = folder / measured.file_name(meta["gpu"])
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = {op: dict(labels) for op, labels in old.get("ops", {}).items()}
    for op, labels in choices(run).items():
        merged.setdefault(op, {}).update(labels)
    run_file.write_json({"gpu": meta["gpu"], "commit": meta["commit"], "ops": merged}, path)
    return path
