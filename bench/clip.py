"""The frames that the `frame` rows push: a video, a file of frames, or a drawn pattern."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .rows import Options

CLIP = Path(__file__).resolve().parent.parent / "assets" / "demo.mp4"


def read_clip(options: Options) -> tuple[np.ndarray, str]:
    """The frames to push, uint8 [F, H, W, 3] at the size asked for, and where they are from.

    A video by PyAV, or a .npy file of frames; where PyAV is missing and no clip is named, a drawn
    one. A clip shorter than the run is played to and fro.

    Raises:
        ValueError: PyAV is missing, or the file is no video or no array of such frames.
    """
    path = Path(options.clip) if options.clip else CLIP
    height, width = options.size
    if path.suffix == ".npy":
        frames = _loaded(path)[: options.frames]
    elif not options.clip and importlib.util.find_spec("av") is None:
        frames, path = _drawn(height, width, min(options.frames, 64)), Path("drawn pattern")
    else:
        frames = _decoded(path, height, width, options.frames)
    if frames.shape[1:] != (height, width, 3) or frames.dtype != np.uint8:
        expected = f"[F, {height}, {width}, 3] uint8"
        raise ValueError(f"{path}: expected {expected} (got {frames.shape} {frames.dtype})")
    return frames, f"{path.name}, {len(frames)} frames"


def _loaded(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected an array that np.save wrote ({error})") from error


def _decoded(path: Path, height: int, width: int, count: int) -> np.ndarray:
    if importlib.util.find_spec("av") is None:
        raise ValueError(
            f"{path}: PyAV, which decodes videos, is not installed; pip install av, or give a .npy "
            f"file of frames, uint8 [F, {height}, {width}, 3], or no clip: a pattern is drawn"
        )
    import av

    try:
        with av.open(str(path)) as container:
            decoded = (
                frame.to_ndarray(format="rgb24", width=width, height=height)
                for _, frame in zip(range(count), container.decode(video=0), strict=False)
            )
            return np.stack(list(decoded))
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: no video that FFmpeg reads ({error}); give another") from error


def _drawn(height: int, width: int, count: int) -> np.ndarray:
    """A drifting pattern with a little noise, uint8 [count, H, W, 3]."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    frames = (np.stack([x + 9 * i, y + 5 * i, x + y], -1) / 3 % 256 for i in range(count))
    noisy = [frame + draw.normal(0, 4, frame.shape) for frame in frames]
    return np.stack([frame.clip(0, 255).astype(np.uint8) for frame in noisy])


def played(clip: np.ndarray, first: int, count: int) -> Iterator[np.ndarray]:
    """`count` frames from `first` on, to and fro, so that there is no cut."""
    period = max(1, 2 * len(clip) - 2)
    for i in range(first, first + count):
        at = i % period
        yield clip[at if at < len(clip) else period - at]
