"""What weights between a teacher's and its student's, and the start noise's memory, do to a stream.

    python -m mirage_hello.bench.sweeps.closed_loop OUT.json TEACHER STUDENT [FRAMES]

Each row of `ROWS` is a closed loop of 10 held-out streams, one ray a pixel; the numbers are means
over its last 20 frames. `python -m mirage_hello.tools.publish --tables` writes the tables of them.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import use
from mirage_hello.model import metrics
from mirage_hello.model.checkpoint import load
from mirage_hello.model.data.worlds import Shot
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.evaluation import EvalConfig, Evaluation
from mirage_hello.model.rollout import Rollout, quantised

SEEDS, LATE = 2, 20


@dataclass(frozen=True)
class Row:
    """share: of the student's weights, the rest the teacher's; rho: of the noise levels."""

    share: float
    steps: int = 1
    rho: float = 3.0
    correlation: float = 0.5
    remember: bool = True


FORGETFUL = Row(0.5, 2, remember=False)  # what the others' edges are held against
ROWS = (
    *(Row(1.0, correlation=r) for r in (0.0, 0.5, 0.8, 1.0)),
    *(Row(1.0, correlation=r, remember=False) for r in (0.0, 0.5, 1.0)),
    *(Row(share) for share in (0.0, 0.25, 0.5, 0.75)),
    *(Row(share, 2, rho) for share in (0.0, 0.5, 1.0) for rho in (7.0, 3.0)),
)


def mean_of(teacher: Denoiser, student: Denoiser, row: Row) -> Denoiser:
    """The network of a row."""
    made = copy.deepcopy(teacher)
    made.config = replace(made.config, rho=row.rho)
    with torch.no_grad():
        for weight, other in zip(made.parameters(), student.parameters(), strict=True):
            weight.lerp_(other, row.share)
    return made


def measured(rollout: Rollout, shots: list[Shot], given: int) -> dict[str, Tensor]:
    """Means over the last frames, each [B]; `psnr` at frames 1 and 20 too."""
    rows: list[dict[str, Tensor]] = []
    output = torch.empty(0)
    for number, shot in enumerate(shots):
        if number < given:
            rollout.remember_true(shot.target)
            continue
        before, output = output, quantised(rollout.push(shot.view))
        row = {"psnr": metrics.psnr(output, shot.target)}
        row["edges"] = metrics.edge_correlation(output, shot.target)
        if rows:
            last = shots[number - 1]
            seen = metrics.visible_before(shot.motion, last.depth, shot.previous_depth)
            row["warp"] = metrics.warp_error(output, before, shot.motion, seen)
            row["warp_truth"] = metrics.warp_error(shot.target, last.target, shot.motion, seen)
        own, true = (metrics.statistics(f, f)["sharpness"] for f in (output, shot.target))
        row["sharpness"] = own / true
        rows.append(row)
    found = {k: torch.stack([row[k] for row in rows[-LATE:]]).mean(0) for k in rows[-1]}
    return found | {"psnr_1": rows[0]["psnr"], "psnr_20": rows[19]["psnr"]}


def main(out: Path, teacher: Path, student: Path, frames: int = 50) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = Evaluation(EvalConfig(frames=frames, seeds=SEEDS, supersample=1), device)
    networks, given = [load(path, torch.float32, device) for path in (teacher, student)], 4
    began = time.monotonic()
    with use("torch"), torch.no_grad():
        shots = [evaluation.shot(evaluation.worlds, i, True) for i in range(given + frames)]
        results: list[dict[str, Any]] = []
        without = torch.empty(0)
        for row in (FORGETFUL, *ROWS):
            denoiser = mean_of(networks[0][0], networks[1][0], row)
            rollout = Rollout(
                denoiser, networks[0][1], evaluation.numbers, 256, 256, steps=row.steps,
                noise_correlation=row.correlation, remember=row.remember,
            )  # fmt: skip
            of = measured(rollout, shots, given)
            without = of["edges"] if row is FORGETFUL else without
            found = {name: float(value.mean()) for name, value in of.items()}
            found["least_edges"] = float((of["edges"] / without).min())
            results.append(vars(row) | {k: round(v, 5) for k, v in found.items()})
            print(f"{time.monotonic() - began:.0f} s", json.dumps(results[-1]), flush=True)
    about: dict[str, Any] = {"format": "closed-loop-1", "device": device.type}
    about |= {
        "torch": torch.__version__,
        "streams": evaluation.batch,
        "frames": frames,
        "late": LATE,
    }
    out.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    out, teacher, student = map(Path, sys.argv[1:4])
    raise SystemExit(main(out, teacher, student, *map(int, sys.argv[4:5])))
