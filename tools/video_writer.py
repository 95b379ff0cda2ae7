"""Writes H.264 beside its final name, then renames: a path that exists is a whole file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.video_reader import BT709, Frame

# Containers that hold H.264 with any timestamps.  Not .webm (no H.264), .avi (one constant rate).
CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv")


class VideoWriter:
    """Writes H.264 (yuv420p, BT.709) to a hidden name in the same folder and renames at the end.

    As a context manager: the end of the block renames, an exception removes the hidden file, so
    a path that exists is always a whole, playable file.

    Args:
        path: where the result will lie; its ending chooses the container.
        width, height: of the frames.  yuv420p holds only even sizes: an odd one gets one more
            column or row, a copy of its edge.
        rate: frames per second, the nominal one (timestamps decide).
        time_base: seconds per unit of `pts`.
        audio_streams: input streams whose packets `copy` will get.

    Raises:
        BadInput: the folder is missing or cannot be written, or the container cannot hold H.264.
        OSError: from `write` and `finish` when the disk is full.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        time_base: Fraction,
        audio_streams: Sequence[av.AudioStream] = (),
    ) -> None:
        check_target(path)
        self.path = path
        self.notes: list[str] = []
        self.frames = 0
        self._padding = ((0, height % 2), (0, width % 2), (0, 0))
        self._time_base = time_base
        self.partial = _create_beside(path)
        self.container = av.open(f"file:{self.partial}", "w")
        stream = self.container.add_stream("libx264", rate=rate)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.time_base = time_base
        context = stream.codec_context
        context.time_base = time_base
        # crf 18: no visible loss against the model's own output; veryfast: 512x512 at > 300 fps.
        context.options = {"crf": "18", "preset": "veryfast"}
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        self._stream = stream
        self._copies = {a.index: self._copy_of(a) for a in audio_streams if self._can_hold(a)}
        if width % 2 or height % 2:
            self.notes.append(
                f"yuv420p holds even sizes only: {width}x{height} is stored as "
                f"{stream.width}x{stream.height}, the edge repeated"
            )

    def write(self, frame: Frame) -> None:
        """Encode one frame, uint8 [H,W,3]."""
        pixels = frame.pixels
        if any(after for _, after in self._padding):
            pixels = np.pad(pixels, self._padding, mode="edge")
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        picture.pts, picture.time_base = frame.pts, self._time_base
        self.container.mux(self._stream.encode(picture))
        self.frames += 1

    def copy(self, packet: av.Packet) -> None:
        """Remux one audio packet, untouched; one whose stream the container cannot hold is left."""
        target = self._copies.get(packet.stream.index)
        if target is not None:
            packet.stream = target
            self.container.mux_one(packet)

    def finish(self) -> None:
        """Flush the encoder, close the file and give it its name."""
        self.container.mux(self._stream.encode(None))
        self.container.close()
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # closing a file on a full disk fails once more
            self.container.close()
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self.frames:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise

    def _can_hold(self, audio: av.AudioStream) -> bool:
        codec = audio.codec_context.codec
        name = codec.canonical_name  # "dts", where FFmpeg's decoder calls itself "dca"
        if {name, codec.name} & self.container.supported_codecs:
            return True
        self.notes.append(
            f"sound left out: {self.path.suffix} cannot hold {name}; write to .mkv to keep it"
        )
        return False

    def _copy_of(self, audio: av.AudioStream) -> av.AudioStream:
        return self.container.add_stream_from_template(audio)


def check_target(path: Path, source: Path | None = None) -> None:
    """Say what is wrong with an output path before anything slow begins.

    Raises:
        BadInput: `path` is `source`, a directory, of an ending that is not in CONTAINERS, or in a
            folder that does not exist or cannot be written.
    """
    if path.is_dir():
        raise BadInput(f"-o {str(path)!r} is a directory; name a file in it, such as out.mp4")
    if source and path.exists() and source.exists() and path.samefile(source):
        raise BadInput(f"input and output are the same file ({str(path)!r}); give -o another name")
    if path.suffix.lower() not in CONTAINERS:
        raise BadInput(
            f"cannot write H.264 with free timestamps into {path.name!r}; "
            f"expected a name that ends in {', '.join(CONTAINERS)}"
        )
    if not path.parent.is_dir():
        raise BadInput(f"cannot write into {str(path.parent)!r}: no such folder; make it first")
    _create_beside(path).unlink()


def _create_beside(path: Path) -> Path:
    """An empty hidden file next to `path`, so that the rename stays within one file system."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        with partial.open("wb"):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot write into {str(path.parent)!r} ({error.strerror}); "
            "give -o a path in a folder that is writable"
        ) from error
    return partial
