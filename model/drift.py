"""What a long run says about stability: slopes over seeds, how far statistics move, collapses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mirage_hello.model import metrics

if TYPE_CHECKING:
    from mirage_hello.model.evaluation import EvalConfig

COLLAPSE_DB = 3.0  # a stream that loses more has collapsed


@dataclass
class Curves:
    """Per measured frame: numbers [T], and values name -> [T, B]."""

    frames: list[int] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, frame: int, row: dict[str, Tensor]) -> None:
        self.frames.append(frame)
        for name, value in row.items():
            self.values.setdefault(name, []).append(value.float())

    def get(self, name: str) -> Tensor:
        return torch.stack(self.values[name]).cpu()

    def between(self, first: int, end: int) -> Curves:
        """The measured frames in [first, end)."""
        chosen = [i for i, f in enumerate(self.frames) if first <= f < end]
        values = {k: [v[i] for i in chosen] for k, v in self.values.items()}
        return Curves([self.frames[i] for i in chosen], values)


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
    end = curves.frames[-1] + 1
    late = curves.between(config.burn_in if config.burn_in < end else 0, end)
    frames, psnr = torch.tensor(late.frames), late.get("psnr")
    slopes = metrics.slope(frames, psnr)
    first, last = metrics.ends(psnr)
    statistics = [k.removeprefix("truth_") for k in late.values if k.startswith("truth_")]
    collapsed = (first - last > COLLAPSE_DB).nonzero().flatten().tolist()
    warp, warp_truth = late.get("warp"), late.get("warp_truth")
    return {
        "frames": end,
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


def excerpt(
    config: EvalConfig, curves: Curves, names: Sequence[str], frames: int
) -> dict[str, Any]:
    """`summary` of the first `frames` frames, without curves."""
    found = summary(config, curves.between(0, frames), names)
    del found["curves"]
    return found
