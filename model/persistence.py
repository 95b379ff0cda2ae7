"""What a model keeps of what left its view: the camera goes away and comes back the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirage_hello.model.data.city import City
from mirage_hello.model.rollout import quantised

if TYPE_CHECKING:
    from mirage_hello.model.evaluation import Candidate, Evaluation

AWAY = 70  # frames of the walk before it turns back
EARLY = 20  # its first frames are compared: out of view for at least 2 (70 - 20) = 100 frames


def persistence(evaluation: Evaluation, candidates: Sequence[Candidate]) -> list[list[float]]:
    """1 - |returned - first| / |truth - other truth| per stream, over what left the view.

    The camera goes AWAY frames along its path, at double speed, and back the same way. The
    divisor is how much the truth differs from a clip of the same geometry with other private
    dice: 1 is a perfect memory, 0 remembers nothing (the same size of difference).
    """
    rollouts = evaluation.begin(candidates, evaluation.worlds)
    start, dice = evaluation.config.given, other_dice(evaluation)
    firsts: dict[int, list[Tensor]] = {}
    kept = torch.zeros(len(candidates), evaluation.batch, device=evaluation.device)
    scale = torch.zeros(evaluation.batch, device=evaluation.device)
    for step in [*range(AWAY + 1), *range(AWAY - 1, -1, -1)]:
        compared = step in firsts and step < EARLY
        shot = evaluation.shot(evaluation.worlds, start + 2 * step, compared)
        if step >= EARLY:
            for rollout in rollouts:
                rollout.push_unseen(shot.view)
            continue
        outputs = [quantised(rollout.push(shot.view)) for rollout in rollouts]
        if compared:
            other = evaluation.shot(evaluation.worlds, start + 2 * step, True, dice)
            scale += (shot.target - other.target).abs().mean((1, 2, 3))
            for i, (output, first) in enumerate(zip(outputs, firsts[step], strict=True)):
                kept[i] += (output - first).abs().mean((1, 2, 3))
        firsts.setdefault(step, outputs)
    return (1 - kept / scale.clamp_min(1e-6)).tolist()


def other_dice(evaluation: Evaluation) -> City:
    """The clips' geometry with the private dice and textures of other clips."""
    clips, seeds = evaluation.clips, [seed + 500 for seed in evaluation.seeds]
    other = evaluation.worlds.clips(seeds * len(evaluation.config.styles))
    return City(clips.seeds, clips.cells, clips.kinds, other.scalars, other.textures)
