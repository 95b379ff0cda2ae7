"""Tiles timed where they run: in the captured step of a model.

A kernel that repeats itself finds its weights in the L2 and its own tail before it. In a network
the weights come from device memory and the neighbours' tails and prologues overlap, so what is
fastest alone need not be fastest there. Here one choice of a step is changed, the step is captured
again as a CUDA graph and replayed in turn with the others:

    effect_us = median over rounds of (replay with the candidate - replay as it was)

A step asks for the tile of a place (op, key) as often as the shape occurs in it, so the effect is
that of all its calls together. Candidates are the best of the kernel's own model and those that
`near` gives for the tile in use. A place keeps its tile unless another is faster by LEAST_US twice:
among all, then among the fastest few in more rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import tuning
from mirage_hello.kernels.call import device_arch

from . import harness
from .tune import block, unlaunched

Place = tuple[str, str]  # op and key of a request
Tiles = dict[Place, Any]

ALIKE = 3  # candidates of one block shape
FEW = 4
FIRST_ROUNDS, LAST_ROUNDS, LAST = 10, 60, 2  # rounds of all; of the LAST fastest
LEAST_US = 1.0  # of a step, whose replays differ by 5 us: what 60 rounds tell apart


@dataclass
class Step:
    """A function of fixed shapes, what it asks, and the tiles that answer.

    run: takes nothing, returns a tensor; the same launches at every call but for the tiles.
    """

    run: Callable[[], Tensor]
    requests: dict[Place, tuning.Request] = field(default_factory=dict)
    calls: Counter[Place] = field(default_factory=Counter)
    tiles: Tiles = field(default_factory=dict)

    def __post_init__(self) -> None:
        def listen(request: tuning.Request) -> Any:
            place = request.op, request.key
            self.calls[place] += 1
            if place not in self.tiles:
                self.requests[place] = request
                self.tiles[place] = tuning.choose(request).tile
            return self.tiles[place]

        with torch.no_grad(), tuning.listening(listen):
            self.run()

    def take(self, stored: Mapping[Place, Any]) -> None:
        """Tiles as `tuning.encoded` writes them, where they are still candidates."""
        for place, text in stored.items():
            tile = tuning.decoded(text, self.requests[place]) if place in self.requests else None
            if tile is not None:
                self.tiles[place] = tile

    def with_tiles(self, changes: Mapping[Place, Any]) -> Tensor:
        """One run, op by op, with other tiles at some places."""
        tiles = self.tiles | dict(changes)

        def answer(request: tuning.Request) -> Any:
            place = request.op, request.key
            if place not in tiles:
                tiles[place] = tuning.choose(request).tile
            return tiles[place]

        with torch.no_grad(), tuning.listening(answer):
            return self.run()

    def captured(self, changes: Mapping[Place, Any], pool: Any = None) -> torch.cuda.CUDAGraph:
        """The step as a graph; graphs of one pool lie at the same addresses, and run in turn."""
        return harness.capture(lambda: self.with_tiles(changes), pool)

    def heaviest(self) -> list[Place]:
        """Places by the time that their kernels' models give all their calls, the longest first.
        Of those that have a rule in the place of a model, whose choice costs 0, the ones with a few
        candidates come before, the others after: cuts of a GroupNorm bring little."""

        def cost(place: Place) -> float:
            ranked = self.requests[place].ranked()
            if self.requests[place].cost(ranked[0]) == 0:
                return float("inf") if len(ranked) <= FEW else 0.0
            return self.calls[place] * self.requests[place].cost(self.tiles[place])

        return sorted(self.calls, key=cost, reverse=True)

    def candidates(self, place: Place, near: int, best: int) -> list[Any]:
        """The tile in use; those that differ from it in one field, but for the block's shape, at
        most `near`; the `best` by the model, no more than ALIKE of one block shape."""
        now, ranked = self.tiles[place], self.requests[place].ranked()
        picked = [now, *[t for t in ranked if _one_field_apart(t, now)][:near]]
        alike = Counter(block(t) for t in picked[:1])
        chosen: list[Any] = []
        known = set(ranked)
        for tile in ranked:
            plain = _plain(tile)
            if (tile == plain or plain not in known) and alike[block(tile)] < ALIKE:
                alike[block(tile)] += 1
                chosen.append(tile)
        return list(dict.fromkeys([*picked, *chosen[:best]]))


def _plain(tile: Any) -> Any:
    """A tile without what the models of its time do not see: its ring."""
    if not dataclasses.is_dataclass(tile):
        return tile
    whole: Any = tile
    return dataclasses.replace(whole, stages=None) if hasattr(tile, "stages") else whole


def _one_field_apart(a: Any, b: Any) -> bool:
    """Whether two tiles differ in one field that is not of a block's shape."""
    if block(a) != block(b) or not dataclasses.is_dataclass(a):
        return False  # numbers and words have no fields
    return sum(getattr(a, f.name) != getattr(b, f.name) for f in dataclasses.fields(a)) == 1


def compiling(
    step: Step, candidates: Mapping[Place, list[Any]], pool: ThreadPoolExecutor
) -> list[Future]:
    """Every candidate on its way into the kernel cache: ptxas is a process of its own."""
    with unlaunched() as programs:
        for i in range(max(map(len, candidates.values()), default=0)):
            turn = {place: tiles[i] for place, tiles in candidates.items() if i < len(tiles)}
            try:
                step.with_tiles(turn)
            except (RuntimeError, ValueError):  # one of them is refused: each by itself
                for place, tile in turn.items():
                    with contextlib.suppress(RuntimeError, ValueError):
                        step.with_tiles({place: tile})
    arch = device_arch(torch.device("cuda", torch.cuda.current_device()))
    return [pool.submit(program.compile, arch) for program in programs]


def compile_all(step: Step, candidates: Mapping[Place, list[Any]]) -> None:
    """Every candidate into the kernel cache, on every core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done(compiling(step, candidates, pool))


def done(jobs: list[Future]) -> None:
    """Waits; what does not compile is reported when its own turn comes."""
    for job in jobs:
        job.exception()


def replays_us(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """name -> microseconds of each replay; the graphs are replayed in turn, another one first in
    each round, behind one that does not count: the first after the host waited is slower."""
    names = list(graphs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        graphs[names[first - 1]].replay()
        turn = names[first:] + names[:first]
        timed = {name: harness.timed(graphs[name].replay) for name in turn}
        torch.cuda.synchronize()
        for name, (begin, end) in timed.items():
            samples[name].append(begin.elapsed_time(end) * 1e3)
    return samples


def effects_us(
    step: Step, changes: Mapping[str, Mapping[Place, Any]], rounds: int, pool: Any = None
) -> dict[str, float]:
    """name -> microseconds that the change adds to the step: the median over the rounds.

    Raises:
        harness.Uncapturable: a change that the step does not run with.
    """
    graphs = {name: step.captured(change, pool) for name, change in changes.items()}
    samples = replays_us({"": step.captured({}, pool)} | graphs, rounds)
    base = samples.pop("")
    return {
        name: statistics.median(a - b for a, b in zip(found, base, strict=True))
        for name, found in samples.items()
    }


def best(step: Step, place: Place, tiles: list[Any], pool: Any = None) -> dict[str, Any]:
    """Times the tiles at a place, the one in use first, and keeps the fastest in the step.

    Returns:
        {"tile", "effect_us", "effects_us": every tile's}; effect_us is 0 where nothing changed.
    """
    now, *others = tiles
    named = {tuning.name(tile): tile for tile in others}
    changes = {name: {place: tile} for name, tile in named.items()}
    found = effects_us(step, changes, FIRST_ROUNDS, pool)
    last = sorted((n for n in found if found[n] < 0), key=lambda n: found[n])[:LAST]
    again = effects_us(step, {n: changes[n] for n in last}, LAST_ROUNDS, pool) if last else {}
    found |= again
    winner = min(again, key=lambda n: again[n], default=None)
    effect = 0.0
    if winner is not None and again[winner] < -LEAST_US:
        now, effect = named[winner], again[winner]
        step.tiles[place] = now
    rounded = {name: round(us, 2) for name, us in sorted(found.items(), key=lambda i: i[1])}
    return {"tile": tuning.encoded(now), "effect_us": round(effect, 2), "effects_us": rounded}


def still() -> None:
    """Takes what is alive out of the garbage collector's way: a capture collects."""
    gc.collect()
    gc.freeze()
