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

# A stream has collapsed when, over its last 15 %, one of these holds.
# Its edges lie where the truth's do by less than half of what is drawn without a memory: the scene
# has dissolved. Means of 40 streams: 0.94 of it for the shipped model's one step, 0.77 for two,
# 0.62 for a teacher's eight, whose geometry melts, and 0.35 for a model trained without
# augmentation, whose pictures are mush, while its PSNR is only 2.5 dB below.
EDGES = 0.5
BELOW_DB = 6.0  # its PSNR is so far below what the same frames have without a memory: four times
# the error. Sound pictures in wrong colours, which a memory then keeps, were up to 4.1 dB below.
# One of these statistics is below half of the least that the style's truth shows, or above one and
# a half times the most and a tenth: greyed, flattened, burnt out.
RANGED = ("saturation", "contrast", "clipped")
SHRUNK, GROWN, MORE = 0.5, 1.5, 0.1
FIRST_FRAMES = 10  # of a run: what the true frames in the memory give
CURVES = (
    "psnr", "psnr_without", "edges", "edges_without", "ssim", "warp", "warp_truth",
    "output_brightness", "truth_brightness", "output_saturation", "truth_saturation",
    "output_contrast", "truth_contrast",
)  # fmt: skip


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

    (late - early of output) - (late - early of truth), over the early value of the output, its mean
    over streams; the clipped share as it is.

    Returns:
        "mean": |mean over streams|; "worst": the largest |value| of a stream; "output", "truth":
        the two moves alone, means over streams, with their signs.
    """
    (early, late), (true_early, true_late) = (
        metrics.ends(curves.get(f"{whose}_{name}")) for whose in ("output", "truth")
    )
    # A share of clipped pixels is a fraction already, and may be 0.
    scale = torch.ones(()) if name == "clipped" else early.mean().clamp_min(1e-3)
    own, true = (late - early) / scale, (true_late - true_early) / scale
    return {
        "mean": abs(float((own - true).mean())),
        "worst": float((own - true).abs().max()),
        "output": float(own.mean()),
        "truth": float(true.mean()),
    }


def collapses(curves: Curves, names: Sequence[str]) -> list[str | None]:
    """Why each stream has collapsed by the end of these curves; None for one that has not.

    Early falls count as well as late ones: the end is held against the truth and against what the
    same frames have without a memory, not against the stream's own beginning. To fall to that
    level is forgetting, and no collapse.
    """
    _, late = metrics.ends(curves.get("psnr"))
    _, without = metrics.ends(curves.get("psnr_without"))
    found: list[str | None] = [None] * len(names)
    for name in RANGED:
        _, values = metrics.ends(curves.get(f"output_{name}"))
        truth = curves.get(f"truth_{name}")
        for i, (style, value) in enumerate(zip(names, values.tolist(), strict=True)):
            shown = truth[:, [n == style for n in names]]
            low, high = SHRUNK * float(shown.min()), GROWN * float(shown.max()) + MORE
            if not low <= value <= high:
                found[i] = f"{name} {value:.2f}, outside {low:.2f} to {high:.2f}"
    _, edges = metrics.ends(curves.get("edges"))
    _, edges_without = metrics.ends(curves.get("edges_without"))
    for i in range(len(names)):
        if not edges[i] >= EDGES * edges_without[i]:
            found[i] = f"edges {edges[i]:.2f}, without a memory {edges_without[i]:.2f}"
        if not late[i] >= without[i] - BELOW_DB:  # also where it is not a number
            found[i] = f"{late[i]:.1f} dB, without a memory {without[i]:.1f}"
    return found


def by_seed(values: Tensor, seeds: int) -> list[float]:
    """Mean over the styles of each seed, from values [B] with B = styles x seeds."""
    return values.view(-1, seeds).mean(0).tolist()


def summary(config: EvalConfig, curves: Curves, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a long run: slopes with intervals over seeds, drifts, collapses."""
    end = curves.frames[-1] + 1
    late = curves.between(config.burn_in if config.burn_in < end else 0, end)
    frames, psnr = torch.tensor(late.frames), late.get("psnr")
    slopes = metrics.slope(frames, psnr)
    early_db, late_db = (float(v.mean()) for v in metrics.ends(psnr))
    first = curves.between(0, max(FIRST_FRAMES, curves.frames[0] + 1)).get("psnr")
    statistics = [k.removeprefix("truth_") for k in late.values if k.startswith("truth_")]
    reasons = collapses(late, names)
    warp, warp_truth = late.get("warp"), late.get("warp_truth")
    return {
        "frames": end,
        "seeds": config.seeds,
        "burn_in": config.burn_in,
        "psnr_db": metrics.interval(by_seed(psnr.mean(0), config.seeds)).as_dict(),
        "ssim": metrics.interval(by_seed(late.get("ssim").mean(0), config.seeds)).as_dict(),
        "psnr_slope_db_per_1000": metrics.interval(by_seed(slopes, config.seeds)).as_dict(),
        "edges": {
            name: float(metrics.ends(late.get(key))[1].mean())
            for name, key in (("output", "edges"), ("without", "edges_without"))
        },
        "contrast": {name: drift(late, name) for name in statistics},
        "warp_error": {"output": float(warp.mean()), "truth": float(warp_truth.mean())},
        "streams": len(names),
        "collapsed": [
            f"{names[i]} seed {i % config.seeds}: {reason}"
            for i, reason in enumerate(reasons)
            if reason
        ],
        "ends_db": {
            "first": float(first.mean()), "early": early_db, "late": late_db,
            "without": float(metrics.ends(late.get("psnr_without"))[1].mean()),
        },
        "by_style": {
            style: {
                "psnr_db": float(psnr[:, same].mean()),
                "ssim": float(late.get("ssim")[:, same].mean()),
                "psnr_slope_db_per_1000": float(slopes[same].mean()),
                "warp_error": float(warp[:, same].mean()),
            }
            for style in config.styles
            for same in [[n == style for n in names]]
        },
        "curves": {
            "frame": curves.frames,
            **{
                k: [round(v, 5) for v in curves.get(k).mean(1).tolist()]
                for k in CURVES
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
