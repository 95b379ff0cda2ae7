"""Reads any video as upright RGB frames with their timestamps, and its sound as packets.

The model sees uint8 [H,W,3] in sRGB order.  What a file may do differently from that is undone
here, once: rotation metadata, interlacing, alpha, bit depth, chroma layout, colour matrix, a size
that changes on the way.  Timestamps pass through untouched, so that variable frame rates and the
sound stay right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.filter
import av.stream
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mirage_hello.tools.errors import BadInput

# AVColorSpace numbers as files carry them (ITU-T H.273, MatrixCoefficients).
BT709, UNSPECIFIED = 1, 2
# AVColorTransferCharacteristic of high dynamic range: PQ (SMPTE ST 2084) and HLG (ARIB STD-B67).
HDR_TRANSFERS = {16, 18}
# ffmpeg's demuxers that read text as pictures; a person who passes notes.txt made a mistake.
TEXT_FORMATS = {"tty", "bin", "xbin", "adf", "idf"}
# Presentation times finer than a microsecond do not fit MP4's 32-bit time scale on long files.
FINEST_TIME_BASE = Fraction(1, 1_000_000)
FALLBACK_TIME_BASE = Fraction(1, 90_000)


@dataclass(frozen=True)
class Frame:
    """One upright picture.

    Args:
        pixels: uint8 [H,W,3], RGB.
        pts: presentation time in units of the reader's `time_base`, strictly increasing.
    """

    pixels: np.ndarray
    pts: int


class VideoReader:
    """Yields every frame of a file, and its audio packets, in the file's order.

    Args:
        path: a video in any container and codec that FFmpeg reads.
        size: (width, height) to scale to; default: the file's own size, upright.
        want_audio: also yield the audio packets (to copy them).

    Raises:
        BadInput: missing file, a directory, not a video, no video stream, no frame at all.

    After the loop `warnings` says what was wrong with the file (a break, damaged packets), and
    `notes` what was undone (rotation, alpha, ...).
    """

    def __init__(
        self, path: Path, size: tuple[int, int] | None = None, want_audio: bool = True
    ) -> None:
        self.path = path
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.container = _open_input(path)
        self.stream = _video_stream(self.container, path)
        self.stream.thread_type = "AUTO"  # type: ignore[assignment]
        self.audio_streams = list(self.container.streams.audio) if want_audio else []
        self.rate = _frame_rate(self.stream)
        self.time_base = _time_base(self.stream)
        self.damaged_packets = 0
        self._decoder = _decoder(self.stream)
        self._deinterlacer: av.filter.Graph | None = None
        self._last_pts: int | None = None
        self._end = Fraction(0)
        self._frames = 0
        self._decoded = self._decode()
        # The first picture, not the header, tells size, rotation and alpha; audio met on the way
        # waits for its turn.
        self._waiting: deque[Frame | av.Packet] = deque()
        self._wanted_size = size
        self._read_first_frame()

    @property
    def frame_count(self) -> int | None:
        """How many frames the header promises, or None where it does not say."""
        if self.stream.frames:
            return self.stream.frames
        seconds = self.declared_seconds
        return round(seconds * self.rate) if seconds else None

    @property
    def declared_seconds(self) -> Fraction | None:
        """The length of the picture track that the header promises, in seconds."""
        return _declared_seconds(self.stream, self.container)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.container.close()

    def __iter__(self) -> Iterator[Frame | av.Packet]:
        while self._waiting:
            yield self._waiting.popleft()
        yield from self._decoded
        self._say_what_was_missing()

    # Decoding

    def _read_first_frame(self) -> None:
        for item in self._decoded:
            self._waiting.append(item)
            if isinstance(item, Frame):
                self.height, self.width = item.pixels.shape[:2]
                return
        self.container.close()
        raise BadInput(
            f"{str(self.path)!r} holds no frame that decodes "
            f"(its video stream is {self.stream.codec_context.name}); "
            "check that the file is complete"
        )

    def _decode(self) -> Iterator[Frame | av.Packet]:
        for packet in self._packets():
            if packet.stream.type == "audio":
                if packet.dts is not None:
                    yield packet
                continue
            try:
                pictures = self._decoder.decode(packet)
            except av.error.FFmpegError:
                self.damaged_packets += 1
                continue
            for picture in pictures:
                if not picture.is_corrupt:
                    yield from self._upright(picture)
        if self._deinterlacer is not None:
            # bwdif looks one picture ahead, so the last one comes out only at the end.
            for whole in _through(self._deinterlacer, None):
                yield Frame(self._pixels(whole), self._timestamp(whole))

    def _packets(self) -> Iterator[av.Packet]:
        """Demuxed packets; a break in the file ends them like the file's end, flush included."""
        try:
            yield from self.container.demux(self.stream, *self.audio_streams)
        except av.error.FFmpegError as error:
            self.warnings.append(f"the file breaks off ({error.strerror})")
            flush = av.Packet()
            flush.stream = self.stream
            yield flush

    def _upright(self, picture: av.VideoFrame) -> Iterator[Frame]:
        if picture.interlaced_frame and self._deinterlacer is None:
            self._deinterlacer = _deinterlacer(self.stream, picture)
            self._note("interlaced: fields joined with bwdif")
        graph = self._deinterlacer
        for whole in [picture] if graph is None else _through(graph, picture):
            yield Frame(self._pixels(whole), self._timestamp(whole))

    def _pixels(self, picture: av.VideoFrame) -> np.ndarray:
        turns = round(picture.rotation / 90) % 4
        if turns:
            self._note(f"rotation metadata: turned upright by {90 * turns} degrees")
        width, height = self._wanted_size or (picture.width, picture.height)
        if self._wanted_size and turns % 2:
            width, height = height, width
        if not self._wanted_size and hasattr(self, "width"):
            # A size that changes on the way is scaled to the first picture's.
            width, height = (self.height, self.width)[:: 1 if turns % 2 else -1]
        rgb = _to_rgb(picture, width, height, self._note)
        return np.ascontiguousarray(np.rot90(rgb, turns))

    def _timestamp(self, picture: av.VideoFrame) -> int:
        step = max(1, round(1 / (self.rate * self.time_base)))
        if picture.pts is None:
            pts = 0 if self._last_pts is None else self._last_pts + step
        else:
            # Frames that a flush brings out carry no time base: theirs is the stream's.
            unit = picture.time_base or self.stream.time_base or self.time_base
            pts = round(picture.pts * unit / self.time_base)
        if self._last_pts is not None and pts <= self._last_pts:
            pts = self._last_pts + 1
        self._last_pts = pts
        self._frames += 1
        self._end = (pts + step) * self.time_base
        return pts

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _say_what_was_missing(self) -> None:
        if self.damaged_packets:
            self.warnings.append(f"{self.damaged_packets} damaged packets were left out")
        if self._frames < self.stream.frames and self.container.format.name == "avi":
            # An AVI's length is counted again from what is left; its header keeps the number.
            self.warnings.append(
                f"the header promises {self.stream.frames} frames and {self._frames} are there; "
                "the file is truncated, and the frames up to the break were kept"
            )
        declared = self.declared_seconds
        if declared is None:
            return
        start = (self.stream.start_time or 0) * (self.stream.time_base or Fraction(0))
        got = self._end - start
        # Two frames of slack: containers round the last frame's length in different ways.
        if got + 2 / self.rate < declared:
            self.warnings.append(
                f"the picture ends at {float(got):.2f} s of the {float(declared):.2f} s that the "
                "header promises; the file is truncated, and the frames up to the break were kept"
            )


def _open_input(path: Path) -> av.container.InputContainer:
    if not path.exists():
        raise BadInput(f"no such file: {str(path)!r}; give the path of a video on this machine")
    if path.is_dir():
        raise BadInput(f"{str(path)!r} is a directory; expected a video file, so name one in it")
    try:
        # "file:" keeps a name with a colon from being read as a protocol.
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except PermissionError as error:
        raise BadInput(
            f"cannot read {str(path)!r} ({error.strerror}); check its permissions"
        ) from error
    except (av.error.FFmpegError, OSError) as error:
        raise BadInput(
            f"{str(path)!r} is not a video that FFmpeg can read ({error.strerror}); "
            "check that the file is complete and plays elsewhere"
        ) from error
    if container.format.name in TEXT_FORMATS:
        container.close()
        raise BadInput(f"{str(path)!r} is a text file; expected a video")
    return container


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    for stream in container.streams.video:
        # A cover picture inside a music file is a video stream in name only.
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = sorted({str(stream.type) for stream in container.streams}) or ["nothing"]
    container.close()
    raise BadInput(
        f"{str(path)!r} has no video stream (it holds {', '.join(kinds)}); expected a video"
    )


def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """The stream's decoder; for WebM with alpha libvpx, the only one that returns the alpha."""
    codec = stream.codec_context.name
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if codec in ("vp8", "vp9") and tags.get("alpha_mode") == "1":
        return av.VideoCodecContext.create("libvpx" if codec == "vp8" else "libvpx-vp9", "r")
    return stream.codec_context


def _frame_rate(stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else Fraction(25)


def _time_base(stream: av.VideoStream) -> Fraction:
    base = stream.time_base
    return base if base and base >= FINEST_TIME_BASE else FALLBACK_TIME_BASE


def _declared_seconds(
    stream: av.VideoStream, container: av.container.InputContainer
) -> Fraction | None:
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    if "DURATION" in stream.metadata:  # Matroska: "00:00:02.000000000"
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    if container.duration and not container.streams.audio:
        return Fraction(container.duration, av.time_base)
    return None


def _deinterlacer(stream: av.VideoStream, picture: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=picture.width,
        height=picture.height,
        format=picture.format,
        time_base=stream.time_base,
    )
    fields = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    source.link_to(fields)
    fields.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def _through(graph: av.filter.Graph, picture: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    graph.push(picture)
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _to_rgb(
    picture: av.VideoFrame, width: int, height: int, note: Callable[[str], None]
) -> np.ndarray:
    """uint8 [height,width,3] by the colour matrix that the file names."""
    matrix = picture.colorspace
    if matrix == UNSPECIFIED:
        # What players assume: BT.709 from 720 lines up, BT.601 below.
        matrix = Colorspace.ITU709 if picture.height >= 720 else Colorspace.ITU601
    if picture.color_trc in HDR_TRANSFERS:
        note("high dynamic range: taken as it is, without tone mapping")
    has_alpha = any(component.is_alpha for component in picture.format.components)
    converted = picture.reformat(
        width=width,
        height=height,
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=matrix,
        dst_color_range=ColorRange.JPEG,
    ).to_ndarray()
    if not has_alpha:
        return converted
    note("alpha: composited over black")
    color, alpha = converted[..., :3].astype(np.uint16), converted[..., 3:].astype(np.uint16)
    return ((color * alpha + 127) // 255).astype(np.uint8)  # 255 * 255 + 127 < 2**16
