"""Batches of real clips: a seeded order, ranks and workers, and a position that can be saved."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mirage_hello.model.data.video import Clip, UnreadableVideo, VideoClips


class Attempts(Dataset):
    """clips[i], or the sentence that says why not: a worker must not die of a broken file."""

    def __init__(self, clips: VideoClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[int, Clip | str]:
        try:
            return index, self.clips[index]
        except UnreadableVideo as error:
            return index, str(error)


class ClipLoader:
    """Batches of clips without end, each clip once an epoch over all ranks.

    A rank takes every ranks-th clip of the epoch's seeded permutation. A clip that breaks is put
    on `clips.report` and left out; no other clip takes its place twice. The position counts clips
    that were given, whatever the workers have read ahead, so a resumed run sees the same clips.

    Args:
        clips: the data set.
        batch: clips in a batch; the last ones of an epoch wait for the first of the next.
        seed: of the order; rank, ranks: this process among the trainers.
        workers: decoding processes; 0 decodes in this one.
    """

    def __init__(
        self,
        clips: VideoClips,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ) -> None:
        if not 0 <= rank < ranks or len(clips) < ranks:
            raise ValueError(
                f"ClipLoader: needs rank in [0, ranks) and at least one clip a rank (got rank "
                f"{rank} of {ranks} and {len(clips)} clips)"
            )
        self.clips, self.batch, self.seed = clips, batch, seed
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self.epoch, self.position = 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "ranks": self.ranks,
            "clips": len(self.clips),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a loader of the same data, seed and number of ranks stopped.

        Raises:
            ValueError: the position belongs to another order; it would repeat or lose clips.
        """
        mine = self.state_dict()
        for key in ("seed", "ranks", "clips"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"ClipLoader: the saved position belongs to {key}={state[key]} (got "
                    f"{mine[key]}); resume with the same data, seed and number of ranks"
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def order(self, epoch: int) -> list[int]:
        """This rank's clips of an epoch, in order: len(clips) // ranks of them, or one more."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.clips), generator=generator)[
            self.rank :: self.ranks
        ].tolist()

    def attempts(self) -> Iterator[tuple[int, int, Clip | str]]:
        """(epoch, position after this one, clip or reason) from the current position, endlessly."""
        epoch, position = self.epoch, self.position
        while True:
            order, good = self.order(epoch), position > 0
            loader = DataLoader(
                Attempts(self.clips),
                batch_size=None,
                sampler=order[position:],
                num_workers=self.workers,
                prefetch_factor=4 if self.workers else None,
            )
            for _, result in loader:
                position += 1
                good = good or isinstance(result, Clip)
                yield epoch, position, result
            if not good:
                raise ValueError(
                    f"ClipLoader: no clip of {self.clips.config.root!r} decodes "
                    f"({'; '.join(self.clips.report.lines()[:3])})"
                )
            epoch, position = epoch + 1, 0

    def __iter__(self) -> Iterator[Tensor]:
        """uint8 [batch, T, H, W, 3], endlessly.

        Raises:
            ValueError: an entire epoch of this rank gave nothing.
        """
        held: list[Tensor] = []
        for epoch, position, result in self.attempts():
            if isinstance(result, str):
                # A worker's report stays in the worker: repeat it in this process.
                number, _ = self.clips.starts[self.order(epoch)[position - 1]]
                self.clips.report.add(self.clips.sources[number].name, result)
                continue
            held.append(result.frames)
            if len(held) == self.batch:
                self.epoch, self.position = epoch, position
                yield torch.stack(held)
                held = []
