"""Real video: clips of consecutive frames from folders and WebDataset shards, through PyAV.

    clips = VideoClips(ClipConfig("videos/", frames=8, height=256, width=256))
    clips[17].frames                   # uint8 [8, 256, 256, 3]; the same clip every time
    clips.report.lines()               # what was skipped, and why

Every source is read through once at the start (its packets, without decoding) to learn its frames.
What cannot be read is put on the report and left out; what breaks later (damage in the middle) is
put on the report, and its place in the epoch is skipped, never filled with a repeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.model.data.sources import Source, find_sources

GAP = 4  # times the median interval between frames: beyond, frames are missing


class UnreadableVideo(ValueError):
    """A source that cannot give the frames asked for; the message says why, in one sentence."""


@dataclass(frozen=True)
class ClipConfig:
    """What a clip is.

    root: folder or shard (.tar), or a glob of them; frames: consecutive frames of one clip;
    stride: take every stride-th frame; step: frames between the starts of two clips (0: as long
    as a clip); height, width: pixels after the resize (short side to fit) and centre crop.
    """

    root: str
    frames: int = 8
    height: int = 256
    width: int = 256
    stride: int = 1
    step: int = 0

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width, self.stride) < 1 or self.step < 0:
            raise ValueError(
                "ClipConfig: frames, height, width and stride must be at least 1, step at least 0 "
                f"(got {self.frames}, {self.height}, {self.width}, {self.stride}, {self.step})"
            )

    @property
    def span(self) -> int:
        """Source frames from the first to the last frame of a clip."""
        return (self.frames - 1) * self.stride + 1


@dataclass
class Clip:
    """frames uint8 [T, H, W, 3]; source name, and the number of the first frame in it."""

    frames: Tensor
    source: str
    start: int


@dataclass
class Report:
    """What was skipped: (source name, reason), each source and reason once."""

    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.skipped.setdefault(name, reason)

    def lines(self) -> list[str]:
        """One sentence for each skipped source."""
        return [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]


def probe(source: Source) -> np.ndarray:
    """Presentation times of the frames of the first video stream, sorted: int64 [frames].

    They come from the packets: a header may lie about the number of frames, and frame rates vary.

    Raises:
        UnreadableVideo: empty, not a video, no video stream, or no frame.
    """
    import av

    if source.size == 0:
        raise UnreadableVideo("the file is empty (0 bytes)")
    try:
        with source.open() as stream, av.open(stream, "r") as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
                raise UnreadableVideo(f"it has no video stream (streams: {kinds})")
            # Packets of size 0 are the flush mark at the end, not frames.
            packets = [p for p in container.demux(container.streams.video[0]) if p.size]
            times = [p.dts if p.pts is None else p.pts for p in packets]
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"it cannot be opened ({type(error).__name__}: {error})") from error
    if not times:
        raise UnreadableVideo("its video stream holds no frame")
    if None in times:
        raise UnreadableVideo("its frames carry no times; remux it to MP4 or MKV")
    return np.unique(np.array(times, np.int64))


def read_frames(source: Source, times: np.ndarray) -> list[np.ndarray]:
    """The frames that are shown at these times (increasing): uint8 [h, w, 3] each.

    It seeks to the keyframe before the first and decodes from there; where a seek lands too late
    (some containers' indices are wrong) it starts again from the beginning.

    Raises:
        UnreadableVideo: the decoder fails, or a frame is missing.
    """
    import av

    try:
        with source.open() as stream, av.open(stream, "r") as container:
            video = container.streams.video[0]
            video.thread_type = "SLICE"  # workers are the parallelism; frame threads add latency
            container.seek(int(times[0]), stream=video, backward=True)
            found = decode_times(container, video, times)
        if len(found) < len(times):
            with source.open() as stream, av.open(stream, "r") as container:
                found = decode_times(container, container.streams.video[0], times)
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideo(
            f"decoding fails at time stamp {times[0]} ({type(error).__name__}: {error})"
        ) from error
    if len(found) < len(times):
        raise UnreadableVideo(f"{len(times) - len(found)} of {len(times)} frames do not decode")
    return found


def decode_times(container, video, times: np.ndarray) -> list[np.ndarray]:
    """The frames with these time stamps, in order, as many as come."""
    wanted, found = {int(t) for t in times}, {}
    for frame in container.decode(video):
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp in wanted:
            found[stamp] = frame.to_ndarray(format="rgb24")
        if len(found) == len(wanted) or (stamp is not None and stamp > times[-1]):
            break
    return [found[t] for t in sorted(found)]


def fit(frames: list[np.ndarray], height: int, width: int) -> Tensor:
    """Resize (antialiased, so that the crop is covered) and centre crop: uint8 [T, H, W, 3]."""
    x = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    scale = max(height / x.shape[2], width / x.shape[3])
    size = (max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale)))
    if size != tuple(x.shape[2:]):
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    x = x[:, :, top : top + height, left : left + width]
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class VideoClips(torch.utils.data.Dataset):
    """Clips by number: clips[i] is always the same one.

    Args:
        config: what a clip is and where.
    Attributes:
        report: what was skipped; sources, times: the readable ones, and when each frame is shown.
    Raises:
        ValueError: no readable video under root; the message counts what was skipped and why.
    """

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.report = Report()
        self.sources: list[Source] = []
        self.times: list[np.ndarray] = []
        self.starts: list[tuple[int, int]] = []
        for source in find_sources(config.root):
            try:
                times = probe(source)
                count = len(times)
                if count < config.span:
                    raise UnreadableVideo(
                        f"it has {count} frames, and a clip spans {config.span}; ask for fewer"
                    )
            except UnreadableVideo as error:
                self.report.add(source.name, str(error))
                continue
            self._add(source, times)
        if not self.starts:
            skipped = "; ".join(self.report.lines()[:3]) or "no file has a video's name"
            raise ValueError(
                f"VideoClips: no readable video in {config.root!r} ({skipped}); "
                "give a folder of .mp4, .mkv, .mov, .webm, .avi files or of .tar shards"
            )

    def _add(self, source: Source, times: np.ndarray) -> None:
        """Count the clips of a source; those across a hole (lost frames) are reported, not used."""
        span, step = self.config.span, self.config.step or self.config.span
        # Frame rates vary by small factors; frames that were lost leave a longer gap than that.
        gaps = np.diff(times, append=times[-1])
        usual = np.median(gaps[:-1]) if len(times) > 1 else 0
        holes = np.flatnonzero(gaps > GAP * usual)
        starts = range(0, len(times) - span + 1, step)
        whole = [s for s in starts if not any(s <= hole < s + span - 1 for hole in holes)]
        if len(whole) < len(starts):
            self.report.add(
                f"{len(starts) - len(whole)} clips of {source.name}",
                f"frames are missing in {len(holes)} places",
            )
        if whole:
            self.starts += [(len(self.sources), s) for s in whole]
            self.sources.append(source)
            self.times.append(times)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`; UnreadableVideo (also on the report) where the file breaks inside it."""
        number, start = self.starts[index]
        source, config = self.sources[number], self.config
        try:
            frames = read_frames(
                source, self.times[number][start : start + config.span][:: config.stride]
            )
        except UnreadableVideo as error:
            self.report.add(source.name, str(error))
            raise
        return Clip(fit(frames, config.height, config.width), source.name, start)
