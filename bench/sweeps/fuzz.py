"""What every fuzz of a kernel does: random calls by a seed that is printed, failures, a summary."""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the emulator, for a few small calls


def main(
    stem: str,
    kinds: Sequence[Any],
    check: Callable[[random.Random, Any], tuple[str, str] | None],
    compile_all: Callable[[], None],
) -> int:
    """`FILE [CASES [SECONDS [SEED]]]`: CASES calls (5000), at most SECONDS (60), kind after kind.

    Args:
        stem: results go to $OUT/<stem>-fuzz.json.
        kinds: what `check` takes in turn: a program, a family of calls.
        check: draws a call of a kind; (the call in words, what is wrong with it), or None.
        compile_all: compiles what the kinds need, before the clock starts.

    Returns:
        The exit code: 1 where a call was wrong.
    """
    given = [float(text) for text in sys.argv[1:4]]
    wanted, seconds, seed = (*given, *(5000.0, 60.0, float(int(time.time())))[len(given) :])
    print(f"{stem}: seed {int(seed)}", flush=True)
    rng = random.Random(int(seed))
    torch.manual_seed(int(seed))
    compile_all()
    begin, failures, done = time.perf_counter(), [], 0
    while done < wanted and time.perf_counter() - begin < seconds:
        kind = kinds[done % len(kinds)]
        found = check(rng, kind)
        if found:
            failures.append({"case": done, "kind": str(kind), "call": found[0], "wrong": found[1]})
            print(failures[-1], flush=True)
        done += 1
    elapsed = time.perf_counter() - begin
    print(f"{stem} fuzz: {done} cases, {len(failures)} failed, {elapsed:.0f} s", flush=True)
    with open(f"{os.environ.get('OUT', '.')}/{stem}-fuzz.json", "w") as f:
        report = {"seed": int(seed), "cases": done, "seconds": elapsed, "failures": failures}
        json.dump(report, f, indent=1)
    return 1 if failures else 0
