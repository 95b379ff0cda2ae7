"""Runs a whole benchmark in processes that may be lost, within a time budget.

The journal of the worker says which step it is in and how long that may take. A step that takes
longer, or a worker that dies, costs that step alone: it is marked lost and the rest goes on
without it in a new process.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from . import run_file, warm
from .rows import STEP_SECONDS, Options
from .worker import CASES, GROUPS, MODEL_TILES, OUT_OF_TIME, Entry, Journal, encoded

START_SECONDS = 120.0  # imports, CUDA context and the first compilation of a new process
MOST_RESTARTS = 12  # of one group: past this something is wrong with the machine, not a kernel
POLL_SECONDS = 0.1
OVERTIME_SECONDS = 5.0  # past the deadline: the worker itself stops between two cases


def run_groups(
    groups: Iterable[str],
    options: Options,
    out: Path,
    budget_seconds: float | None = None,
    commit: str | None = None,
    to_stderr: bool = False,
) -> run_file.Run:
    """Measure the groups into `out`: the ops in one process, the model's rows in others.

    Args:
        groups: names among worker.GROUPS; the ceilings come first, but for tiles.
        options: what to measure.
        out: the results file; it exists, valid and partial, from the start.
        budget_seconds: nothing new begins after this, and what runs is stopped.
        commit: see run_file.new_run.
        to_stderr: print the rows there, so that stdout stays free for JSON.

    Returns:
        The run as written, with meta["seconds"] per group.
    """
    started = time.time()
    if budget_seconds is not None:
        options = dataclasses.replace(options, deadline=started + budget_seconds)
    run = run_file.new_run(options.device, commit)
    # Results are published: what a file was called says enough, not where it lay.
    command = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    run["meta"] |= {"quick": options.quick, "seconds": {}, "command": command}
    wanted = [g for g in (*GROUPS, MODEL_TILES) if g in groups]
    if options.warm:
        left = options.deadline - started
        run["meta"]["seconds"]["warm"] = round(warm.run(wanted, options, left / 2), 1)
    run_file.write(run, out)
    Journal(out).path.unlink(missing_ok=True)
    try:
        for batch in _batches(wanted, options):
            problem = _run_batch(batch, options, out, to_stderr)
            run = run_file.load(out)
            if problem:
                run["skipped"].append({"group": ", ".join(batch), "reason": problem})
                print(f"{', '.join(batch)}: {problem}", file=sys.stderr, flush=True)
                run_file.write(run, out)
            if "ceilings" in batch and "ceilings" not in run["meta"]:
                break  # nothing can be held against them
    finally:
        Journal(out).path.unlink(missing_ok=True)
    return run


def _batches(groups: list[str], options: Options) -> list[list[str]]:
    """The groups of a process: all ops in one, which starts once; each of the model's alone."""
    first = [] if options.tiles else ["ceilings"]
    first += [g for g in groups if g in CASES]
    return [b for b in (first, *([g] for g in groups if g not in CASES)) if b]


def _run_batch(batch: list[str], options: Options, out: Path, to_stderr: bool) -> str | None:
    """None when the groups ended by themselves, else what stopped them."""
    journal = Journal(out)
    for _ in range(MOST_RESTARTS):
        if time.time() > options.deadline:
            return OUT_OF_TIME
        problem = _run_worker(batch, options, out, to_stderr)
        if problem is None or problem == OUT_OF_TIME:
            return problem
        last = (journal.entries() or [Entry(batch[0], "start", state="end")])[-1]
        if last.state != "begin":
            return f"its process {problem} before it began anything"
        journal.append(Entry(last.unit, last.step, state="lost"))
        print(f"{last.unit}: {last.step} {problem}", file=sys.stderr, flush=True)
        if last.unit == "ceilings":
            return f"its process {problem}"
        _note_lost(out, last, problem)
    return f"its process was lost {MOST_RESTARTS} times; the machine needs a look"


def _run_worker(batch: list[str], options: Options, out: Path, to_stderr: bool) -> str | None:
    # -P: the current folder stays out of sys.path, where our kernels/ would hide another package.
    command = [sys.executable, "-P", "-m", "mirage_hello.bench.worker"]
    process = subprocess.Popen(
        [*command, "+".join(batch), encoded(options), str(out)],
        stdout=sys.stderr if to_stderr else None,
        env=os.environ | warm.ONE_THREAD if options.warm else None,
    )
    try:
        return _watch(process, options, Journal(out))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _watch(process: subprocess.Popen, options: Options, journal: Journal) -> str | None:
    """Wait for the process; stop it when its step or the budget runs out."""
    known, changed, allowed = len(journal.entries()), time.time(), START_SECONDS
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        entries = journal.entries()
        if len(entries) != known:
            known, changed = len(entries), time.time()
            allowed = entries[-1].seconds or STEP_SECONDS
        if time.time() > options.deadline + OVERTIME_SECONDS:
            return OUT_OF_TIME
        if time.time() - changed > allowed:
            return f"gave no answer in {allowed:.0f} s and was stopped"
    return None if process.returncode == 0 else f"died (exit code {process.returncode})"


def _note_lost(out: Path, entry: Entry, problem: str) -> None:
    """A kernel that hangs or kills its process has failed, as surely as one that is wrong."""
    run = run_file.load(out)
    op, case, dtype = (part.strip() for part in [*entry.unit.split("|"), "", ""][:3])
    failure = {"op": op, "case": case, "dtype": dtype, "kernel": entry.step}
    run["failures"].append({**failure, "reason": f"its process {problem}"})
    run_file.write(run, out)
