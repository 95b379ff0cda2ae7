"""Live streams: part of each batch goes on from the model's own outputs, as at run time.

Every training step pushes each stream one frame further with the sampler of run time. A stream
lives on its clip until it is as long as the schedule allows, the clip ends, or the pool replaces
the clip; then it begins somewhere else, from true frames or from an empty memory. So the cost of
roll-outs of any length is one or two evaluations a step, without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_hello.model.memory import ContextMemory
from mirage_hello.model.training.config import TrainingError
from mirage_hello.model.training.history import true_memory
from mirage_hello.model.training.pool import ClipPool

OVER = 1 << 30  # the age of a stream that must begin again
EMPTY_SHARE = 0.1  # of the new streams: begin with an empty memory, as a user's stream does


class LiveStreams:
    """`count` streams over the clips of a pool.

    Attributes: clip, time, age int64 [B]: where each stream is; blank bool [B]: began with an empty
    memory; memory: of their own outputs; noise float32 [B, C, h, w]: the start noise of its last.
    """

    def __init__(self, count: int, pool: ClipPool, history: int) -> None:
        self.pool, self.history, self.count = pool, history, count
        device, (channels, height, width) = pool.device, pool.targets.shape[2:]
        self.memory = ContextMemory(count, channels, height, width, history, device=device)
        self.clip = torch.zeros(count, dtype=torch.int64, device=device)
        self.time, self.age = self.clip.clone(), torch.full_like(self.clip, OVER)
        self.blank = torch.zeros_like(self.clip, dtype=torch.bool)
        self.noise = torch.zeros(count, channels, height, width, device=device)

    def begin(self, where: Tensor, generator: torch.Generator) -> None:
        """Start the streams of a mask (bool [B]) at random places of random clips."""
        n, frames, _ = self.pool.targets.shape[:3]
        device = self.clip.device

        def draw(high: int) -> Tensor:
            return torch.randint(high, (self.count,), generator=generator, device=device)

        def share(value: float) -> Tensor:
            return torch.rand(self.count, generator=generator, device=device) < value

        clip, time = draw(n), draw(max(1, frames - 2))
        empty = share(EMPTY_SHARE)
        old_sink = share(0.7)
        truth = true_memory(self.pool, clip, time, self.history, old_sink).float()
        truth = truth * ~empty[:, None, None, None]
        mask = where[:, None, None, None]
        channels = self.memory.channels
        noise = torch.randn(self.noise.shape, generator=generator, device=device)
        self.noise.copy_(torch.where(mask, noise, self.noise))
        self.memory.history.copy_(torch.where(mask, truth[:, :-channels], self.memory.history))
        self.memory.sink.copy_(torch.where(mask, truth[:, -channels:], self.memory.sink))
        # The first output becomes the sink only where the memory is empty.
        seen = time * ~empty
        self.memory.count.copy_(torch.where(where, seen, self.memory.count))
        self.blank.copy_(torch.where(where, (time == 0) | empty, self.blank))
        self.clip.copy_(torch.where(where, clip, self.clip))
        self.time.copy_(torch.where(where, time, self.time))
        self.age.mul_(~where)

    def lose(self, replaced: Tensor) -> None:
        """The pool replaced these clips (int64 [R]): their streams are over."""
        self.age.masked_fill_(torch.isin(self.clip, replaced), OVER)

    def retire(self, longest: Tensor | int, generator: torch.Generator) -> None:
        """Begin again the streams that are over."""
        over = (self.age >= longest) | (self.time >= self.pool.targets.shape[1])
        self.begin(over, generator)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """(memory [B, (K + 1) C, h, w], clip [B], time [B]) of the frame each stream is to draw."""
        memory = torch.cat((self.memory.history, self.memory.sink), 1)
        return memory, self.clip, self.time

    def held_to_details(self, frames: int) -> Tensor:
        """How much each stream's next frame is held to the truth's details, float32 [B] in [0, 1].

        1 - age / frames, and 0 from the second frame on where the memory began empty: what a
        stream had to invent is not in the truth, and a loss that asks for the truth there teaches
        that a memory of own outputs is worth nothing.
        """
        kept = (1 - self.age / frames).clamp(0, 1)
        return torch.where(self.blank & (self.age > 0), 0.0, kept)

    @torch.no_grad()
    def push(self, outputs: Tensor) -> Tensor:
        """Remember the outputs [B, C, h, w]; returns their errors against the truth."""
        errors = outputs - self.pool.targets[self.clip, self.time]
        self.memory.push(outputs)
        self.time.add_(1)
        self.age.add_(1)
        return errors

    def state_dict(self) -> dict:
        memory = self.memory
        return {
            "history": memory.history.clone(), "sink": memory.sink.clone(),
            "count": memory.count.clone(), "clip": self.clip.clone(), "time": self.time.clone(),
            "age": self.age.clone(), "blank": self.blank.clone(),
            "noise": self.noise.clone(),
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise TrainingError(
                f"the checkpoint's streams have no {missing[0]}: another version wrote it; go on "
                "from its --compact folder with --resume-from, or from its weights with start="
            )
        for name in ("history", "sink", "count"):
            getattr(self.memory, name).copy_(state[name])
        for name in ("clip", "time", "age", "blank", "noise"):
            getattr(self, name).copy_(state[name])
