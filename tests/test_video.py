"""Every way in which a file may differ from upright 8-bit RGB at a constant rate, read back."""

import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.video_reader import Frame, VideoReader
from mirage_hello.tools.video_writer import VideoWriter

# 4:2:0 chroma, limited range and crf 18 move a flat colour by a few levels of 255.
FLAT_TOLERANCE = 6
COLORS = ((220, 40, 40), (40, 200, 40), (40, 40, 210), (128, 128, 128))


def quadrants(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Four flat colours, a different one in each corner, so that every flip and turn shows."""
    picture = np.full((height, width, channels), 255, np.uint8)
    halves = [(slice(0, height // 2), slice(height // 2, None)), (0, 0)]
    for index, color in enumerate(COLORS):
        rows = halves[0][index // 2]
        columns = slice(0, width // 2) if index % 2 == 0 else slice(width // 2, None)
        picture[rows, columns, :3] = color
    return picture


def corners(picture: np.ndarray) -> np.ndarray:
    """Mean colour of the middle of each quadrant, int [4,3], row by row."""
    height, width = picture.shape[:2]
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return np.array(
        [picture[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)) for y in rows for x in columns]
    )


def encode(
    path: Path,
    codec: str,
    pix_fmt: str,
    width: int = 64,
    height: int = 48,
    frames: int = 6,
    picture: np.ndarray | None = None,
    pts: list[int] | None = None,
    options: dict | None = None,
    **settings,
) -> Path:
    """A clip by PyAV; `settings` are attributes of the codec context, `rotation` of the stream."""
    rotation = settings.pop("rotation", None)
    metadata = settings.pop("metadata", {})
    picture = quadrants(width, height) if picture is None else picture
    kind = {3: "rgb24", 4: "rgba"}[picture.shape[2]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.metadata.update(metadata)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture, format=kind)
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read(path: Path, **options) -> tuple[list[Frame], VideoReader]:
    with VideoReader(path, want_audio=False, **options) as reader:
        return list(reader), reader


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("h264.mp4", "libx264", "yuv420p", {}),
        ("h264_10bit.mkv", "libx264", "yuv420p10le", {}),
        ("h264_444.mov", "libx264", "yuv444p", {}),
        ("hevc_10bit.mp4", "libx265", "yuv420p10le", {"x265-params": "log-level=error"}),
        ("mpeg4.avi", "mpeg4", "yuv420p", {}),
        ("mpeg2.ts", "mpeg2video", "yuv420p", {}),
        ("vp9.webm", "libvpx-vp9", "yuv420p", {}),
        ("mjpeg.avi", "mjpeg", "yuvj420p", {}),
        ("prores.mov", "prores_ks", "yuv422p10le", {}),
        ("ffv1.mkv", "ffv1", "bgr0", {}),
        ("animation.gif", "gif", "rgb8", {}),
    ],
)
def test_container_and_codec(tmp_path, name, codec, pix_fmt, options):
    path = encode(tmp_path / name, codec, pix_fmt, options=options)
    frames, reader = read(path)
    assert len(frames) == 6
    assert frames[0].pixels.shape == (48, 64, 3)
    # rgb8 has 8 levels of red and green, 4 of blue: half a step of 255 / 3.
    tolerance = 43 if pix_fmt == "rgb8" else FLAT_TOLERANCE
    assert np.abs(corners(frames[-1].pixels) - COLORS).max() <= tolerance
    assert reader.warnings == []


def test_grayscale_is_gray(tmp_path):
    frames, _ = read(encode(tmp_path / "gray.mkv", "ffv1", "gray"))
    assert frames[0].pixels.shape == (48, 64, 3)
    assert np.ptp(frames[0].pixels.astype(int), axis=2).max() == 0


@pytest.mark.parametrize(
    ("rotation", "order"), [(90, [1, 3, 0, 2]), (-90, [2, 0, 3, 1]), (180, [3, 2, 1, 0])]
)
def test_rotation_metadata_is_undone(tmp_path, rotation, order):
    path = encode(tmp_path / "turned.mp4", "libx264", "yuv420p", rotation=rotation)
    frames, reader = read(path)
    expected = np.array(COLORS)[order]  # a display rotation counts counterclockwise
    assert np.abs(corners(frames[0].pixels) - expected).max() <= FLAT_TOLERANCE
    assert (reader.width, reader.height) == ((64, 48) if rotation == 180 else (48, 64))
    assert any("rotation" in note for note in reader.notes)


def test_requested_size_is_of_the_upright_picture(tmp_path):
    path = encode(tmp_path / "turned.mp4", "libx264", "yuv420p", rotation=90)
    frames, _ = read(path, size=(36, 48))
    assert frames[0].pixels.shape == (48, 36, 3)


@pytest.mark.parametrize("name", ["qtrle.mov", "vp9.webm"])
def test_alpha_is_composited_over_black(tmp_path, name):
    picture = quadrants(64, 48, channels=4)
    picture[:, 32:, 3] = 0  # the right half is transparent
    codec, pix_fmt, metadata = ("qtrle", "argb", {})
    if name == "vp9.webm":
        codec, pix_fmt, metadata = "libvpx-vp9", "yuva420p", {"alpha_mode": "1"}
    path = encode(tmp_path / name, codec, pix_fmt, picture=picture, metadata=metadata)
    frames, reader = read(path)
    seen = corners(frames[0].pixels)
    assert np.abs(seen[[0, 2]] - np.array(COLORS)[[0, 2]]).max() <= FLAT_TOLERANCE
    assert seen[[1, 3]].max() <= 2
    assert "alpha: composited over black" in reader.notes


def test_interlaced_fields_are_joined(tmp_path):
    """A bright bar moves 4 columns from field to field; woven, its edges are combs."""
    path = tmp_path / "interlaced.ts"
    flags = av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=10, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        stream.codec_context.flags |= flags
        for index in range(8):
            woven = np.zeros((48, 96, 3), np.uint8)
            for field in range(2):
                left = 8 * index + 4 * field
                woven[field::2, left : left + 16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(woven, format="rgb24")))
        container.mux(stream.encode(None))
    frames, reader = read(path)
    assert len(frames) == 8
    assert any("interlaced" in note for note in reader.notes)
    combs = np.abs(np.diff(frames[4].pixels[8:-8, :, 0].astype(int), axis=0)).mean()
    # Woven: 8 of 96 columns jump by 200 between neighbouring lines, on average 200 * 8 / 96 = 17.
    assert combs < 17 / 3


def test_variable_frame_rate_keeps_every_timestamp(tmp_path):
    pts = [0, 40, 55, 300, 1000, 1010]
    source = encode(tmp_path / "vfr.mkv", "libx264", "yuv420p", pts=pts)
    target = tmp_path / "out.mp4"
    copy_through(source, target)
    frames, reader = read(target)
    assert [round(f.pts * reader.time_base * 1000) for f in frames] == pts


@pytest.mark.parametrize(("matrix", "height"), [(1, 48), (6, 48), (2, 48), (2, 720)])
def test_color_matrix_of_the_file_is_used(tmp_path, matrix, height):
    """A BT.709 file read as BT.601 is off by 20 levels and more in green and red."""
    path = tmp_path / "matrix.mkv"
    written = matrix if matrix != 2 else (1 if height >= 720 else 5)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv444p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 1
        frame = av.VideoFrame.from_ndarray(quadrants(64, height), format="rgb24")
        frame = frame.reformat(format="yuv444p", dst_colorspace=written)
        frame.colorspace = matrix
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, _ = read(path)
    assert np.abs(corners(frames[0].pixels) - COLORS).max() <= 3


def test_size_change_on_the_way_is_scaled_to_the_first(tmp_path):
    parts = [
        encode(tmp_path / f"{w}.ts", "mpeg2video", "yuv420p", width=w, height=h)
        for w, h in ((64, 48), (96, 80))
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(p.read_bytes() for p in parts))
    frames, _ = read(joined)
    assert len(frames) >= 11
    assert {f.pixels.shape for f in frames} == {(48, 64, 3)}
    assert all(a.pts < b.pts for a, b in itertools.pairwise(frames))


@pytest.mark.parametrize("size", [(145, 97), (1, 1), (2, 3), (64, 48)])
def test_written_file_holds_the_frames(tmp_path, size):
    width, height = size
    target = tmp_path / "out.mp4"
    picture = quadrants(width, height) if width > 4 else np.full((height, width, 3), 90, np.uint8)
    with VideoWriter(target, width, height, Fraction(25), Fraction(1, 25)) as writer:
        for index in range(5):
            writer.write(Frame(picture, index))
    frames, _ = read(target)
    assert len(frames) == 5
    assert frames[0].pixels.shape == (height + height % 2, width + width % 2, 3)
    assert bool(writer.notes) == bool(width % 2 or height % 2)
    if width > 4:
        assert np.abs(corners(frames[0].pixels) - COLORS).max() <= FLAT_TOLERANCE
    with av.open(str(target)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.colorspace == 1  # BT.709, as said in the stream


def write_sound(container: av.container.OutputContainer, stream, seconds: float) -> None:
    samples = (np.sin(np.arange(int(48000 * seconds)) / 20) * 9000).astype(np.int16)
    planes = np.stack([samples, samples], axis=1).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(planes, format="s16", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def with_sound(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream(codec, rate=48000, layout="stereo")
        for _ in range(10):
            picture = av.VideoFrame.from_ndarray(quadrants(64, 48), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        write_sound(container, audio, seconds=1.0)
    return path


def copy_through(source: Path, target: Path) -> VideoWriter:
    with VideoReader(source) as reader:
        size = reader.width, reader.height
        with VideoWriter(
            target, *size, reader.rate, reader.time_base, reader.audio_streams
        ) as writer:
            for item in reader:
                if isinstance(item, Frame):
                    writer.write(item)
                else:
                    writer.copy(item)
    return writer


def sound(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=-1)


def test_sound_is_copied_bit_by_bit(tmp_path):
    source = with_sound(tmp_path / "in.mkv", "aac")
    target = tmp_path / "out.mp4"
    writer = copy_through(source, target)
    assert writer.notes == []
    assert np.array_equal(sound(source), sound(target))


def test_sound_that_the_container_cannot_hold_is_left_out_and_said(tmp_path):
    source = with_sound(tmp_path / "in.mkv", "pcm_u8")
    writer = copy_through(source, tmp_path / "out.mp4")
    assert "sound left out: .mp4 cannot hold pcm_u8; write to .mkv to keep it" in writer.notes
    frames, _ = read(tmp_path / "out.mp4")
    assert len(frames) == 10


def test_exception_in_the_block_leaves_nothing(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"an older result")
    writer = VideoWriter(target, 64, 48, Fraction(25), Fraction(1, 25))
    with pytest.raises(RuntimeError, match="model"), writer:
        writer.write(Frame(quadrants(64, 48), 0))
        raise RuntimeError("the model failed")
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert target.read_bytes() == b"an older result"


def test_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "out.mp4"
    with VideoWriter(target, 64, 48, Fraction(25), Fraction(1, 25)) as writer:
        writer.write(Frame(quadrants(64, 48), 0))
        assert not target.exists()
    assert target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("cut", [0.35, 0.6, 0.9])
@pytest.mark.parametrize("ending", ["mkv", "mp4", "ts", "avi"])
def test_truncated_file_yields_the_frames_up_to_the_break(tmp_path, ending, cut):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    whole = tmp_path / f"whole.{ending}"
    # The index of an MP4 stands at its end unless `faststart` moves it to the front.
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    with av.open(str(whole), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(40):
            picture = av.VideoFrame.from_ndarray(np.roll(noise, index, axis=1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    broken = tmp_path / f"broken.{ending}"
    data = whole.read_bytes()
    broken.write_bytes(data[: int(len(data) * cut)])
    frames, reader = read(broken)
    assert 40 * cut - 12 <= len(frames) < 40
    if ending != "ts":  # a transport stream promises no length, so nobody can tell
        assert any("truncated" in w or "breaks off" in w for w in reader.warnings)
    complete, of_whole = read(whole)
    assert len(complete) == 40 and of_whole.warnings == []
    # The frames that were kept are the same pictures.
    assert np.abs(frames[3].pixels.astype(int) - complete[3].pixels).max() == 0


def test_bad_inputs_are_one_sentence(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a video\n" * 50)
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(4096))
    empty = tmp_path / "empty.mp4"
    empty.touch()
    audio = tmp_path / "audio.mka"
    with av.open(str(audio), "w") as container:
        write_sound(container, container.add_stream("aac", rate=48000, layout="stereo"), 0.2)
    for path, words in (
        (tmp_path / "none.mp4", "no such file"),
        (tmp_path, "is a directory"),
        (text, "text file"),
        (noise, "not a video"),
        (empty, "not a video"),
        (audio, "no video stream"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            VideoReader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_outputs_are_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "missing" / "out.mp4", "no such folder"),
        (tmp_path / "file" / "out.mp4", "no such folder"),
        (Path("/proc/out.mp4"), "cannot write into"),
        (tmp_path, "is a directory"),
        (tmp_path / "out.webm", "cannot write H.264"),
        (tmp_path / "out.xyz", "cannot write H.264"),
        (tmp_path / "out", "cannot write H.264"),
    ):
        with pytest.raises(BadInput, match=words):
            VideoWriter(path, 64, 48, Fraction(25), Fraction(1, 25))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_reading_needs_no_torch():
    code = "import sys, mirage_hello.tools.video_reader; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
