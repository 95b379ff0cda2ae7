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


def persistence(
    evaluation: Evaluation, candidates: Sequence[Candidate]
) -> list[dict[str, list[float]]]:
    """How steady and how right each stream's pictures are when it comes back, over what left.

    The camera goes AWAY frames along its path, at double speed, and back the same way. The
    divisor of both is |truth - other|, where other has the same geometry and other private dice.

    Returns:
        for each candidate, values of each stream: "persistence", 1 - |returned - first|: 1 is the
        same picture, which a model also draws that forgets everything and guesses alike; "recall",
        |returned - other| - |returned - truth|: 1 is the truth, 0 knows nothing of the dice.
    """
    rollouts = evaluation.begin(candidates, evaluation.worlds)
    start, dice = evaluation.config.given, other_dice(evaluation)
    firsts: dict[int, list[Tensor]] = {}
    moved, nearer = torch.zeros(2, len(candidates), evaluation.batch, device=evaluation.device)
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
            other = evaluation.shot(evaluation.worlds, start + 2 * step, True, dice).target
            scale += distance(shot.target, other)
            for i, (output, first) in enumerate(zip(outputs, firsts[step], strict=True)):
                moved[i] += distance(output, first)
                nearer[i] += distance(output, other) - distance(output, shot.target)
        firsts.setdefault(step, outputs)
    scale = scale.clamp_min(1e-6)
    return [
        {"persistence": kept, "recall": recall}
        for kept, recall in zip(
            (1 - moved / scale).tolist(), (nearer / scale).tolist(), strict=True
        )
    ]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """mean |a - b| of each picture: [B]."""
    return (a - b).abs().mean((1, 2, 3))


def other_dice(evaluation: Evaluation) -> City:
    """The clips' geometry with the private dice and textures of other clips."""
    clips, seeds = evaluation.clips, [seed + 500 for seed in evaluation.seeds]
    other = evaluation.worlds.clips(seeds * len(evaluation.config.styles))
    return City(clips.seeds, clips.cells, clips.kinds, other.scalars, other.textures)
