"""Every fault of the spine, provoked for real on the `mirage` command, as a user would meet it.

The two faults of the kernel cache (two processes, damage) are provoked in test_loader.py.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mirage_hello.model import budget
from mirage_hello.tools import cli
from mirage_hello.tools.video_reader import Frame, VideoReader
from mirage_hello.tools.video_writer import VideoWriter

SIZE_LIMIT = 16 * 1024  # bytes: room for the container's header, not for the pictures


def mirage(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, on the CPU."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=240, **options
    )


def command(*arguments: object) -> list[str]:
    code = "import sys; from mirage_hello.tools.cli import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, *map(str, arguments)]


def run_arguments(source: Path, target: Path, *more: object) -> list[object]:
    return ["run", source, "-o", target, "--preset", "tiny", "--device", "cpu", *more]


def write_clip(path: Path, frames: int, width: int = 64, height: int = 64) -> Path:
    """Moving noise, so that every frame costs bytes."""
    noise = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with VideoWriter(path, width, height, Fraction(24), Fraction(1, 24)) as writer:
        for index in range(frames):
            writer.write(Frame(np.roll(noise, 3 * index, axis=1), index))
    return path


def decoded_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=12)


@pytest.fixture
def here(capsys):
    """The command in this process, for faults that need none of their own: starting costs 4 s."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def assert_one_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr with these words."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("mirage run: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def header_without_frames(path: Path) -> Path:
    """An MP4 whose index is there and whose pictures are not."""
    whole = path.with_name("whole.mp4")
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    data = whole.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    return path


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.int16), "s16", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.mp4", ("no such file", "none.mp4")),
        (lambda folder: folder, ("is a directory", "video file")),
        (lambda folder: folder / "notes.txt", ("text file", "expected a video")),
        (lambda folder: folder / "noise.mp4", ("not a video", "check that")),
        (lambda folder: header_without_frames(folder / "empty.mp4"), ("holds no frame",)),
        (lambda folder: sound_only(folder / "sound.m4a"), ("no video stream", "audio")),
    ],
    ids=["missing", "directory", "text", "noise", "no-frames", "sound-only"],
)
def test_input_that_is_no_video(tmp_path, out, make, words):
    (tmp_path / "notes.txt").write_text("a list of things to do\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(9999))
    assert_one_sentence(mirage(*run_arguments(make(tmp_path), out / "o.mp4")), *words)
    assert left_in(out) == set()


def test_input_and_output_are_the_same_file(clip, tmp_path):
    before = clip.read_bytes()
    link = tmp_path / "link.mp4"
    link.symlink_to(clip)
    for target in (clip, link, clip.parent / ".." / clip.parent.name / clip.name):
        assert_one_sentence(mirage(*run_arguments(clip, target)), "same file", "another name")
    assert clip.read_bytes() == before


def test_output_that_cannot_be_written(clip, out):
    (out / "file").touch()
    for target, word in (
        (out / "missing" / "o.mp4", "no such folder"),
        (out / "file" / "o.mp4", "no such folder"),
        (Path("/proc/o.mp4"), "cannot write into"),
        (out, "is a directory"),
        (out / "o.webm", "expected a name that ends in .mp4"),
    ):
        done = mirage(*run_arguments(clip, target), "--max-frames", 1)
        assert done.returncode == 2 and word in done.stderr, done.stderr
    assert left_in(out) == {"file"}


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_truncated_input_keeps_the_frames_up_to_the_break(here, tmp_path, out, ending):
    whole = tmp_path / f"whole.{ending}"
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    with av.open(str(whole), "w", options=options) as made:
        stream = made.add_stream("libx264", rate=10, options={"g": "1"})  # frames of equal size
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for index in range(16):
            picture = av.VideoFrame.from_ndarray(np.roll(noise, index, 1), format="rgb24")
            made.mux(stream.encode(picture))
        made.mux(stream.encode(None))
    broken = tmp_path / f"broken.{ending}"
    data = whole.read_bytes()
    broken.write_bytes(data[: len(data) * 6 // 10])
    done = here(*run_arguments(broken, out / "o.mp4"), "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert 3 <= result["frames"] < 16
    assert any("truncated" in warning for warning in result["warnings"])
    assert "warning: " in done.stderr
    assert decoded_frames(out / "o.mp4") == result["frames"]


@pytest.mark.parametrize("size", ["70x50", "65x63", "8x8", "3x5"])
def test_size_that_is_no_multiple_of_8_is_padded_and_cropped_back(here, clip, out, size):
    done = here(*run_arguments(clip, out / "o.mp4", "--size", size, "--max-frames", 2), "--json")
    assert done.returncode == 0, done.stderr
    width, height = map(int, size.split("x"))
    with VideoReader(out / "o.mp4") as reader:
        # yuv420p holds even sizes only: one more row or column, said in the notes.
        assert (reader.width, reader.height) == (width + width % 2, height + height % 2)
    assert bool(json.loads(done.stdout)["notes"]) == bool(width % 2 or height % 2)


def test_names_that_are_not_known_bring_the_nearest(here, clip, out):
    for option, name, nearest in (
        ("--backend", "trition", "triton"),
        ("--backend", "atention=torch", "attention"),
        ("--backend", "attention=pttx", "ptx"),
        ("--preset", "88m", "880m"),
        ("--style", "watercolor", "watercolour"),
        ("--dtype", "f16", "fp16"),
    ):
        done = here(*run_arguments(clip, out / "o.mp4", option, name))
        assert_one_sentence(done, f"did you mean {nearest}?", option)
    assert left_in(out) == set()


def test_backend_that_cannot_run_here_says_what_explain_says(here, clip, out):
    done = here(*run_arguments(clip, out / "o.mp4", "--backend", "cuda"))
    assert_one_sentence(done, "backend cuda cannot run")
    op = re.match(r"mirage run: (\w+): ", done.stderr).group(1)
    explained = here("explain", op, "--device", "cpu", "--backend", "cuda", "--json")
    candidates = json.loads(explained.stdout)["candidates"]
    reasons = [c["reason"] for c in candidates if c["backend"] == "cuda"]
    for reason in reasons:
        assert reason in done.stderr
    assert reasons or "no cuda kernel is registered" in done.stderr
    assert left_in(out) == set()


def test_memory_that_is_too_small_is_predicted_with_a_size_that_fits(here, clip, out, monkeypatch):
    free = 120 * 2**20  # the tiny model's weights take half of it
    monkeypatch.setattr(budget, "available", lambda device: free)
    arguments = run_arguments(clip, out / "o.mp4", "--max-frames", 1)
    done = here(*arguments, "--size", "2048x1024")
    assert_one_sentence(done, "2048x1024 needs", "120 MiB are free")
    assert left_in(out) == set()
    (fits,) = re.findall(r"(\d+x\d+) would fit", done.stderr)
    assert here(*arguments, "--size", fits).returncode == 0
    assert decoded_frames(out / "o.mp4") == 1


def start_long_run(tmp_path: Path, out: Path, size: str) -> subprocess.Popen:
    """A run of 400 frames, returned once its first frames are in the encoder."""
    source = write_clip(tmp_path / "long.mp4", frames=400)
    running = subprocess.Popen(
        command(*run_arguments(source, out / "o.mp4", "--size", size)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.iterdir()):  # the hidden file is made when everything else is ready
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    return running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_playable_part(tmp_path, out, number):
    running = start_long_run(tmp_path, out, "64x64")
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert left_in(out) == {"o.mp4"}
    assert 1 <= decoded_frames(out / "o.mp4") < 400
    assert "interrupted: the part so far" in stdout and "Traceback" not in stderr


def test_second_ctrl_c_leaves_at_once_and_nothing(tmp_path, out):
    running = start_long_run(tmp_path, out, "1536x1536")  # seconds a frame
    running.send_signal(signal.SIGINT)
    assert "once more to leave at once" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert left_in(out) == set()
    assert "interrupted" in stderr and "Traceback" not in stderr


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE_LIMIT, SIZE_LIMIT))


def test_file_size_limit_keeps_nothing(tmp_path, out):
    source = write_clip(tmp_path / "clip.mp4", frames=12, width=256, height=256)
    done = mirage(
        *run_arguments(source, out / "o.mp4"), "--json",
        preexec_fn=limit_file_size, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "free some space" in done.stderr
    assert json.loads(done.stdout) == {"error": done.stderr.removeprefix("mirage run: ").strip()}
    assert left_in(out) == set()


@pytest.fixture
def small_disk(tmp_path):
    """(folder, how to run there): 16 KiB of file system where this user may mount one, else a
    limit of that size on every file."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_LIMIT}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield folder, {} if mounted else {"preexec_fn": limit_file_size}
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_nothing_and_leaves_an_older_file(tmp_path, small_disk):
    folder, how = small_disk
    (folder / "o.mp4").write_bytes(b"an older result")
    source = write_clip(tmp_path / "clip.mp4", frames=12, width=256, height=256)
    done = mirage(*run_arguments(source, folder / "o.mp4"), **how)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert left_in(folder) == {"o.mp4"}
    assert (folder / "o.mp4").read_bytes() == b"an older result"


def test_two_runs_into_the_same_file_leave_one_whole_file(clip, out):
    running = [
        subprocess.Popen(command(*run_arguments(clip, out / "o.mp4")), stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert left_in(out) == {"o.mp4"}
    assert decoded_frames(out / "o.mp4") == 12
