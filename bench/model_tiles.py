"""What `mirage tune --model` times: the tiles of a model's networks, each in the captured network.

The U-Net's step with prepared conditions as a stream runs it, the same in e4m3, and the autoencoder
there and back. A place (op, key) is timed in the first network that asks it. A tile counts if the
call that was recorded of it is right, twice the same, and the network's error with it at most
SLACK of what it is with the tiles in use.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import tuning, use
from mirage_hello.kernels.parity import exact_float32
from mirage_hello.model import fp8

from . import model, model_calls, step_tiles
from .rows import STEP_SECONDS, Begin, Options, Outcome
from .tune import TILE_SECONDS, Called, Tuned

TOGETHER = 8  # places whose candidates are compiled while those before are timed
GAINED_ROUNDS, LAST_SECONDS = 60, 4.0  # and what they and the captures take at the end of a budget
SLACK = 1.1  # other orders of sums move the error of a network by a few percent


@dataclass(frozen=True)
class Network:
    """A function of a model that is captured as one graph, and the float32 model's output."""

    name: str
    run: Callable[[], Tensor]
    truth: Tensor


@dataclass
class Timed:
    """A network's step, and all that a place is judged by."""

    network: Network
    step: step_tiles.Step
    calls: dict[step_tiles.Place, Any]
    allowed: float  # error against the truth
    pool: Any

    def unit(self, place: step_tiles.Place, tiles: list[Any]) -> model.Unit:
        where = {"op": place[0], "case": place[1], "dtype": self.network.name}
        return model.Unit(where, functools.partial(self.measured, where, place, tiles))

    def measured(
        self,
        where: dict[str, str],
        place: step_tiles.Place,
        tiles: list[Any],
        begin: Begin,
        lost: Sequence[str],
    ) -> Outcome:
        """The fastest of the right tiles, which the step keeps."""
        alone = self.alone(where, place)
        was, right, wrong = self.step.tiles[place], [], {}
        for tile in (t for t in tiles if tuning.name(t) not in lost):
            begin(tuning.name(tile), TILE_SECONDS)
            problem = alone(tile) or self.problem({place: tile})
            if problem is None:
                right.append(tile)
            else:
                wrong[tuning.name(tile)] = problem
        begin("timing", STEP_SECONDS)
        if was not in right or len(right) == 1:
            return Outcome()
        found = step_tiles.best(self.step, place, right, self.pool)
        entry = {
            "tile": found["tile"],
            "timing": f"in {self.network.name}",
            "effect_us": found["effect_us"],
            "was": tuning.encoded(was),
        }
        result = {"asks": place[0], "key": place[1], "entry": entry}
        return Outcome(
            tiles=[{**where, **result, "effects_us": found["effects_us"], "wrong": wrong}]
        )

    def alone(self, where: dict[str, str], place: step_tiles.Place) -> Callable[[Any], str | None]:
        """What is wrong with a tile in the call that was recorded; nothing where none was."""
        if place not in self.calls:
            return lambda tile: None
        run, args, kwargs = self.calls[place]
        judge = model_calls.held_against_its_own(run, args, kwargs)
        return Tuned(Called(where, run, args, kwargs, judge), self.step.requests[place], 0).problem

    def problem(self, changes: step_tiles.Tiles) -> str | None:
        """What is wrong with the network's output with other tiles."""
        found = model.relative_error(self.step.with_tiles(changes), self.network.truth)
        if found <= self.allowed:
            return None
        return f"the network's error is {found:.2e} of {self.allowed:.2e}"


@torch.no_grad()
def units(options: Options) -> Iterator[model.Unit]:
    """A unit for each place of each network, the heaviest first, and one for what came of them."""
    seen: set[step_tiles.Place] = set()
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        for network in networks(options):
            with model_calls.recorded() as calls:
                out = network.run()
            step = step_tiles.Step(network.run)
            before = dict(step.tiles)
            allowed = SLACK * model.relative_error(out, network.truth)
            pool = torch.cuda.graph_pool_handle()
            held = step.captured({}, pool)  # graphs find the pool's memory where it was
            step_tiles.still()
            timed = Timed(network, step, calls, allowed, pool)
            places = [place for place in step.heaviest() if place not in seen]
            seen |= set(places)
            for place, tiles in compiled(step, places, options.tiles, compilers):
                if time.time() > options.deadline - LAST_SECONDS:
                    break
                yield timed.unit(place, tiles)
            where = {"op": "step", "case": network.name, "dtype": ""}
            yield model.Unit(where, functools.partial(gained, timed, before))
            del held
            if time.time() > options.deadline - LAST_SECONDS:
                return


def compiled(
    step: step_tiles.Step, places: list[step_tiles.Place], count: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[step_tiles.Place, list[Any]]]:
    """Places and their candidates; the next few are compiled while these are timed."""
    parts = [places[i : i + TOGETHER] for i in range(0, len(places), TOGETHER)]

    def begun(part: list[step_tiles.Place]) -> tuple[step_tiles.Tiles, list[Future]]:
        candidates = {place: step.candidates(place, count, count) for place in part}
        return candidates, step_tiles.compiling(step, candidates, pool)

    following = begun(parts[0]) if parts else ({}, [])
    for i in range(len(parts)):
        candidates, jobs = following
        step_tiles.done(jobs)
        if i + 1 < len(parts):
            following = begun(parts[i + 1])
        yield from candidates.items()


def gained(timed: Timed, before: step_tiles.Tiles, begin: Begin, lost: Sequence[str]) -> Outcome:
    """Prints what the network takes with the tiles that it had, and with those that were found."""
    begin("timing", STEP_SECONDS)
    graphs = {"before": timed.step.captured(before, timed.pool)}
    graphs["after"] = timed.step.captured({}, timed.pool)
    found = step_tiles.replays_us(graphs, GAINED_ROUNDS)
    was, now = (statistics.median(found[name]) for name in ("before", "after"))
    print(f"{timed.network.name}: {was:.1f} us, now {now:.1f} us", flush=True)
    return Outcome()


@torch.no_grad()
def networks(options: Options) -> Iterator[Network]:
    """The networks of a model; the U-Net multiplies in e4m3 while its second turn lasts."""
    models = model.Models(options)
    unet, autoencoder = models.plain[0].unet, models.plain[1]
    width, height = options.size[1], options.size[0]
    name = f"{options.preset} {width}x{height}"
    x, timesteps, context, level = model.unet_inputs(unet.config, options, models.dtype)
    exact = model.unet_inputs(unet.config, options, models.reference_dtype)
    frames = torch.rand(1, 3, height, width, device=options.device) * 2 - 1
    with use("torch"), exact_float32():
        truth = models.reference[0].unet(*exact)
        pictures = models.reference[1](frames.to(models.reference_dtype))
    del models.__dict__["reference"]
    biases = unet.noise_biases(timesteps, level)
    keys = unet.context_keys(context, lasting=True)
    step = functools.partial(unet, x, biases, keys)
    with fp8.noted() as maxima:
        step()
    yield Network(f"{name} step", step, truth)
    fp8.use(unet, fp8.scales_for(unet, maxima))
    try:
        keys = unet.context_keys(context, lasting=True)
        yield Network(f"{name} step, e4m3", functools.partial(unet, x, biases, keys), truth)
    finally:
        fp8.use(unet, {})
    clip = frames.to(models.dtype)
    yield Network(f"{name} autoencoder", functools.partial(autoencoder, clip), pictures)
