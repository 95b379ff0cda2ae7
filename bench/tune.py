"""Times the tiles of the kernels that have some, shape by shape: what `mirage tune` measures.

A kernel is started under a listener (kernels/tuning.py) that hears what it asks and answers with
one candidate after another: the COUNT best by the kernel's own model, no more than ALIKE of one
block shape, and the one in use. Each must pass parity and give the same bits twice before it is
timed; those that do are timed in turn, with rotating weights where the op has weights, as a layer
meets them in a model. A candidate that hangs or crashes costs itself (see supervisor.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import Kernel, forget_choices, ops, tuning, use
from mirage_hello.kernels.call import Call, TensorSpec
from mirage_hello.kernels.parity import poison
from mirage_hello.ptx import loader

from .case import Case, Draw
from .harness import Effort, measure
from .rows import (
    STEP_SECONDS,
    Begin,
    Options,
    Outcome,
    Subject,
    left_out,
    op_named,
    prepare,
    rotated,
)

EFFORT = Effort(rounds=8, sample_us=400.0)
COMPILE_SECONDS = 120.0  # of all candidates of a shape, on every core
TILE_SECONDS = 20.0  # a tile's first runs; one that takes longer hangs
ALIKE = 3
NOISE = 0.01  # the model's own choice stays unless another is faster by more than this
WEIGHTS = ("weight", "bias")  # parameters that come from device memory in a model


def tune_case(
    case: Case,
    dtype: str,
    options: Options,
    begin: Begin = lambda step, seconds: None,
    lost: Sequence[str] = (),
) -> Outcome:
    """The tiles of every kernel of the case's op that has some, in `outcome.tiles`."""
    outcome = Outcome()
    begin("inputs", STEP_SECONDS)
    subject = prepare(case, dtype, options)
    for kernel in tiled(subject.call, options):
        for request in requests(kernel, subject.args):
            tuned = Tuned(subject, kernel, request, options.tiles)
            outcome.tiles += tuned.measured(begin, lost)
    return outcome


def tiled(call: Call, options: Options) -> list[Kernel]:
    """The kernels with tiles that can run this call, of the newest architecture."""
    able = [
        kernel
        for kernel in op_named(call.op).kernels
        if tuning.has_tiles(kernel.run) and not left_out(kernel, call, options)
    ]
    newest = min((kernel.order[1] for kernel in able), default=0)
    return [kernel for kernel in able if kernel.order[1] == newest]


def requests(kernel: Kernel, args: tuple) -> list[tuning.Request]:
    """What a kernel asks in one call, each once; nothing is launched."""
    heard: dict[tuple[str, str], tuning.Request] = {}

    def listen(request: tuning.Request) -> Any:
        heard[request.op, request.key] = request
        return tuning.choose(request).tile

    with tuning.listening(listen), unlaunched():
        kernel.run(*args)
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
    """One request of one kernel, and the candidates that are measured for it."""

    subject: Subject
    kernel: Kernel
    request: tuning.Request
    count: int

    def run(self, tile: Any, *args: Any) -> Tensor:
        """The kernel with this tile; whatever else it asks gets what it would get."""

        def answer(request: tuning.Request) -> Any:
            mine = (request.op, request.key) == (self.request.op, self.request.key)
            return tile if mine else tuning.choose(request).tile

        with tuning.listening(answer):
            return self.kernel.run(*args)

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
        begin("tiles compiled", COMPILE_SECONDS)
        self.compile(candidates)
        wrong, right = {}, []
        for tile in candidates:
            begin(tuning.name(tile), TILE_SECONDS)
            problem = self.problem(tile)
            if problem:
                wrong[tuning.name(tile)] = problem
            else:
                right.append(tile)
        begin("timing", STEP_SECONDS)
        times = self.times(right) if right else {}
        return [self.result(times, wrong)] if times else []

    def compile(self, candidates: list[Any]) -> None:
        """All programs into the kernel cache, on every core."""
        if self.subject.call.device.type != "cuda":
            return
        with unlaunched() as programs:
            for tile in candidates:
                self.run(tile, *self.subject.args)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda program: program.compile(self.subject.call.arch), programs))

    def problem(self, tile: Any) -> str | None:
        """Why this tile is not timed."""
        with torch.no_grad():
            poison(self.subject.plain)
            out = self.run(tile, *self.subject.args)
            again = self.run(tile, *self.subject.args)
        parity = self.subject.judge(out)
        if not parity.passed:
            return str(parity)
        return None if torch.equal(out, again) else "two runs differ"

    @property
    def timing(self) -> str:
        return "cold-weights" if self.subject.case.weights else "hot"

    def times(self, tiles: list[Any]) -> dict[Any, float]:
        """tile -> median us, fastest first."""
        sets = rotated(self.subject) if self.timing == "cold-weights" else [self.subject.args]
        runs: dict[str, list[Callable[[], Tensor]]] = {
            tuning.name(tile): [functools.partial(self.run, tile, *args) for args in sets]
            for tile in tiles
        }
        timings = measure(runs, self.subject.call.device.type, effort=EFFORT)
        found = {tile: timings[tuning.name(tile)].median_us for tile in tiles}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def result(self, times: dict[Any, float], wrong: dict[str, str]) -> dict[str, Any]:
        """What the run's file keeps: the entry of the tables, and every time."""
        own = self.request.ranked()[0]
        order = sorted(times, key=lambda t: times[t] * (1 - NOISE * (t == own)))
        best, second = order[0], order[1] if len(order) > 1 else None
        entry = {
            "tile": tuning.encoded(best),
            "time_us": round(times[best], 3),
            "timing": self.timing,
            "runner_up": tuning.encoded(second),
            "runner_up_us": round(times[second], 3) if second is not None else None,
            "model": tuning.encoded(own),
            "model_us": round(times[own], 3) if own in times else None,
        }
        named = {tuning.name(tile): round(us, 3) for tile, us in times.items()}
        place = {"kernel": self.kernel.name, "asks": self.request.op, "key": self.request.key}
        return {**self.subject.where, **place, "entry": entry, "times_us": named, "wrong": wrong}


def block(tile: Any) -> Any:
    """What makes two tiles alike: the first two fields, the shape of a block."""
    if not dataclasses.is_dataclass(tile):
        return tile
    return tuple(getattr(tile, f.name) for f in dataclasses.fields(tile)[:2])


def table(results: list[dict[str, Any]]) -> tuning.Table:
    """The results as kernels/tuning.py stores them."""
    found: tuning.Table = {}
    for result in results:
        found.setdefault(result["asks"], {})[result["key"]] = result["entry"]
    return found


def line(result: dict[str, Any]) -> str:
    """`conv2d 320->320 @64   Tile(...) 11.80 us; model's Tile(...) 12.10 us; 8 right, 0 wrong`."""
    entry, best = result["entry"], next(iter(result["times_us"]))
    text = f"{result['asks']:10} {result['case'][:44]:44} {best} {entry['time_us']:.2f} us"
    if entry["model"] != entry["tile"] and entry["model_us"]:
        text += f"; model's {entry['model_us']:.2f}"
    if entry["runner_up_us"]:
        text += f"; runner-up {entry['runner_up_us']:.2f}"
    return f"{text}; {len(result['times_us'])} right, {len(result['wrong'])} wrong"


# The calls of the model


def model_cases(options: Options) -> list[tuple[Case, str]]:
    """Every different call of a kernel with tiles in one step of the model, as a case."""
    from . import model

    calls: dict[str, Call] = {}

    def recorded(kernel: Kernel) -> Kernel:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            call = getattr(ops, kernel.op).describe(args, kwargs)
            calls.setdefault(f"{call.op} {name_of(call)}", call)
            return kernel.run(*args, **kwargs)

        return dataclasses.replace(kernel, run=run) if tuning.has_tiles(kernel.run) else kernel

    kept = {op.name: list(op.kernels) for op in ops}
    models = model.Models(options)
    unet = models.plain[0].unet
    inputs = model.unet_inputs(unet.config, options, models.dtype)
    try:
        for op in ops:
            op.kernels[:] = map(recorded, kept[op.name])
        forget_choices()
        with torch.no_grad(), use("auto"):
            unet(*inputs)
    finally:
        for op in ops:
            op.kernels[:] = kept[op.name]
        forget_choices()
    return [(case_of(call), str(call.dtype).removeprefix("torch.")) for call in calls.values()]


def name_of(call: Call) -> str:
    """The call's label, with the optional tensors that were given."""
    given = [name for name in call.tensors if name in call.optional]
    return " ".join([call.label, *(f"+{name}" for name in given)])


def case_of(call: Call) -> Case:
    """A case that draws arguments like this call's: same shapes, strides and numbers."""
    names, values = list(call.args), list(call.args.values())

    def make(draw: Draw) -> tuple:
        return tuple(drawn(draw, value) if isinstance(value, TensorSpec) else value
                     for value in values)  # fmt: skip

    weights = tuple(i for i, name in enumerate(names)
                    if name in WEIGHTS and isinstance(values[i], TensorSpec))  # fmt: skip
    return Case(call.op, name_of(call), make, flops=0, elements=0, weights=weights)


def drawn(draw: Draw, spec: TensorSpec) -> Tensor:
    """Normal values; a weight's are scaled by its fan-in, as a trained layer's are."""
    scale = spec.shape[1:].numel() ** -0.5 if spec.dim in (2, 4) else 1.0
    out = torch.empty_strided(spec.shape, spec.stride, dtype=draw.dtype, device=draw.device)
    return out.copy_(draw.normal(*spec.shape, scale=scale))
