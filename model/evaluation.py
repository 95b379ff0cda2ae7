"""Closed-loop evaluation against rendered truth: thousands of frames of the model's own outputs.

    evaluation = Evaluation(EvalConfig(frames=1000), device)
    numbers, = evaluate([Candidate("tiny", denoiser, autoencoder)], evaluation)

All streams (seeds x styles) of all candidates advance together, so each frame is rendered once.
The truth is drawn for the same frames: every number is against what should have been there, with
no reference video and no downloaded metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mirage_hello.model import metrics
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.data.city import HELD_OUT, City
from mirage_hello.model.data.film import Film
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import Shot, WorldConfig, Worlds
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.drift import Curves, by_seed, excerpt, summary
from mirage_hello.model.memory_probe import memory_db
from mirage_hello.model.persistence import persistence
from mirage_hello.model.rollout import Rollout, quantised
from mirage_hello.model.samplers import NOISE_CORRELATION

EARLY_EVERY = 4  # the burn-in is measured at least so often
SHORTER = (1000,)  # a longer run is also summed up to here
FIRST = 100  # clips are entered here, where snow and puddles have begun


@dataclass(frozen=True)
class EvalConfig:
    """frames of the long run; seeds: how many held-out clips; styles; size in pixels a side.

    every: measure each so many frames (between them nothing is decoded and no truth is drawn);
    burn_in: frames before the fits begin, while what only the given first frames held is forgotten;
    cut_frames: mean distance of cuts in the cut run; given: true frames that the memory starts
    with; seconds: the long run ends when the evaluation has taken so long (0: never).
    """

    frames: int = 1000
    seeds: int = 8
    styles: tuple[str, ...] = tuple(STYLES)
    size: int = 256
    supersample: int = 2
    every: int = 4
    burn_in: int = 100
    cut_frames: int = 100
    cut_run: int = 600
    given: int = 4
    history_noise: float = 0.02
    noise_correlation: float = NOISE_CORRELATION
    seconds: float = 0.0

    def __post_init__(self) -> None:
        least = dict.fromkeys(("seeds", "supersample", "every", "cut_frames", "cut_run"), 1)
        # Motion and warp error are of two frames, so one frame measures nothing.
        least |= dict.fromkeys(("given", "burn_in", "history_noise", "seconds"), 0)
        least |= {"frames": 2, "size": 8}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:  # also where it is not a number
                raise ValueError(
                    f"evaluation: {name} must be at least {smallest} (got {getattr(self, name)})"
                )
        if not 0 <= self.noise_correlation <= 1:
            raise ValueError(
                f"evaluation: noise_correlation must be from 0 to 1 (got {self.noise_correlation})"
            )
        if self.size % 8:
            raise ValueError(f"evaluation: size must be a multiple of 8 (got {self.size})")


@dataclass
class Candidate:
    """One thing to measure: networks, how many steps, and whether it remembers.

    frames: its long run ends there (0: with the others'); short: the long run alone;
    history_noise: of its memory, None: the configuration's.
    """

    name: str
    denoiser: Denoiser
    autoencoder: Autoencoder
    steps: int = 2
    remember: bool = True
    frames: int = 0
    short: bool = False
    history_noise: float | None = None


Progress = Callable[[str], None]
Keep = Callable[[str, int, Tensor, Tensor, Tensor], None]


def ray_kernel_refusal(device: torch.device) -> str | None:
    """Why rays cannot be traced by one kernel there; None if they can."""
    from mirage_hello.model.data.raycast_triton import refusal  # Triton is not everywhere

    return refusal(device)


def silent(text: str) -> None:
    """A Progress that says nothing."""


class Evaluation:
    """The clips of an evaluation and their truth, shared by all candidates."""

    def __init__(
        self, config: EvalConfig, device: torch.device, without: Candidate | None = None
    ) -> None:
        """without: what every long run is held against, a candidate that remembers nothing."""
        unknown = [s for s in config.styles if s not in STYLES]
        if unknown:
            known = ", ".join(STYLES)
            raise ValueError(f"evaluation: unknown style {unknown[0]!r}; known: {known}")
        self.config, self.device, self.without = config, device, without
        fused = device.type == "cuda" and ray_kernel_refusal(device) is None
        world = WorldConfig(config.size, config.size, config.supersample, fused=fused)
        self.worlds = Worlds(world, device)
        self.plain_worlds = Worlds(replace(world, motion=False), device)  # between measured frames
        self.cut_worlds = Worlds(
            WorldConfig(
                config.size, config.size, config.supersample, cut_frames=config.cut_frames,
                fused=fused,
            ),
            device,
        )  # fmt: skip
        self.seeds = [HELD_OUT + 1000 + i for i in range(config.seeds)]
        # Streams of one style are neighbours: the renderer shades them together.
        self.names = [style for style in config.styles for _ in self.seeds]
        self.numbers = [list(STYLES).index(style) for style in self.names]
        self.clips = self.worlds.clips(self.seeds * len(config.styles))

        self.began = time.monotonic()
        self.stopped = False  # from outside: the long run ends with the next frame
        self.films: dict[tuple[Worlds, bool, bool], Film] = {}

    @property
    def batch(self) -> int:
        return len(self.names)

    def shot(self, worlds: Worlds, frame: int, truth: bool, clips: City | None = None) -> Shot:
        """Frame `frame` of every clip; without truth only the input views, and no motion."""
        if not truth and worlds is self.worlds:
            worlds = self.plain_worlds
        key = (worlds, truth, clips is None)
        if key not in self.films:
            names = self.names if truth else None
            self.films[key] = Film(worlds, self.clips if clips is None else clips, names)
        return self.films[key].frame(FIRST + frame)

    def rollout(self, candidate: Candidate, seed: int = 0) -> Rollout:
        config, noise = self.config, candidate.history_noise
        return Rollout(
            candidate.denoiser, candidate.autoencoder, self.numbers, config.size, config.size,
            steps=candidate.steps, history_noise=config.history_noise if noise is None else noise,
            noise_correlation=config.noise_correlation, remember=candidate.remember, seed=seed,
        )  # fmt: skip

    def begin(self, candidates: Sequence[Candidate], worlds: Worlds) -> list[Rollout]:
        """Rollouts whose memories hold the first true frames."""
        rollouts = [self.rollout(candidate) for candidate in candidates]
        for frame in range(self.config.given):
            truth = self.shot(worlds, frame, True).target
            for rollout in rollouts:
                rollout.remember_true(truth)
        return rollouts

    # The runs

    def measured(self, number: int, ends: set[int]) -> bool:
        """Whether this frame of the long run is: each `every`-th, the last of each end, and more of
        the burn-in, where a model that collapses may do so."""
        every = self.config.every
        if number < self.config.burn_in:
            every = min(every, EARLY_EVERY)
        return number % every == 0 or number + 1 in ends

    def long_run(
        self, candidates: Sequence[Candidate], keep: Keep | None = None, say: Progress = silent
    ) -> list[Curves]:
        """The closed loop of config.frames frames, measured at every config.every-th.

        Args:
            keep: called with (candidate's name, frame, view, output, truth) of measured frames.
        """
        config = self.config
        curves = [Curves() for _ in candidates]
        rollouts = self.begin(candidates, self.worlds)
        without = self.rollout(self.without) if self.without else None
        outputs: list[Tensor] = []
        before: Shot | None = None
        ends = [c.frames or config.frames for c in candidates]
        shown = {*ends, *SHORTER}
        for number in range(max(ends)):
            measured = self.measured(number, shown)
            # Truth is drawn one frame ahead too: motion energy needs two in a row.
            seen = measured or self.measured(number + 1, shown)
            shot = self.shot(self.worlds, config.given + number, seen)
            now = []
            for rollout, end in zip(rollouts, ends, strict=True):
                if number < end and seen:
                    now.append(quantised(rollout.push(shot.view)))
                    continue
                now.append(torch.empty(0))
                if number < end:
                    rollout.push_unseen(shot.view)
            truth = truth_of(shot, before) if measured and before is not None else {}
            if truth and without:  # what is not remembered needs no frames before it
                drawn = quantised(without.push(shot.view))
                truth["psnr_without"] = metrics.psnr(drawn, shot.target)
                truth["edges_without"] = metrics.edge_correlation(drawn, shot.target)
            for i, candidate in enumerate(candidates):
                if measured and before is not None and number < ends[i]:
                    row = measure(now[i], shot, outputs[i], before)
                    curves[i].add(number, row | truth)
                if keep is not None and measured and number < ends[i]:
                    keep(candidate.name, number, shot.view, now[i], shot.target)
            outputs, before = now, shot
            if number % 250 == 0:
                say(f"frame {number}, {time.monotonic() - self.began:.0f} s")
            late = config.seconds and time.monotonic() - self.began > config.seconds
            if measured and (late or self.stopped):
                say(f"ended at frame {number}: {'told to stop' if self.stopped else 'time is up'}")
                break
        return curves

    def cut_run(self, candidates: Sequence[Candidate], keep: Keep | None = None) -> list[list[int]]:
        """Frames to recover after each cut of every clip; the memory is not told of the cuts.

        Args:
            keep: as in `long_run`, called with every frame.
        """
        config = self.config
        rollouts = self.begin(candidates, self.cut_worlds)
        errors: list[list[Tensor]] = [[] for _ in candidates]
        cuts = []
        for frame in range(config.given, config.given + config.cut_run):
            shot = self.shot(self.cut_worlds, frame, True)
            for candidate, rollout, rows in zip(candidates, rollouts, errors, strict=True):
                output = quantised(rollout.push(shot.view))
                rows.append((output - shot.target).square().mean((1, 2, 3)))
                if keep is not None:
                    keep(candidate.name, frame - config.given, shot.view, output, shot.target)
            cuts.append(shot.cut)
        cut = torch.stack(cuts).cpu()
        settle = min(40, config.cut_frames // 3)
        found: list[list[int]] = []
        for rows in errors:
            error = torch.stack(rows).cpu()
            frames: list[int] = []
            for stream in range(self.batch):
                at = cut[:, stream].nonzero().flatten().tolist()
                frames += metrics.recovery(error[:, stream], at, settle)
            found.append(frames)
        return found

    def ceiling(self, candidate: Candidate) -> float:
        """PSNR in dB of the truth through the autoencoder alone: the most that is possible."""
        found = []
        for frame in (0, 50, 150):
            truth = self.shot(self.worlds, frame, True).target
            dtype = candidate.denoiser.unet.conv_in.weight.dtype
            with torch.no_grad():
                decoded = candidate.autoencoder(truth.to(dtype)).float()
            found.append(metrics.psnr(quantised(decoded), truth).mean())
        return float(torch.stack(found).mean())


def measure(output: Tensor, shot: Shot, output_before: Tensor, before: Shot) -> dict[str, Tensor]:
    """All measures of one frame of a candidate, each [B]."""
    row = {"psnr": metrics.psnr(output, shot.target), "ssim": metrics.ssim(output, shot.target)}
    row["edges"] = metrics.edge_correlation(output, shot.target)
    visible = metrics.visible_before(shot.motion, before.depth, shot.previous_depth)
    row["warp"] = metrics.warp_error(output, output_before, shot.motion, visible)
    for name, value in metrics.statistics(output, output_before).items():
        row[f"output_{name}"] = value
    return row


def truth_of(shot: Shot, before: Shot) -> dict[str, Tensor]:
    """The same measures of the truth, each [B]."""
    visible = metrics.visible_before(shot.motion, before.depth, shot.previous_depth)
    row = {"warp_truth": metrics.warp_error(shot.target, before.target, shot.motion, visible)}
    for name, value in metrics.statistics(shot.target, before.target).items():
        row[f"truth_{name}"] = value
    return row


def evaluate(
    candidates: Sequence[Candidate],
    evaluation: Evaluation,
    keep: Keep | None = None,
    say: Progress = silent,
    keep_cuts: Keep | None = None,
) -> list[dict[str, Any]]:
    """All numbers of the candidates, in their order.

    Args:
        keep, keep_cuts: see `Evaluation.long_run` and `cut_run`; say: told what runs.
    """
    config = evaluation.config
    say(f"{config.frames} frames, {evaluation.batch} streams, {len(candidates)} candidates")
    results: list[dict[str, Any]] = [{} for _ in candidates]
    full = [i for i, c in enumerate(candidates) if not c.short]
    if full:
        chosen = [candidates[i] for i in full]
        say("cuts")
        for i, recoveries in zip(full, evaluation.cut_run(chosen, keep_cuts), strict=True):
            mean = sum(recoveries) / len(recoveries) if recoveries else None
            results[i]["cut_recovery_frames"] = {
                "mean": mean, "largest": max(recoveries, default=None), "cuts": len(recoveries),
            }  # fmt: skip
        say("persistence")
        for i, values in zip(full, persistence(evaluation, chosen), strict=True):
            for name, of_streams in values.items():
                means = by_seed(torch.tensor(of_streams), config.seeds)
                results[i][name] = metrics.interval(means).as_dict()
        say("memory")
        for i, quality in zip(full, memory_db(evaluation, chosen), strict=True):
            results[i]["memory_db"] = quality
    # The long run last: it is the part that a limit of time may shorten.
    runs = evaluation.long_run(candidates, keep, say)
    for candidate, curves, found in zip(candidates, runs, results, strict=True):
        found |= {"steps": candidate.steps, "remember": candidate.remember}
        found |= summary(config, curves, evaluation.names)
        lengths = [n for n in SHORTER if n < curves.frames[-1] + 1]
        found["shorter"] = {str(n): excerpt(config, curves, evaluation.names, n) for n in lengths}
        found["ceiling_db"] = evaluation.ceiling(candidate)
    return results
