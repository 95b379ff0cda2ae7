"""What a run writes while it goes: metrics as JSON lines, TensorBoard, sample videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage_hello.model.training.config import STAGES, TrainingError


class Journal:
    """metrics.jsonl, and TensorBoard where asked for.

    Args:
        folder: of the run; tensorboard: write event files too.
        resume_at: (stage, step) that a resumed run does again: later lines are removed, so that
            the file holds each step once.
    Raises:
        TrainingError: tensorboard is asked for and not installed.
    """

    def __init__(
        self, folder: Path, tensorboard: bool = False, resume_at: tuple[int, int] | None = None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if resume_at is None:
            self.path.write_text("")
        else:
            kept = [r for r in read(folder) if (STAGES.index(r["stage"]), r["step"]) < resume_at]
            self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise TrainingError(
                    "--tensorboard: the tensorboard package is not installed "
                    "(pip install 'mirage-hello[train]'); metrics.jsonl has the same numbers"
                ) from error
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One line; the numbers of a step."""
        row = {"stage": stage, "step": step, **{k: round(v, 6) for k, v in values.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run; a last line that was cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
