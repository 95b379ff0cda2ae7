"""Compiles what a run will measure, in several processes, before its clock starts.

warm INDEX COUNT OPTIONS-JSON: every COUNT-th case, each kernel and peer called once. What they
compile stays on disk: ours in the kernel cache, Triton's and torch.compile's in their own. Nothing
is checked or timed here, and whatever fails will fail again where it is recorded.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from . import peers
from .case import Case, Draw
from .rows import Options, left_out, op_named
from .worker import CASES, cases, decoded, encoded

SECONDS = 60.0  # of a run's budget at most; what is not compiled then is compiled when measured
# Of inductor: its own pool would be COUNT times too many here, and idle where all is compiled.
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
MOST_PROCESSES = 10  # each holds a CUDA context and torch: 3 GB of memory


def processes() -> int:
    """Half of the cores: each process compiles with one thread and waits little."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2))


def run(groups: list[str], options: Options, seconds: float) -> float:
    """Warm the cases of these groups, for at most `seconds`; returns the seconds it took."""
    begun, count = time.time(), processes()
    environment = os.environ | ONE_THREAD
    command = [sys.executable, "-P", "-m", "mirage_hello.bench.warm"]
    running = [
        subprocess.Popen(
            [*command, str(index), str(count), encoded(options), *groups],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        for process in running:
            left = begun + min(seconds, SECONDS) - time.time()
            process.wait(max(0.1, left))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in running:
            process.kill()
            process.wait()
    return time.time() - begun


def compile_case(case: Case, dtype: str, options: Options) -> None:
    """Each kernel and each peer of a case once; the reasons of failures are not kept."""
    args = case.make(Draw(options.device, getattr(torch, dtype), options.seed))
    op = op_named(case.op)
    call = op.describe(args, {})
    runs: list[Callable] = [k.run for k in op.kernels if not left_out(k, call, options)]
    runs += peers.peers(case, args, options.peers).values()
    for function in runs:
        try:
            with torch.no_grad():
                function(*args)
        except Exception as error:  # the run meets it again, and records it
            print(f"{case.op} {case.name}: {type(error).__name__}", file=sys.stderr)


def main() -> None:
    index, count, text, *groups = sys.argv[1:]
    options = decoded(text)
    wanted = (pair for group in CASES if group in groups for pair in cases(options, group))
    for case, dtype in itertools.islice(wanted, int(index), None, int(count)):
        compile_case(case, dtype, options)
    os._exit(0)


if __name__ == "__main__":
    main()
