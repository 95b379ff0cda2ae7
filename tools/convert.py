"""The frame loop: reads a clip, pushes each frame through a function, writes the result."""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mirage_hello.tools import terminal
from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.video_reader import Frame, VideoReader
from mirage_hello.tools.video_writer import VideoWriter

Push = Callable[[np.ndarray], np.ndarray]
# What a full disk, a quota and a file-size limit say.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Outcome:
    """What a conversion did: frames written, the model's time for each, whether it was stopped."""

    frames: int = 0
    seconds: float = 0.0
    push_ms: list[float] = field(default_factory=list)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json: counts, frames per second, percentiles of the model's milliseconds."""
        levels = {"p50": 50, "p95": 95, "p99": 99}
        times = {k: round(float(np.percentile(self.push_ms, p)), 3) for k, p in levels.items()}
        return {
            "frames": self.frames,
            "seconds": round(self.seconds, 3),
            "fps": round(self.frames / self.seconds, 2) if self.seconds else None,
            "frame_ms": times,
            "interrupted": self.interrupted,
            "notes": self.notes,
            "warnings": self.warnings,
        }


def convert(
    reader: VideoReader, target: Path, push: Push, max_frames: int | None = None
) -> Outcome:
    """Every frame of `reader` through `push` into an H.264 file at `target`, sound copied.

    Args:
        reader: an opened clip; it is closed at the end.
        target: written beside and renamed at the end, so it is whole or not there.
        push: uint8 [H,W,3] -> uint8 [H,W,3] of the same size.
        max_frames: stop after this many.

    Raises:
        BadInput: `target` cannot be written, or the disk is full.

    The first Ctrl-C (or SIGTERM) ends the loop after the frame at hand, and the file so far is
    kept; the second leaves at once and removes it.
    """
    outcome = Outcome()
    total = min((n for n in (reader.frame_count, max_frames) if n), default=None)
    writer = VideoWriter(
        target, reader.width, reader.height, reader.rate, reader.time_base, reader.audio_streams
    )
    start = time.perf_counter()
    try:
        with (
            stop_on_signal() as stopped,
            reader,
            terminal.progress_bar("frames") as progress,
            writer,
        ):
            task = progress.add_task(reader.path.name, total=total)
            for item in reader:
                if not isinstance(item, Frame):
                    writer.copy(item)
                    continue
                writer.write(Frame(_timed(push, item.pixels, outcome), item.pts))
                progress.advance(task)
                if stopped.is_set() or writer.frames == max_frames:
                    break
        outcome.interrupted = stopped.is_set()
    except OSError as error:
        what = "the disk is full" if error.errno in DISK_FULL else "the output cannot be written"
        raise BadInput(
            f"{what}: {str(target.parent)!r} took {writer.frames} frames, then "
            f"{error.strerror}; nothing was kept, so free some space or write elsewhere with -o"
        ) from error
    outcome.seconds = time.perf_counter() - start
    outcome.frames = writer.frames
    outcome.notes = reader.notes + writer.notes
    outcome.warnings = reader.warnings
    return outcome


def _timed(push: Push, pixels: np.ndarray, outcome: Outcome) -> np.ndarray:
    start = time.perf_counter()
    result = push(pixels)
    outcome.push_ms.append((time.perf_counter() - start) * 1e3)
    return result


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Within the block the first SIGINT or SIGTERM only sets the event; the second interrupts.

    A signal that broke off an encoder in the middle of a write would leave a file that does not
    play.
    """
    stopped = threading.Event()

    def handle(number: int, _: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        terminal.warn("stopping after this frame; once more to leave at once and keep nothing")

    saved = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
