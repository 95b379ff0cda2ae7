"""Closed-loop evaluation against rendered truth: thousands of frames of the model's own outputs.

    evaluation = Evaluation(EvalConfig(frames=1000), device)
    numbers = evaluate(Candidate("tiny", denoiser, autoencoder), evaluation)

All streams (seeds x styles) advance together. The truth is drawn for the same frames, so every
number is against what should have been there, with no reference video and no downloaded metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mirage_hello.model import metrics
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.data.city import HELD_OUT, City
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import Shot, WorldConfig, Worlds
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.rollout import Rollout, quantised

AWAY = 70  # frames of the persistence walk before it turns back
EARLY = 20  # its first frames are compared: out of view for at least 2 (70 - 20) = 100 frames
COLLAPSE_DB = 3.0  # a stream that loses more has collapsed
FIRST = 100  # clips are entered here, where snow and puddles have begun


@dataclass(frozen=True)
class EvalConfig:
    """frames of the long run; seeds: how many held-out clips; styles; size in pixels a side.

    every: measure each so many frames; burn_in: frames before the fits begin, while what only the
    given first frames held is forgotten; cut_frames: mean distance of cuts in the cut run;
    given: true frames that the memory starts with.
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
    history_noise: float = 0.05


@dataclass
class Candidate:
    """One thing to measure: networks, how many steps, and whether it remembers."""

    name: str
    denoiser: Denoiser
    autoencoder: Autoencoder
    steps: int = 2
    remember: bool = True


@dataclass
class Curves:
    """Per measured frame: numbers [T], and values name -> [T, B]."""

    frames: list[int] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, frame: int, row: dict[str, Tensor]) -> None:
        self.frames.append(frame)
        for name, value in row.items():
            self.values.setdefault(name, []).append(value.float().cpu())

    def get(self, name: str) -> Tensor:
        return torch.stack(self.values[name])


Progress = Callable[[str], None]


class Evaluation:
    """The clips of an evaluation and their truth, shared by all candidates."""

    def __init__(self, config: EvalConfig, device: torch.device) -> None:
        unknown = [s for s in config.styles if s not in STYLES]
        if unknown:
            known = ", ".join(STYLES)
            raise ValueError(f"evaluation: unknown style {unknown[0]!r}; known: {known}")
        self.config, self.device = config, device
        fused = device.type == "cuda"
        world = WorldConfig(config.size, config.size, config.supersample, fused=fused)
        self.worlds = Worlds(world, device)
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

    @property
    def batch(self) -> int:
        return len(self.names)

    def shot(self, worlds: Worlds, frame: int, truth: bool, clips: City | None = None) -> Shot:
        """Frame `frame` of every clip; without truth only the input views."""
        clips = self.clips if clips is None else clips
        return worlds.render(clips, [FIRST + frame] * self.batch, self.names if truth else None)

    def rollout(self, candidate: Candidate, seed: int = 0) -> Rollout:
        config = self.config
        return Rollout(
            candidate.denoiser, candidate.autoencoder, self.numbers, config.size, config.size,
            steps=candidate.steps, history_noise=config.history_noise,
            remember=candidate.remember, seed=seed,
        )  # fmt: skip

    def begin(self, candidate: Candidate, worlds: Worlds) -> Rollout:
        """A rollout whose memory holds the first true frames."""
        rollout = self.rollout(candidate)
        for frame in range(self.config.given):
            rollout.remember_true(self.shot(worlds, frame, True).target)
        return rollout

    # The runs

    def long_run(self, candidate: Candidate, keep: Callable | None = None) -> Curves:
        """The closed loop of config.frames frames, measured at every config.every-th.

        Args:
            keep: called with (frame, view, output, truth) of every measured frame.
        """
        config, curves = self.config, Curves()
        rollout = self.begin(candidate, self.worlds)
        before: tuple[Tensor, Shot] | None = None
        for frame in range(config.given, config.given + config.frames):
            number = frame - config.given
            measured = number % config.every == 0 or number == config.frames - 1
            # Truth is drawn one frame ahead too: motion energy needs two in a row.
            ahead = (number + 1) % config.every == 0 or number == config.frames - 2
            shot = self.shot(self.worlds, frame, measured or ahead)
            output = quantised(rollout.push(shot.view))
            if measured and before is not None:
                curves.add(number, measure(output, shot, *before))
            if keep is not None and measured:
                keep(number, shot.view, output, shot.target)
            before = (output, shot)
        return curves

    def cut_run(self, candidate: Candidate) -> list[int]:
        """Frames to recover after each cut of every clip; the memory is not told of the cuts."""
        config = self.config
        rollout = self.begin(candidate, self.cut_worlds)
        errors, cuts = [], []
        for frame in range(config.given, config.given + config.cut_run):
            shot = self.shot(self.cut_worlds, frame, True)
            output = quantised(rollout.push(shot.view))
            errors.append((output - shot.target).square().mean((1, 2, 3)).cpu())
            cuts.append(shot.cut.cpu())
        error, cut = torch.stack(errors), torch.stack(cuts)
        found: list[int] = []
        settle = min(40, config.cut_frames // 3)
        for stream in range(self.batch):
            at = cut[:, stream].nonzero().flatten().tolist()
            found += metrics.recovery(error[:, stream], at, settle)
        return found

    def persistence(self, candidate: Candidate) -> list[float]:
        """1 - |returned - first| / |truth - other truth| per stream, over what left the view.

        The camera goes AWAY frames along its path, at double speed, and back the same way. The
        divisor is how much the truth differs from a clip of the same geometry with other private
        dice: 1 is a perfect memory, 0 remembers nothing (the same size of difference).
        """
        rollout = self.begin(candidate, self.worlds)
        start = self.config.given
        firsts: dict[int, Tensor] = {}
        kept = torch.zeros(self.batch, device=self.device)
        scale = torch.zeros_like(kept)
        for step in [*range(AWAY + 1), *range(AWAY - 1, -1, -1)]:
            returning = step in firsts
            shot = self.shot(self.worlds, start + 2 * step, step < EARLY and returning)
            output = quantised(rollout.push(shot.view))
            if not returning:
                firsts[step] = output if step < EARLY else torch.empty(0)
            elif step < EARLY:
                other = self.shot(self.worlds, start + 2 * step, True, self.other_dice())
                kept += (output - firsts[step]).abs().mean((1, 2, 3))
                scale += (shot.target - other.target).abs().mean((1, 2, 3))
        return (1 - kept / scale.clamp_min(1e-6)).tolist()

    def other_dice(self) -> City:
        """The same geometry with the private dice and textures of other clips."""
        other = self.worlds.clips([s + 500 for s in self.seeds] * len(self.config.styles))
        return City(
            self.clips.seeds, self.clips.cells, self.clips.kinds, other.scalars, other.textures
        )

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
    """All measures of one frame, each [B]."""
    truth = shot.target
    row = {"psnr": metrics.psnr(output, truth), "ssim": metrics.ssim(output, truth)}
    visible = metrics.visible_before(shot.motion, before.depth, shot.previous_depth)
    row["warp"] = metrics.warp_error(output, output_before, shot.motion, visible)
    row["warp_truth"] = metrics.warp_error(truth, before.target, shot.motion, visible)
    for name, value in metrics.statistics(output, output_before).items():
        row[f"output_{name}"] = value
    for name, value in metrics.statistics(truth, before.target).items():
        row[f"truth_{name}"] = value
    return row


def drift(curves: Curves, name: str) -> dict[str, float]:
    """How far a statistic moves between the first and last 15 %, beyond what the truth does.

    (late - early of output) - (late - early of truth), over the early value of the truth; the
    clipped share as it is.

    Returns:
        "mean": |mean over streams|; "worst": the largest |value| of a stream.
    """
    output, truth = curves.get(f"output_{name}"), curves.get(f"truth_{name}")
    early, late = metrics.ends(output - truth)
    base, _ = metrics.ends(truth)
    # A share of clipped pixels is a fraction already, and the truth's may be 0.
    scale = torch.ones(()) if name == "clipped" else base.mean().clamp_min(1e-3)
    moved = (late - early) / scale
    return {"mean": abs(float(moved.mean())), "worst": float(moved.abs().max())}


def by_seed(values: Tensor, seeds: int) -> list[float]:
    """Mean over the styles of each seed, from values [B] with B = styles x seeds."""
    return values.view(-1, seeds).mean(0).tolist()


def summary(config: EvalConfig, curves: Curves, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a long run: slopes with intervals over seeds, drifts, collapses."""
    start = next((i for i, f in enumerate(curves.frames) if f >= config.burn_in), 0)
    late = Curves(curves.frames[start:], {k: v[start:] for k, v in curves.values.items()})
    frames, psnr = torch.tensor(late.frames), late.get("psnr")
    slopes = metrics.slope(frames, psnr)
    first, last = metrics.ends(psnr)
    statistics = [k.removeprefix("truth_") for k in late.values if k.startswith("truth_")]
    collapsed = (first - last > COLLAPSE_DB).nonzero().flatten().tolist()
    warp, warp_truth = late.get("warp"), late.get("warp_truth")
    return {
        "frames": config.frames,
        "seeds": config.seeds,
        "burn_in": config.burn_in,
        "psnr_db": metrics.interval(by_seed(psnr.mean(0), config.seeds)).as_dict(),
        "ssim": metrics.interval(by_seed(late.get("ssim").mean(0), config.seeds)).as_dict(),
        "psnr_slope_db_per_1000": metrics.interval(by_seed(slopes, config.seeds)).as_dict(),
        "contrast": {name: drift(late, name) for name in statistics},
        "warp_error": {"output": float(warp.mean()), "truth": float(warp_truth.mean())},
        "collapsed": [f"{names[i]} seed {i % config.seeds}" for i in collapsed],
        "by_style": {
            style: {
                "psnr_db": float(psnr[:, [n == style for n in names]].mean()),
                "psnr_slope_db_per_1000": float(slopes[[n == style for n in names]].mean()),
                "warp_error": float(warp[:, [n == style for n in names]].mean()),
            }
            for style in config.styles
        },
        "curves": {
            "frame": curves.frames,
            **{
                k: [round(v, 5) for v in curves.get(k).mean(1).tolist()]
                for k in ("psnr", "ssim", "warp", "output_brightness", "output_saturation",
                          "truth_brightness", "truth_saturation")
            },
        },
    }  # fmt: skip


def evaluate(
    candidate: Candidate,
    evaluation: Evaluation,
    keep: Callable | None = None,
    say: Progress = lambda text: None,
    short: bool = False,
) -> dict[str, Any]:
    """All numbers of one candidate.

    Args:
        keep: see `Evaluation.long_run`; say: told what runs; short: the long run alone.
    """  # fmt: skip
    say(f"{candidate.name}: {evaluation.config.frames} frames, {evaluation.batch} streams")
    curves = evaluation.long_run(candidate, keep)
    found: dict[str, Any] = {"steps": candidate.steps, "remember": candidate.remember}
    found |= summary(evaluation.config, curves, evaluation.names)
    found["ceiling_db"] = evaluation.ceiling(candidate)
    if not short:
        say(f"{candidate.name}: cuts")
        recoveries = evaluation.cut_run(candidate)
        mean = sum(recoveries) / len(recoveries) if recoveries else None
        found["cut_recovery_frames"] = {
            "mean": mean, "largest": max(recoveries, default=None), "cuts": len(recoveries),
        }  # fmt: skip
        say(f"{candidate.name}: persistence")
        values = torch.tensor(evaluation.persistence(candidate))
        found["persistence"] = metrics.interval(by_seed(values, evaluation.config.seeds)).as_dict()
    return found
