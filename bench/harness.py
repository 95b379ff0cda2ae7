"""The clock: times functions against each other, on a GPU by CUDA-graph replay.

Every contender is captured as `calls` repetitions in one CUDA graph, so that host time is out of
the number, and the graphs are replayed in turn, so that clock and power drift hit all alike:

    time_us = elapsed(replay) / calls                                          hot: data in L2
    time_us = (elapsed(replay of flush + call) - elapsed(replay of flush)) / calls        cold
    (a list of functions, one per input set, is called in turn)                   cold weights

A sample is one replay; a sample of many calls is their mean, which is what a stream of kernels
sees. Median with the 10th and 90th percentile of the samples; the samples are kept.
A function that cannot be captured is timed with events around plain calls and says so; on a CPU
the clock is `time.perf_counter`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], Tensor]

MAX_CALLS = 400  # in one graph: 400 x 1 us outlast the 5 to 10 us a graph needs to start
GPU_HEAD_START_CYCLES = 200_000  # about 100 us in which the host queues the replay to be timed


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds` samples of each contender, about `sample_us` each."""

    rounds: int = 30
    sample_us: float = 1000.0


FULL = Effort()
QUICK = Effort(rounds=10, sample_us=400.0)


@dataclass
class Timing:
    """Samples of one contender in microseconds a call, and how they were taken."""

    how: str  # "graph", "perf_counter", or "events: <why no graph>"
    calls: int
    samples_us: list[float] = field(default_factory=list)
    output: Tensor | None = None  # of the last timed call: parity is checked on it again

    @property
    def percentiles_us(self) -> dict[str, float]:
        """{"p10", "p50", "p90"} of the samples, linearly interpolated."""
        samples = torch.tensor(self.samples_us, dtype=torch.float64)
        p10, p50, p90 = samples.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
        return {"p10": p10.item(), "p50": p50.item(), "p90": p90.item()}

    @property
    def median_us(self) -> float:
        return self.percentiles_us["p50"]


def measure(
    contenders: Mapping[str, Function | Sequence[Function]],
    device: str,
    *,
    cold: bool = False,
    effort: Effort = FULL,
    plainly: Collection[str] = (),
) -> dict[str, Timing]:
    """Time every contender in turn, round by round.

    Args:
        contenders: name -> function without arguments that returns its output tensor, or a
            sequence of them, called in turn (one for each input set).
        device: "cuda" or "cpu".
        cold: write twice the L2 between the calls; the time of that write is taken off.
        effort: rounds and length of a sample.
        plainly: contenders that are called, not captured: their host time counts.

    Returns:
        name -> Timing, in the order given. `output` is of a call made while timing, in memory
        that held NaN before.

    Raises:
        ValueError: cold on a CPU. Whatever a contender raises when it is called plainly.
    """
    with torch.no_grad():
        if device == "cpu":
            if cold:
                raise ValueError("cold timing flushes a GPU's L2; on a CPU measure hot")
            return _measure_cpu(contenders, effort)
        return _measure_gpu(contenders, cold, effort, plainly)


def _functions(contender: Function | Sequence[Function]) -> Sequence[Function]:
    return (contender,) if callable(contender) else contender


# ----------------------------------------------------------------------------------- CPU


def _measure_cpu(
    contenders: Mapping[str, Function | Sequence[Function]], effort: Effort
) -> dict[str, Timing]:
    timings = {}
    for name, contender in contenders.items():
        functions = _functions(contender)
        for function in functions:
            function()
        begin = time.perf_counter()
        functions[0]()
        once_us = (time.perf_counter() - begin) * 1e6
        timings[name] = Timing("perf_counter", _calls(once_us, effort, len(functions)))
    for _ in range(effort.rounds):
        for name, timing in timings.items():
            functions = _functions(contenders[name])
            begin = time.perf_counter()
            for i in range(timing.calls):
                timing.output = functions[i % len(functions)]()
            timing.samples_us.append((time.perf_counter() - begin) * 1e6 / timing.calls)
    return timings


def _calls(once_us: float, effort: Effort, sets: int) -> int:
    """Calls in one sample, a multiple of the number of input sets."""
    wanted = min(MAX_CALLS, max(1, round(effort.sample_us / max(once_us, 0.1))))
    return -(-wanted // sets) * sets


# ----------------------------------------------------------------------------------- GPU


@dataclass
class _Replay:
    """What one round does for one contender: `run()`, between two events."""

    timing: Timing
    run: Callable[[], Any]
    keep: Any = None  # the graph's memory and the functions it captured


def _measure_gpu(
    contenders: Mapping[str, Function | Sequence[Function]],
    cold: bool,
    effort: Effort,
    plainly: Collection[str],
) -> dict[str, Timing]:
    flush = _flusher() if cold else None
    replays = {
        name: _prepare(_functions(contender), flush, effort, name in plainly)
        for name, contender in contenders.items()
    }
    if flush is not None:
        replays["flush"] = _prepare((flush,), None, effort)
    for replay in replays.values():
        _poison(replay.timing.output)
        replay.run()
    torch.cuda.synchronize()
    for _ in range(effort.rounds):
        pairs = [(replay, *timed(replay.run)) for replay in replays.values()]
        torch.cuda.synchronize()
        for replay, begin, end in pairs:
            elapsed_us = begin.elapsed_time(end) * 1e3
            replay.timing.samples_us.append(elapsed_us / replay.timing.calls)
    if flush is not None:
        flush_us = replays.pop("flush").timing.median_us
        for replay in replays.values():
            timing = replay.timing
            timing.samples_us = [max(0.0, sample - flush_us) for sample in timing.samples_us]
    for replay in replays.values():  # out of the graph's memory, which goes with the graph
        output = replay.timing.output
        replay.timing.output = None if output is None else output.clone()
    return {name: replay.timing for name, replay in replays.items()}


def timed(run: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Queue one run between two events, behind enough work to hide the host's own time."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(GPU_HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    return begin, end


def _prepare(
    functions: Sequence[Function], flush: Function | None, effort: Effort, plainly: bool = False
) -> _Replay:
    """Warm up, choose the number of calls, and capture them; plain calls where that fails."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(8):
        functions[i % len(functions)]()
    end.record()
    torch.cuda.synchronize()
    # Host-bound for tiny kernels, so this asks for too few calls there, never for too many; the
    # factor 2 makes up for most of it.
    once_us = begin.elapsed_time(end) * 1e3 / 8
    calls = _calls(once_us / 2 if flush is None else once_us + 40, effort, len(functions))
    timing = Timing("graph", calls)

    def once_each() -> None:
        for i in range(calls):
            if flush is not None:
                flush()
            timing.output = functions[i % len(functions)]()

    try:
        if plainly:
            raise Uncapturable("called plainly, host time included")
        graph = capture(once_each)
    except Uncapturable as error:
        timing.how = f"events: {error}"
        return _Replay(timing, once_each, functions)
    return _Replay(timing, graph.replay, (graph, functions))


class Uncapturable(RuntimeError):
    """A function that cannot run inside a CUDA-graph capture; the text says why."""


# torch's allocator may go on asking a graph whose capture failed; it must not be freed.
_failed_captures: list[torch.cuda.CUDAGraph] = []


def capture(body: Callable[[], Any], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record what `body` launches on torch's current stream in a CUDA graph.

    pool: of another graph (`graph.pool()`), whose memory this one takes too; they run in turn.

    Raises:
        Uncapturable: the body raised, or launched nothing on the captured stream.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.cuda.graph(graph, pool):
                body()
        except Exception as error:  # every backend has its own class for a launch that fails
            torch.cuda.set_stream(stream)  # torch leaves its capture stream current here
            torch.cuda.synchronize()
            _failed_captures.append(graph)
            first_line = (str(error).splitlines() or [""])[0]
            raise Uncapturable(f"{type(error).__name__}: {first_line[:160]}") from error
    if any("empty" in str(warning.message) for warning in caught):
        raise Uncapturable("nothing was launched on torch's current stream")
    return graph


def _flusher() -> Function:
    """A function that writes twice the L2, so that what follows reads device memory."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
    return buffer.zero_


def _poison(output: Tensor | None) -> None:
    """Overwrite the output's memory, so that a replay that writes nothing fails parity."""
    if output is not None and output.is_floating_point():
        output.fill_(float("nan"))
