"""Real video: random access, resize, shards, ranks and workers, resume, and really broken files."""

import tarfile
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from mirage_hello.model.data.loader import ClipLoader  # noqa: E402
from mirage_hello.model.data.sources import find_sources  # noqa: E402
from mirage_hello.model.data.video import ClipConfig, UnreadableVideo, VideoClips, fit  # noqa: E402

FRAMES, HEIGHT, WIDTH = 24, 48, 64


def encode(path, frames=FRAMES, codec="libx264", first=0, gop=8, bframes=2):
    """A clip whose frame number can be read back: its mean is 8 n + 20.

    The grain gives every frame some hundred bytes, so that a cut or a hole hits frames.
    """
    grain = np.random.default_rng(0).integers(-12, 13, (HEIGHT // 4, WIDTH // 4, 1))
    grain = np.kron(grain - round(grain.mean()), np.ones((4, 4, 3), np.int64))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "1", "bf": str(bframes)}
        for n in range(first, first + frames):
            grey = (8 * n + 20 + np.roll(grain, 5 * n, 1)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))


def encode_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        for i in range(8):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.rate, sound.pts = 48000, 1024 * i
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def numbers(frames: torch.Tensor) -> list[int]:
    """Frame numbers read off the grey levels."""
    return ((frames.float().mean((1, 2, 3)) - 20) / 8).round().int().tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    encode(root / "a.mp4")
    (root / "deep").mkdir()
    encode(root / "deep" / "b.mkv", codec="mpeg4", gop=12)
    return root


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """One good file among: empty, text, header only, cut off, damaged inside, sound only, short."""
    root = tmp_path_factory.mktemp("broken")
    encode(root / "good.mp4")
    whole = (root / "good.mp4").read_bytes()
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_bytes(b"this is not a video\n" * 40)
    (root / "header.mp4").write_bytes(whole[:64])
    encode(root / "whole.mkv")
    cut = (root / "whole.mkv").read_bytes()
    (root / "whole.mkv").unlink()
    (root / "cut.mkv").write_bytes(cut[: len(cut) * 2 // 3])
    damaged = bytearray(cut)
    damaged[len(cut) // 3 : len(cut) // 3 + 400] = bytes(400)
    (root / "damaged.mkv").write_bytes(damaged)
    encode_sound(root / "sound.mp4")
    encode(root / "short.mp4", frames=2)
    (root / "notes.txt").write_text("not a video's name")
    return root


def test_random_access_gives_the_frames_asked_for(folder):
    clips = VideoClips(ClipConfig(str(folder), frames=4, height=32, width=32))
    assert len(clips) == 2 * FRAMES // 4 and not clips.report.skipped
    for index in (5, 0, 3, 11, 6):
        clip = clips[index]
        assert clip.frames.shape == (4, 32, 32, 3) and clip.frames.dtype == torch.uint8
        assert numbers(clip.frames) == list(range(clip.start, clip.start + 4)), clip.source


def test_stride_and_overlap(folder):
    config = ClipConfig(str(folder / "a.mp4"), frames=3, height=48, width=64, stride=3, step=2)
    clips = VideoClips(config)
    assert len(clips) == (FRAMES - 7) // 2 + 1
    assert numbers(clips[4].frames) == [8, 11, 14]


@pytest.mark.parametrize("size", [(48, 64), (32, 80), (100, 20), (7, 9)])
def test_fit_covers_any_size(size):
    frames = [np.full((HEIGHT, WIDTH, 3), 90, np.uint8)] * 2
    assert fit(frames, *size).shape == (2, *size, 3) and (fit(frames, *size) == 90).all()


def test_fit_keeps_the_centre():
    frame = np.zeros((48, 96, 3), np.uint8)
    frame[:, 46:50] = 255
    column = fit([frame], 48, 48)[0, 24, :, 0]
    assert column[22:26].tolist() == [255] * 4 and column.sum() == 255 * 4


def test_broken_files_are_reported_and_skipped(broken):
    clips = VideoClips(ClipConfig(str(broken), frames=4, height=16, width=16))
    skipped = {name.rsplit("/", 1)[1]: why for name, why in clips.report.skipped.items()}
    assert "empty (0 bytes)" in skipped["empty.mp4"]
    assert "cannot be opened" in skipped["text.mp4"] and "header.mp4" in skipped
    assert "no video stream (streams: audio)" in skipped["sound.mp4"]
    assert "2 frames" in skipped["short.mp4"]
    assert "good.mp4" not in skipped and "notes.txt" not in skipped
    cut = [s for s, _ in clips.starts if clips.sources[s].name.endswith("cut.mkv")]
    assert 0 < len(cut) < FRAMES // 4  # the part before the cut is still good


def test_each_good_clip_once_an_epoch_even_among_broken_ones(broken):
    clips = VideoClips(ClipConfig(str(broken), frames=4, height=16, width=16))
    loader = ClipLoader(clips, batch=1, seed=3)
    seen = []
    for epoch, position, result in loader.attempts():
        if epoch == 1:
            break
        if not isinstance(result, str):
            seen.append((result.source, result.start))
            read = numbers(result.frames)
            assert read == list(range(read[0], read[0] + 4)), result.source
            assert read[0] == result.start or result.source.endswith("damaged.mkv")
        assert position <= len(clips)
    assert len(seen) == len(set(seen)) and len(seen) >= FRAMES // 4


def test_a_file_that_breaks_later_raises_one_sentence(tmp_path):
    encode(tmp_path / "a.mkv")
    clips = VideoClips(ClipConfig(str(tmp_path), frames=4, height=16, width=16))
    whole = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UnreadableVideo, match="decod"):
        clips[len(clips) - 1]
    assert len(clips.report.lines()) == 1
    with pytest.raises(ValueError, match=r"no clip of .* decodes"):
        (tmp_path / "a.mkv").write_bytes(b"")
        next(iter(ClipLoader(clips, batch=1)))


def test_shards_hold_the_same_clips_as_the_folder(folder, tmp_path):
    with tarfile.open(tmp_path / "s-000.tar", "w") as archive:
        archive.add(folder / "a.mp4", "000.mp4")
        (tmp_path / "000.json").write_text("{}")
        archive.add(tmp_path / "000.json", "000.json")
    with tarfile.open(tmp_path / "s-001.tar", "w") as archive:
        archive.add(folder / "deep" / "b.mkv", "001.mkv")
    config = ClipConfig(str(tmp_path / "s-*.tar"), frames=4, height=16, width=16)
    shards, files = VideoClips(config), VideoClips(ClipConfig(str(folder), 4, 16, 16))
    assert len(shards) == len(files)
    for i in range(len(files)):
        assert torch.equal(shards[i].frames, files[i].frames)
    assert "s-000.tar!000.mp4" in shards[0].source


def test_cut_off_shard_keeps_what_came_before(folder, tmp_path):
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(folder / "a.mp4", "0.mp4")
        archive.add(folder / "deep" / "b.mkv", "1.mkv")
    size = (folder / "a.mp4").stat().st_size
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: size + 1600])
    (tmp_path / "not.tar").write_bytes(b"x" * 3000)
    names = [s.name for s in find_sources(str(tmp_path / "cut.tar"))]
    assert any(name.endswith("!0.mp4") for name in names)
    clips = VideoClips(ClipConfig(str(tmp_path), 4, 16, 16))
    assert any("not.tar" in line for line in clips.report.lines())


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_each_epoch(folder, workers):
    clips = VideoClips(ClipConfig(str(folder), frames=4, height=16, width=16))
    seen = []
    for rank in range(2):
        loader = ClipLoader(clips, batch=2, seed=5, rank=rank, ranks=2, workers=workers)
        for epoch, _, clip in loader.attempts():
            if epoch == 1:
                break
            seen.append((clip.source, clip.start))
    assert len(seen) == len(set(seen)) == len(clips)


def test_resume_continues_with_the_very_next_clip(folder):
    clips = VideoClips(ClipConfig(str(folder), frames=4, height=16, width=16))
    batches, states = [], []
    loader = ClipLoader(clips, batch=5, seed=1)
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
        if len(batches) == 6:
            break
    for at in (0, 1, 3):  # 3: in the second epoch
        resumed = ClipLoader(clips, batch=5, seed=1)
        resumed.load_state_dict(states[at])
        for expected, batch in zip(batches[at + 1 :], resumed, strict=False):
            assert torch.equal(batch, expected)
    with pytest.raises(ValueError, match="seed=1"):
        ClipLoader(clips, batch=5, seed=2).load_state_dict(states[0])


def test_nothing_to_read_is_one_clear_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        VideoClips(ClipConfig(str(tmp_path / "missing")))
    with pytest.raises(ValueError, match=r"no readable video .*no file has a video's name"):
        VideoClips(ClipConfig(str(tmp_path)))
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable video .*a.mp4: the file is empty"):
        VideoClips(ClipConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="at least 1"):
        ClipConfig(str(tmp_path), frames=0)
