"""The process that measures: one group of cases into one results file, a journal beside it.

A kernel can hang or take the CUDA context down with it, so every group runs in a process of its
own (`supervisor` starts it, watches the journal and starts it again without the step that was
lost). Rows are written after every case: whatever happens, what was measured stays.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mirage_hello.kernels import tuning

from . import (
    attention,
    composed,
    conv2d,
    eight_bit,
    elementwise,
    folded,
    group_norm,
    layer_norm,
    linear,
    model,
    model_tiles,
    run_file,
    tune,
)
from .case import Case
from .ceilings import ceilings
from .rows import STEP_SECONDS, Begin, Options, Outcome, measure_case
from .summary import row_line

# group -> its cases; the groups of the model are in `model`. The order is the order of a run.
CASES: dict[str, tuple[tuple[Case, ...], tuple[Case, ...]]] = {
    "attention": (attention.CASES, attention.SMALL),
    "conv2d": (conv2d.CASES, conv2d.SMALL),
    "composed": (composed.CASES, composed.SMALL),
    "linear": (linear.CASES, linear.SMALL),
    "folded": (folded.CASES, folded.SMALL),
    "eight bit": (eight_bit.CASES, eight_bit.SMALL),
    "group_norm": (group_norm.CASES, group_norm.SMALL),
    "layer_norm": (layer_norm.CASES, layer_norm.SMALL),
    "elementwise": (elementwise.CASES, elementwise.SMALL),
}
MODEL_OPS = ("unet_step", "frame")
GROUPS = ("ceilings", *CASES, *MODEL_OPS)
MODEL_TILES = "model tiles"  # of `mirage tune`: every call of the model that has tiles
# A unit that lost one of these in an earlier process is given up; any other step is left out.
WHOLE_UNIT_STEPS = ("inputs", "timing", "build and parity", "frames")
OUT_OF_TIME = "the time budget was used up"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the journal: `step` of `unit` begins and may take `seconds`; or the unit ends."""

    unit: str
    step: str
    seconds: float = 0.0
    state: str = "begin"  # "begin", "end" (of the unit) or "lost" (written by the supervisor)


class Journal:
    """What was begun and what was finished, one JSON object a line, beside the results file."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.journal")

    def append(self, entry: Entry) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(entry)) + "\n")

    def entries(self) -> list[Entry]:
        """Every complete line; a line that is being written is not there yet."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [Entry(**json.loads(line)) for line in lines]

    def finished(self) -> set[str]:
        return {entry.unit for entry in self.entries() if entry.state == "end"}

    def lost(self, unit: str) -> list[str]:
        """Steps of the unit that hung or crashed."""
        return [e.step for e in self.entries() if e.unit == unit and e.state == "lost"]


def cases(options: Options, group: str | None = None) -> Iterator[tuple[Case, str]]:
    """(case, dtype) of everything that the options ask for, in order.

    On a CPU the small versions; with `quick` a few of each group; `ops` and `cases` filter by
    the exact names.
    """
    for name, (full, small) in CASES.items():
        if group not in (None, name):
            continue
        for case in small if options.device == "cpu" else full:
            named = case.name in options.cases
            if options.ops and case.op not in options.ops:
                continue
            if options.cases and not named:
                continue
            if options.quick and not (case.quick or named):
                continue
            for dtype in options.dtypes or _default_dtypes(case, options.device):
                yield case, dtype


def _default_dtypes(case: Case, device: str) -> tuple[str, ...]:
    # A CPU emulates half precision: its times would say nothing of the kernels.
    return case.dtypes if device == "cuda" else ("float32",)


def units(group: str, options: Options, limits: dict[str, Any]) -> Iterator[model.Unit]:
    """What a group measures, one row or case after the other."""
    if group in MODEL_OPS:
        yield from model.units(group, options, limits)
        return
    if options.tiles:
        yield from _tile_units(group, options)
        return
    for case, dtype in cases(options, group):
        where = {"op": case.op, "case": case.name, "dtype": dtype}
        yield model.Unit(where, functools.partial(measure_case, case, dtype, limits, options))


def _tile_units(group: str, options: Options) -> Iterator[model.Unit]:
    """One for each call with tiles, after all their candidates are compiled."""
    if group == MODEL_TILES:
        yield from model_tiles.units(options)
        return
    calls = [c for case in cases(options, group) for c in tune.calls_of(*case, options)]
    tune.compile_all(calls, options.tiles)
    for called in calls:

        def run(begin: Begin, lost: Sequence[str], called: tune.Called = called) -> Outcome:
            return tune.tune_call(called, options.tiles, begin, lost)

        yield model.Unit(called.where, run)


def measure_group(group: str, options: Options, out: Path) -> None:
    """Measure one group into `out`; what the journal says is finished is not measured again."""
    journal, run = Journal(out), run_file.load(out)
    if group == "ceilings":
        if "ceilings" in run["meta"]:
            return  # by an earlier process
        journal.append(Entry("ceilings", "ceilings", STEP_SECONDS))
        run["meta"]["ceilings"] = ceilings(options.device, options.effort)
        run_file.write(run, out)
        return
    finished = journal.finished()
    if options.tiles:
        journal.append(Entry(group, "inputs", tune.COMPILE_SECONDS))
    for unit in units(group, options, run["meta"].get("ceilings", {})):
        name = " | ".join(unit.where.values())
        if name not in finished:
            add(run, _measured(unit, name, options, journal), out, options.save)
            journal.append(Entry(name, "", state="end"))


def _measured(unit: model.Unit, name: str, options: Options, journal: Journal) -> Outcome:
    lost = journal.lost(name)
    whole = next((step for step in WHOLE_UNIT_STEPS if step in lost), None)
    if whole or time.time() > options.deadline:
        reason = f"{whole} hung or crashed the process" if whole else OUT_OF_TIME
        return Outcome(skipped=[{**unit.where, "reason": reason}])

    def begin(step: str, seconds: float) -> None:
        journal.append(Entry(name, step, seconds))

    try:
        return unit.run(begin, lost)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        reason = f"out of device memory: {str(error).splitlines()[0]}"
        return Outcome(skipped=[{**unit.where, "reason": reason}])
    except Exception as error:  # whatever a case raises costs that case alone
        if options.device == "cuda":
            torch.cuda.synchronize()  # raises when the context is lost: the process must end
        traceback.print_exc()
        reason = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Outcome(failures=[{**unit.where, "kernel": unit.where["op"], "reason": reason}])


def add(run: run_file.Run, measured: Outcome, out: Path, save: str = "") -> None:
    """Put what was measured into the run (newer rows replace older ones), write it, print it.

    save: where tiles are kept at once, so that a run that is killed loses no finished choice.
    """
    replaced = {run_file.row_key(row) for row in measured.rows}
    run["rows"] = [row for row in run["rows"] if run_file.row_key(row) not in replaced]
    run["rows"] += measured.rows
    run["failures"] += measured.failures
    run["skipped"] += measured.skipped
    if measured.tiles:
        run["tiles"] = [*run.get("tiles", []), *measured.tiles]
        if save:
            meta = run["meta"]
            tuning.save(meta["gpu"], meta["commit"], tune.table(measured.tiles), Path(save))
    run_file.write(run, out)
    for row in measured.rows:
        print(row_line(row), flush=True)
    for result in measured.tiles:
        print(tune.line(result), flush=True)
    for failure in measured.failures:
        print(f"FAILED {failure['kernel']} {failure['case']}: {failure['reason']}", flush=True)


def main() -> None:
    """worker GROUP+GROUP... OPTIONS-JSON OUT: the supervisor's command line."""
    groups, options, out = sys.argv[1:]
    try:
        for group in groups.split("+"):
            begun = time.time()
            measure_group(group, decoded(options), Path(out))
            run = run_file.load(Path(out))
            seconds = run["meta"]["seconds"]
            seconds[group] = round(seconds.get(group, 0.0) + time.time() - begun, 1)
            run_file.write(run, Path(out))
    except KeyboardInterrupt:  # the supervisor had it too, and says so
        sys.exit(130)


def encoded(options: Options) -> str:
    return json.dumps(dataclasses.asdict(options))


def decoded(text: str) -> Options:
    values: dict[str, Any] = json.loads(text)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Options(**values)


if __name__ == "__main__":
    main()
