"""The JSON of a run: its keys, its checks, and files that are never half written.

    {"meta": {"gpu", "driver", "torch", "cuda", "commit", "date", ...},
     "rows": [{"op", "case", "dtype", "backend", "time_us": {"p10", "p50", "p90"}, "tflops", "gbps",
               "fraction_of_ceiling", "peers": {name: time_us}, "parity": {"error", "allowed"},
               ...}],
     "failures": [...], "skipped": [...]}

docs/benchmarks.md lists every key. One file a run, under results/<gpu>/<date>-<commit>.json.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .case import PEERS

Run = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "results"
META_KEYS = ("gpu", "driver", "torch", "cuda", "commit", "date")
ROW_KEYS = ("op", "case", "dtype", "backend", "time_us", "tflops", "gbps", "fraction_of_ceiling")
CACHE_STATES = ("hot", "cold", "cold-weights")
# Of the whole frame and the U-Net step: see `model` and `frames`.
MODEL_PEERS = ("cuda-graph", "diffusers-eager", "diffusers-graph", "stream-diffusion")
KNOWN_PEERS = (*PEERS, *MODEL_PEERS)


class BadResults(ValueError):
    """A results file that cannot be used: names the file and the first thing wrong with it."""


def new_run(device: str, commit: str | None = None) -> Run:
    """A run without rows, with everything that says where it was measured.

    Args:
        device: "cuda" or "cpu".
        commit: where the sources are not a git checkout: the commit that they are from.
    """
    on_gpu = device == "cuda"
    meta = {
        "gpu": torch.cuda.get_device_name() if on_gpu else f"CPU {_processor()}",
        "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else "none",
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    return {"meta": meta, "rows": [], "failures": [], "skipped": []}


def default_path(meta: dict[str, Any], root: Path | None = None) -> Path:
    """results/<gpu>/<date>-<commit>.json for a run's meta."""
    gpu = re.sub(r"[^a-z0-9]+", "-", meta["gpu"].lower()).strip("-")
    moment = re.sub(r"[^0-9T]", "", meta["date"].split("+")[0])
    return (root or FOLDER) / gpu / f"{moment}-{meta['commit'][:12]}.json"


def write(run: Run, path: Path) -> None:
    """Check the run and write it; see `write_json`. Raises BadResults, and OSError of the disk."""
    validate(run, path)
    write_json(run, path)


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then rename: readers see the old file or the new one, never half.

    One line a row (an item of a list, a key of an object, two levels down), for readable diffs.
    """
    text = _lines(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _lines(value: dict[str, Any]) -> str:
    def dumped(item: Any) -> str:
        return json.dumps(item, allow_nan=False)

    parts = []
    for key, item in value.items():
        if isinstance(item, list) and item:
            body = "[\n" + ",\n".join(map(dumped, item)) + "\n]"
        elif isinstance(item, dict) and item:
            inner = (f"{dumped(name)}: {dumped(part)}" for name, part in item.items())
            body = "{\n" + ",\n".join(inner) + "\n}"
        else:
            body = dumped(item)
        parts.append(f"{dumped(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(path: Path) -> Run:
    """Read and check one run.

    Raises:
        BadResults: not readable, not JSON, or a key that is missing or of the wrong kind.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadResults(f"{path}: not a results file ({error}); measure again") from error
    validate(run, path)
    return run


def load_folder(folder: Path) -> tuple[list[Run], list[str]]:
    """Every run below a folder, oldest first, and a sentence for each file left out.

    A folder `eval` holds what `mirage eval` measured, which is none of these.

    Each run gets meta["file"], its path below the folder.
    """
    runs, problems = [], []
    own = (p for p in folder.rglob("*.json") if "eval" not in p.relative_to(folder).parts)
    for path in sorted(own):
        try:
            run = load(path)
        except BadResults as error:
            problems.append(str(error))
            continue
        run["meta"]["file"] = str(path.relative_to(folder))
        runs.append(run)
    return sorted(runs, key=lambda run: run["meta"]["date"]), problems


def validate(run: Any, path: Path | str = "run") -> None:
    """Raises BadResults for the first key that is missing or of the wrong kind."""
    problem = next(_problems(run), None)
    if problem:
        raise BadResults(f"{path}: {problem}; measure again, or remove the file")


def row_key(row: dict[str, Any]) -> tuple:
    """What makes a row unique within a run."""
    return tuple(row.get(k) for k in ("op", "case", "dtype", "backend", "kernel", "cache"))


def _problems(run: Any) -> Iterator[str]:
    if not isinstance(run, dict):
        yield f"the top must be an object (got {type(run).__name__})"
        return
    meta, rows = run.get("meta"), run.get("rows")
    if not isinstance(meta, dict):
        yield "meta is missing"
        return
    for key in META_KEYS:
        if not isinstance(meta.get(key), str):
            yield f"meta.{key} must be a string (got {meta.get(key)!r})"
    if not isinstance(rows, list):
        yield f"rows must be a list (got {type(rows).__name__})"
        return
    for index, row in enumerate(rows):
        for problem in _row_problems(row):
            yield f"rows[{index}]{problem}"


def _row_problems(row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f" must be an object (got {type(row).__name__})"
        return
    for key in ROW_KEYS:
        if key not in row:
            yield f".{key} is missing"
            return
    for key in ("op", "case", "dtype", "backend"):
        if not isinstance(row[key], str) or not row[key]:
            yield f".{key} must be a string (got {row[key]!r})"
    for key in ("p10", "p50", "p90"):
        if not isinstance(row["time_us"], dict) or not _is_time(row["time_us"].get(key)):
            yield f".time_us.{key} must be a time in microseconds (got {row['time_us']!r})"
    for key in ("tflops", "gbps", "fraction_of_ceiling"):
        if row[key] is not None and not _is_time(row[key]):
            yield f".{key} must be a number >= 0 or null (got {row[key]!r})"
    if not isinstance(row.get("peers"), dict):
        yield f".peers must be an object (got {row.get('peers')!r})"
        return
    for name, value in row["peers"].items():
        if name not in KNOWN_PEERS or not _is_time(value):
            yield f".peers.{name} must be a time of {', '.join(KNOWN_PEERS)} (got {value!r})"
    parity = row.get("parity")
    if not isinstance(parity, dict) or not {"error", "allowed"} <= parity.keys():
        yield f".parity must hold error and allowed (got {parity!r})"
    if row.get("cache", "hot") not in CACHE_STATES:
        yield f".cache must be one of {', '.join(CACHE_STATES)} (got {row['cache']!r})"


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _commit() -> str:
    """Short hash of the checkout, "-dirty" when a source differs from it; else "unknown"."""
    here = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(here)]
    try:
        commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
        changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return _output(query).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _processor() -> str:
    """The processor's own name where Linux gives it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named.group(1).strip() if named else platform.machine()


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
