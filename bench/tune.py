"""Times the tiles of the kernels that have some, shape by shape: what `mirage tune` measures.

A kernel is started under a listener (kernels/tuning.py) that hears what it asks and answers with
one candidate after another: the COUNT best by the kernel's own model, no more than ALIKE of one
block shape, and the one in use. Each must pass parity and give the same bits twice before it is
timed; those that do are timed in turn, with rotating weights where the op has weights, as a layer
meets them in a model. A candidate that hangs or crashes costs itself (see supervisor.py). Those of
a model are timed where they run, in the captured networks: model_tiles.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import (
    Kernel,
    tuning,
)
from mirage_hello.kernels.call import Call, device_arch
from mirage_hello.kernels.parity import Parity, poison
from mirage_hello.ptx import loader

from .case import Case
from .harness import MAX_CALLS, Effort, measure
from .rows import ROTATED_BYTES, STEP_SECONDS, Begin, Options, Outcome, left_out, op_named, prepare

EFFORT = Effort(rounds=8, sample_us=400.0)
COMPILE_SECONDS = 300.0  # of all candidates of all shapes, on every core
TILE_SECONDS = 20.0  # a tile's first runs; one that takes longer hangs
ALIKE = 3
NOISE = 0.01  # the model's own choice stays unless another is faster by more than this
WEIGHTS = ("weight", "bias", "columns")  # parameters that come from device memory in a model

Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Called:
    """A call of a kernel with tiles.

    where: op, case and dtype, for the results.
    judge: what an output is held against.
    """

    where: dict[str, str]
    run: Run
    args: tuple
    kwargs: dict[str, Any]
    judge: Callable[[Tensor], Parity]

    @property
    def device(self) -> torch.device:
        return next(a.device for a in self.args if isinstance(a, Tensor))

    def arguments(self) -> list[tuple[tuple, dict[str, Any]]]:
        """Enough copies that their weights do not stay in the L2; one where there are none."""
        names = list(inspect.signature(self.run).parameters)[: len(self.args)]
        own = {
            i
            for i, (name, value) in enumerate(zip(names, self.args, strict=True))
            if name in WEIGHTS and isinstance(value, Tensor)
        }
        size = sum(self.args[i].numel() * self.args[i].element_size() for i in own)
        sets = [(self.args, self.kwargs)]
        while own and len(sets) * size < ROTATED_BYTES and len(sets) < MAX_CALLS:
            copies = (copied(a) if i in own else a for i, a in enumerate(self.args))
            sets.append((tuple(copies), self.kwargs))
        return sets


def calls_of(case: Case, dtype: str, options: Options) -> list[Called]:
    """A call of each kernel of the case's op that has tiles."""
    subject = prepare(case, dtype, options)
    return [
        Called(subject.where, kernel.run, subject.args, {}, subject.judge)
        for kernel in tiled(subject.call, options)
    ]


def tune_call(
    called: Called,
    count: int,
    begin: Begin = lambda step, seconds: None,
    lost: Sequence[str] = (),
) -> Outcome:
    """The tiles of everything that the call asks, in `outcome.tiles`."""
    outcome = Outcome()
    for request in requests(called.run, called.args, called.kwargs):
        outcome.tiles += Tuned(called, request, count).measured(begin, lost)
    return outcome


def compile_all(calls: Sequence[Called], count: int) -> None:
    """Every candidate of every call into the kernel cache, on every core."""
    on_gpu = [called for called in calls if called.device.type == "cuda"]
    if not on_gpu:
        return
    with unlaunched() as programs:
        for called in on_gpu:
            for request in requests(called.run, called.args, called.kwargs):
                tuned = Tuned(called, request, count)
                for tile in tuned.candidates():
                    tuned.run(tile, called.args, called.kwargs)
    arch = device_arch(on_gpu[0].device)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(program.compile, arch) for program in programs]
    for job in jobs:
        if job.exception():  # the tile's own turn reports it
            print(f"a candidate does not compile: {str(job.exception())[:200]}", file=sys.stderr)


def tiled(call: Call, options: Options) -> list[Kernel]:
    """The kernels with tiles that can run this call, of the newest architecture."""
    able = [
        kernel
        for kernel in op_named(call.op).kernels
        if tuning.has_tiles(kernel.run) and not left_out(kernel, call, options)
    ]
    newest = min((kernel.order[1] for kernel in able), default=0)
    return [kernel for kernel in able if kernel.order[1] == newest]


def requests(run: Run, args: tuple, kwargs: dict[str, Any]) -> list[tuning.Request]:
    """What a call asks, each once; nothing is launched."""
    heard: dict[tuple[str, str], tuning.Request] = {}

    def listen(request: tuning.Request) -> Any:
        heard[request.op, request.key] = request
        return tuning.choose(request).tile

    with torch.no_grad(), tuning.listening(listen), unlaunched():
        run(*args, **kwargs)
    return list(heard.values())


@contextlib.contextmanager
def unlaunched() -> Iterator[set[loader.Program]]:
    """Within the block programs are collected in place of being launched."""
    programs: set[loader.Program] = set()

    def collect(program: loader.Program, *launch: Any, **more: Any) -> None:
        programs.add(program)

    with unittest.mock.patch.object(loader.Program, "launch", collect):
        yield programs


@dataclasses.dataclass
class Tuned:
    """One request of one call, and the candidates that are measured for it."""

    called: Called
    request: tuning.Request
    count: int

    def run(self, tile: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The call with this tile; whatever else it asks gets what it would get."""

        def answer(request: tuning.Request) -> Any:
            mine = (request.op, request.key) == (self.request.op, self.request.key)
            return tile if mine else tuning.choose(request).tile

        with torch.no_grad(), tuning.listening(answer):
            out = self.called.run(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def candidates(self) -> list[Any]:
        """The best by the kernel's model, the first its own choice; then the one in use."""
        picked: list[Any] = []
        for tile in self.request.ranked():
            alike = [t for t in picked if block(t) == block(tile)]
            if len(alike) < ALIKE and len(picked) < self.count:
                picked.append(tile)
        return list(dict.fromkeys([*picked, tuning.choose(self.request).tile]))

    def measured(self, begin: Begin, lost: Sequence[str]) -> list[dict[str, Any]]:
        """[] where no candidate is right, else one result."""
        candidates = [t for t in self.candidates() if tuning.name(t) not in lost]
        wrong, right = {}, []
        for tile in candidates:
            begin(tuning.name(tile), TILE_SECONDS)
            problem = self.problem(tile)
            if problem:
                wrong[tuning.name(tile)] = problem
            else:
                right.append(tile)
        begin("timing", STEP_SECONDS)
        return [self.result(right, wrong)] if right else []

    def problem(self, tile: Any) -> str | None:
        """Why this tile is not timed."""
        try:
            out = self.run(tile, self.called.args, self.called.kwargs)
        except (RuntimeError, ValueError) as error:  # too much shared memory, no such instruction
            return f"{type(error).__name__}: {str(error)[:200]}"
        poison(out)
        again = self.run(tile, self.called.args, self.called.kwargs)
        parity = self.called.judge(again)
        if not parity.passed:
            return str(parity)
        return None if torch.equal(out, again) else "two runs differ"

    def result(self, tiles: list[Any], wrong: dict[str, str]) -> dict[str, Any]:
        """Times the tiles; what the run's file keeps: the entry of the tables, and every time."""
        sets = self.called.arguments()
        runs = {
            tuning.name(tile): [functools.partial(self.run, tile, *given) for given in sets]
            for tile in tiles
        }
        timings = measure(runs, self.called.device.type, effort=EFFORT)
        times = {tile: timings[tuning.name(tile)].median_us for tile in tiles}
        own = self.request.ranked()[0]
        order = sorted(times, key=lambda t: times[t] * (1 - NOISE * (t == own)))
        best, second = order[0], order[1] if len(order) > 1 else None
        entry = {
            "tile": tuning.encoded(best),
            "time_us": round(times[best], 3),
            "timing": "cold-weights" if len(sets) > 1 else "hot",
            "runner_up": tuning.encoded(second),
            "runner_up_us": round(times[second], 3) if second is not None else None,
            "model": tuning.encoded(own),
            "model_us": round(times[own], 3) if own in times else None,
        }
        named = {tuning.name(tile): round(times[tile], 3) for tile in order}
        place = {"asks": self.request.op, "key": self.request.key}
        return {**self.called.where, **place, "entry": entry, "times_us": named, "wrong": wrong}


def block(tile: Any) -> Any:
    """What makes two tiles alike: the first two fields, the shape of a block."""
    if not dataclasses.is_dataclass(tile):
        return tile
    return tuple(getattr(tile, f.name) for f in dataclasses.fields(tile)[:2])


def table(results: list[dict[str, Any]]) -> tuning.Table:
    """The results as kernels/tuning.py stores them."""
    found: tuning.Table = {}
    for result in results:
        if result["entry"]["tile"] == result["entry"].get("was"):
            continue  # timed in a network and not bettered: what is stored of it stays
        found.setdefault(result["asks"], {})[result["key"]] = result["entry"]
    return found


def line(result: dict[str, Any]) -> str:
    """`conv2d 320->320 @64   Tile(...) 11.80 us; model's Tile(...) 12.10 us; 8 right, 0 wrong`; of
    a place in a network how much faster the network is."""
    entry = result["entry"]
    if "effect_us" in entry:
        text = f"{entry['effect_us']:7.2f} us {result['asks']} {result['case']}: {entry['tile']}"
        return f"{text}; {len(result['effects_us'])} others, {len(result['wrong'])} wrong"
    best = next(iter(result["times_us"]))
    text = f"{result['asks']:10} {result['case'][:44]:44} {best} {entry['time_us']:.2f} us"
    if entry["model"] != entry["tile"] and entry["model_us"]:
        text += f"; model's {entry['model_us']:.2f}"
    if entry["runner_up_us"]:
        text += f"; runner-up {entry['runner_up_us']:.2f}"
    return f"{text}; {len(result['times_us'])} right, {len(result['wrong'])} wrong"


def copied(value: Any) -> Any:
    """Tensors with the same strides in memory of their own; of a dataclass, its tensors."""
    if isinstance(value, Tensor):
        out = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        return out.copy_(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{k: copied(v) for k, v in vars(value).items()})
    return value
