"""What a model makes of its memory: one frame from a true one, from its own, and from none.

A model with a good memory draws the next frame nearly as well from its own outputs as from true
ones, and much worse from none. Where true is far above none and own falls to none within some
frames, the memory is read but does not survive the model's own errors; where true is near none too,
it is not read at all, as by a model that knows its training clips by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirage_hello.model import metrics
from mirage_hello.model.rollout import quantised

if TYPE_CHECKING:
    from mirage_hello.model.evaluation import Candidate, Evaluation

FRAMES = 20


def memory_db(evaluation: Evaluation, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
    """PSNR in dB over all streams, for each candidate.

    Returns:
        "true": mean over FRAMES frames, each from a memory of true frames; "none": the same from
        an empty memory; "own": the last of FRAMES frames in closed loop.
    """
    ways = [{"true": c, "own": c, "none": replace(c, remember=False)} for c in candidates]
    rollouts = [dict(zip(w, evaluation.begin(list(w.values()), evaluation.worlds), strict=True))
                for w in ways]  # fmt: skip
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in w} for w in ways]
    for number in range(FRAMES):
        shot = evaluation.shot(evaluation.worlds, evaluation.config.given + number, True)
        for runs, values in zip(rollouts, found, strict=True):
            for name, rollout in runs.items():
                output = quantised(rollout.push(shot.view))
                values[name].append(metrics.psnr(output, shot.target).mean())
            runs["true"].correct(shot.target)
    return [
        {
            "true": float(torch.stack(v["true"]).mean()),
            "own": float(v["own"][-1]),
            "none": float(torch.stack(v["none"]).mean()),
        }
        for v in found
    ]
