"""Clips on the device: rendered (or read), encoded once, and used many times.

A pool is filled by numbered refreshes. What refresh n writes, and where, depends on (seed, rank, n)
alone, so a resumed run rebuilds the pool that the killed one had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.model.data.city import HELD_OUT
from mirage_hello.model.data.loader import ClipLoader
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.video import ClipConfig, VideoClips
from mirage_hello.model.data.worlds import Shot, WorldConfig, Worlds
from mirage_hello.model.training.config import TrainConfig, TrainingError

STYLE_NAMES = tuple(STYLES)
REAL_STYLE = len(STYLE_NAMES)  # the style index of real clips
OLDEST = 4000  # frames: a clip begins anywhere below, and its sink frame anywhere before it

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """The clips of one refresh: seeds, style numbers, first and sink frame, camera, cuts, and
    rays along a pixel's side."""

    seeds: Tensor
    styles: Tensor
    first: Tensor
    sink: Tensor
    fov: float
    cut_frames: int
    view: str
    supersample: int


def plan(config: TrainConfig, rank: int, number: int, clips: int, domain: int = 0) -> Plan:
    """The clips of refresh `number` of a rank; `domain` separates pools of different use."""
    key = (config.seed * 1_000_003 + rank * 8191 + domain * 127) * 1_000_003 + number
    generator = torch.Generator().manual_seed(key % (1 << 62))

    def draw(high: int) -> Tensor:
        return torch.randint(high, (clips,), generator=generator)

    first = draw(OLDEST)
    fraction = torch.rand(clips, generator=generator)
    u = torch.rand(4, generator=generator).tolist()
    return Plan(
        seeds=draw(HELD_OUT),
        # One style a refresh: the renderer shades a whole batch at once, five times as fast.
        styles=torch.full((clips,), (number + domain) % len(STYLE_NAMES)),
        first=first,
        sink=(first * fraction).long(),
        # 0.55 is what a quarter of a 512-pixel frame sees: the same network must draw both sizes.
        fov=0.55 * (1.1 / 0.55) ** u[0],
        cut_frames=16 if u[1] < config.cut_share else 0,
        view="camera" if u[2] < config.camera_share else "plain",
        supersample=1 if u[3] < config.rough_share else config.supersample,
    )


@cache
def fused_on(device: torch.device) -> bool:
    """Whether rays are traced by one kernel there; what speaks against it is printed once."""
    if device.type != "cuda":
        return False
    from mirage_hello.model.data.raycast_triton import refusal

    reason = refusal(device)
    if reason:
        print(
            f"rays are traced by torch, which is slower: the kernel failed ({reason})", flush=True
        )
    return reason is None


def worlds_of(config: TrainConfig, planned: Plan, device: torch.device) -> Worlds:
    """The renderer of a plan."""
    world = WorldConfig(
        config.size, config.size, planned.supersample, planned.fov, planned.cut_frames,
        config.cells,
        view=planned.view, fused=config.fused and fused_on(device), motion=False,
    )  # fmt: skip
    return Worlds(world, device)


class Scene:
    """The worlds of one refresh: any frame of them."""

    def __init__(self, config: TrainConfig, planned: Plan, device: torch.device) -> None:
        self.planned = planned
        self.worlds = worlds_of(config, planned, device)
        self.city = self.worlds.clips(planned.seeds)
        self.names = [STYLE_NAMES[i] for i in planned.styles.tolist()]

    def frame(self, numbers: Tensor) -> Shot:
        return self.worlds.render(self.city, numbers, self.names)


def plain_of(frames: Tensor) -> Tensor:
    """A plain input view of real frames [B, 3, H, W] in [-1, 1]: blurred, six grey levels."""
    grey = frames.mean(1, keepdim=True)
    small = F.avg_pool2d(grey, 4, ceil_mode=True)
    smooth = F.interpolate(small, frames.shape[2:], mode="bilinear", align_corners=False)
    return ((smooth * 2.5).round() / 2.5).expand_as(frames)


def real_clips(config: TrainConfig, frames: int, rank: int, ranks: int) -> ClipLoader:
    """The loader of `config.video`; TrainingError says why there is nothing to read."""
    try:
        clips = VideoClips(ClipConfig(config.video, frames, config.size, config.size))
        return ClipLoader(clips, config.refresh_clips, config.seed, rank, ranks)
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"training data: {error}") from error


class Pool(ABC):
    """What both pools share: numbered refreshes over a ring of slots, and the place in real clips.

    Args:
        slots: how many refreshes the pool holds; frames: of one real clip.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, rank: int, ranks: int, slots: int,
        frames: int,
    ) -> None:  # fmt: skip
        self.config, self.device, self.rank = config, device, rank
        self.slots, self.number = slots, 0
        self.loader = real_clips(config, frames, rank, ranks) if config.video else None
        self.reader: Iterator[Tensor] | None = None
        # Where the loader was before each refresh that the pool still holds.
        self.marks: deque[dict[str, int]] = deque(maxlen=slots)

    def fill(self) -> None:
        """Make all the slots of the current state, at the start of a run or after a resume."""
        number = max(self.number, self.slots)
        for n in range(number - self.slots, number):
            self.refresh(n)
        self.number = number

    def advance(self) -> Tensor:
        """One more refresh; returns the numbers of the clips that it replaced, int64 [R]."""
        self.refresh(self.number)
        at = (self.number % self.slots) * self.config.refresh_clips
        self.number += 1
        return torch.arange(at, at + self.config.refresh_clips, device=self.device)

    @abstractmethod
    def refresh(self, number: int) -> None:
        """Write slot number % slots."""

    def real(self) -> Tensor | None:
        """The next real clips, float [R, T, 3, H, W] in [-1, 1]; None where data is rendered."""
        if self.loader is None:
            return None
        self.reader = self.reader or iter(self.loader)
        self.marks.append(self.loader.state_dict())
        frames = next(self.reader).to(self.device)
        return frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1

    def state_dict(self) -> dict:
        """Enough to make the same pool again: `fill` after `load_state_dict`."""
        return {"number": self.number, "reader": self.marks[0] if self.marks else None}

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"]
        if self.loader is not None and state["reader"] is not None:
            self.loader.load_state_dict(state["reader"])


class FramePool(Pool):
    """Single frames in [-1, 1] for the autoencoder: views and styled truth, uint8 on the device."""

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, ranks: int) -> None:
        self.pair = 2 * config.refresh_clips
        slots = max(2, min(64, 8 * config.autoencoder_batch // self.pair + 1))
        super().__init__(config, device, rank, ranks, slots, frames=1)
        shape = (slots * self.pair, 3, config.size, config.size)
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=device)

    def refresh(self, number: int) -> None:
        planned = plan(self.config, self.rank, number, self.config.refresh_clips, domain=1)
        target = self.real()
        if target is None:
            shot = Scene(self.config, planned, self.device).frame(planned.first)
            frames = torch.cat((shot.view, shot.target))
        else:
            frames = torch.cat((plain_of(target[:, 0]), target[:, 0]))
        at = (number % self.slots) * self.pair
        self.frames[at : at + self.pair] = ((frames + 1) * 127.5).round().clamp(0, 255).byte()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Frames [count, 3, H, W] in [-1, 1], half of them mirrored."""
        index = torch.randint(len(self.frames), (count,), generator=generator, device=self.device)
        frames = self.frames[index].float() / 127.5 - 1
        flip = torch.rand(count, generator=generator, device=self.device) < 0.5
        return torch.where(flip[:, None, None, None], frames.flip(3), frames)


class ClipPool(Pool):
    """Latents of clips. views, targets [N, T, C, h, w]; sinks [N, C, h, w]; styles int64 [N].

    A rendered refresh is made frame by frame beside the pool (`render_until`), so that a training
    step can hide the host's work for one, and moved into it when it is whole.
    """

    def __init__(
        self, config: TrainConfig, encode: Encode, channels: int, device: torch.device, rank: int,
        ranks: int,
    ) -> None:  # fmt: skip
        slots = config.pool_clips // config.refresh_clips
        super().__init__(config, device, rank, ranks, slots, config.clip_frames)
        self.encode = encode
        n, t, side = config.pool_clips, config.clip_frames, config.size // 8
        # A bfloat16 latent of deviation 0.5 has steps of 0.002, a hundredth of that.
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, channels, side, side, dtype=dtype, device=device)

        self.views, self.targets, self.sinks = zeros(n, t), zeros(n, t), zeros(n)
        self.styles = torch.zeros(n, dtype=torch.int64, device=device)
        # The refresh that is being made: its latents, its scene, and how many frames are done.
        new = config.refresh_clips
        self.new_views, self.new_targets = zeros(new, t), zeros(new, t)
        self.new_sinks = zeros(new)
        self.scene: Scene | None = None
        self.done = 0

    def render_until(self, share: float) -> None:
        """Make the next refresh as far as this share of it; nothing where clips are real."""
        if self.loader is None:
            self.make(self.number, round(share * (self.config.clip_frames + 1)))

    @torch.no_grad()
    def make(self, number: int, until: int) -> None:
        """Frames of refresh `number` up to `until`; the last is the sink."""
        count, frames = self.config.refresh_clips, self.config.clip_frames
        if self.done < until and self.scene is None:
            planned = plan(self.config, self.rank, number, count)
            self.scene = Scene(self.config, planned, self.device)
        while self.done < until:
            assert self.scene is not None
            if self.done < frames:
                shot = self.scene.frame(self.scene.planned.first + self.done)
                self.write(self.new_views, self.new_targets, self.done, shot.view, shot.target)
            else:
                sink = self.scene.frame(self.scene.planned.sink).target
                self.new_sinks.copy_(self.encode(sink))
            self.done += 1

    @torch.no_grad()
    def refresh(self, number: int) -> None:
        count, frames = self.config.refresh_clips, self.config.clip_frames
        at = (number % self.slots) * count
        rows = slice(at, at + count)
        clips = self.real()
        if clips is not None:
            for t in range(frames):
                self.write(self.new_views, self.new_targets, t, plain_of(clips[:, t]), clips[:, t])
            self.new_sinks.copy_(self.new_targets[:, 0])
            self.styles[rows] = REAL_STYLE
        else:
            self.make(number, frames + 1)
            assert self.scene is not None
            self.styles[rows] = self.scene.planned.styles.to(self.device)
        self.views[rows], self.targets[rows] = self.new_views, self.new_targets
        self.sinks[rows] = self.new_sinks
        self.scene, self.done = None, 0

    def write(self, views: Tensor, targets: Tensor, t: int, view: Tensor, target: Tensor) -> None:
        latents = self.encode(torch.cat((view, target))).to(views.dtype)
        views[:, t], targets[:, t] = latents.chunk(2)
