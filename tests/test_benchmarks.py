"""The benchmark cases under pytest-benchmark: small shapes, each checked before it is timed.

The same cases, inputs and parity rule as `mirage bench`; `--benchmark-only` prints the table.
"""

import numpy as np
import pytest
import torch

from mirage_hello.bench import (
    bus,
    composed,
    diffusers_peers,
    eight_bit,
    folded,
    peers,
    worker,
)
from mirage_hello.bench import clip as clips
from mirage_hello.bench.case import PEERS
from mirage_hello.bench.rows import INTERPRETED, Options, left_out, op_named, prepare
from mirage_hello.kernels import conv2d_fused, ops
from mirage_hello.model import FrameStream, build

OPTIONS = Options(device="cpu")
CASES = [case for case, _ in worker.cases(OPTIONS)]
CASE_IDS = [f"{case.op} {case.name}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_speed(case, benchmark):
    subject = prepare(case, "float32", OPTIONS)
    runnable = [k for k in op_named(case.op).kernels if not left_out(k, subject.call, OPTIONS)]
    kernel = min(runnable, key=lambda k: k.backend == "torch")  # ours where one runs on a CPU
    with torch.no_grad():
        parity = subject.judge(kernel.run(*subject.args))
        assert parity.passed, f"{kernel.name}: {parity}"
        out = benchmark.pedantic(kernel.run, subject.args, rounds=5, iterations=2, warmup_rounds=1)
    assert subject.judge(out).passed, "the timed output differs from the checked one"
    benchmark.extra_info.update(subject.where, kernel=kernel.name, error=parity.error)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_a_peer_computes_the_op(case):
    """Beating a function that computes something else would be no feat."""
    subject = prepare(case, "float32", OPTIONS)
    out = peers.EAGER[case.op](*subject.args)
    parity = subject.judge(out)
    assert parity.error <= max(parity.allowed, 1e-6), parity


def test_every_op_has_cases_and_a_peer():
    names = {op.name for op in ops}
    own = {*composed.OPS, *folded.OPS}
    assert names | own == {case.op for case in CASES} == set(peers.EAGER)


def test_cases_name_known_peers():
    assert {peer for case in CASES for peer in case.peers} <= set(PEERS)
    assert set(INTERPRETED) == {"ptx-emulated", "triton"}


def test_the_diffusers_peer_is_the_same_model():
    """Same weights, same pictures: its time is that of the same work."""
    ours = build("tiny", dtype=torch.float64)
    theirs = diffusers_peers.denoiser(ours[0]), ours[1]
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    first, second = (FrameStream(*pair, steps=2, policy="torch") for pair in (ours, theirs))
    for _ in range(2):
        assert np.array_equal(first.push(frame), second.push(frame))
    assert first.push(frame).std() > 2


def test_the_image_to_image_peer_gives_pictures():
    ours = build("tiny")
    tiny = diffusers_peers.TinyAutoencoder(ours[1])
    output = FrameStream(ours[0], tiny, policy="torch").push(np.zeros((40, 48, 3), np.uint8))
    assert output.shape == (40, 48, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("group", worker.CASES)
def test_every_peer_of_a_quick_case_runs_on_the_gpu(group):
    options = Options(device="cuda", quick=True, peers=PEERS)
    for case, dtype in worker.cases(options, group):
        subject = prepare(case, dtype, options)
        wanted = tuple(name for name in PEERS if name != "torch-compile")
        functions = peers.peers(case, subject.args, wanted)
        for name, function in functions.items():
            out = function(*subject.args)
            if name != "copy":
                error = (
                    out.double() - subject.truth.double()
                ).norm() / subject.truth.double().norm()
                allowed = 0.08 if case.op in eight_bit.OPS else 2e-2  # truth has e4m3 inputs
                assert error < allowed, (case.op, case.name, name)


@pytest.mark.parametrize("way", ["applied", "folded"])
@pytest.mark.parametrize("name", composed.OPS)
def test_the_ways_with_sums_compute_the_same(name, way, monkeypatch):
    """Their kernels run on Hopper; here conv2d_fused takes torch's way."""
    monkeypatch.setitem(conv2d_fused.BACKENDS, "ptx", conv2d_fused.BACKENDS["torch"])
    monkeypatch.setattr(conv2d_fused, "check_call", lambda *args, **kwargs: None)  # of the dtype
    case = next(case for case in composed.SMALL if case.op == name)
    subject = prepare(case, "float32", OPTIONS)
    (kernel,) = (k for k in op_named(name).kernels if k.name.endswith(way))
    assert subject.judge(kernel.run(*subject.args)).passed


class TestModelRows:
    def test_a_clip_plays_to_and_fro(self):
        clip = np.arange(4)
        assert [*clips.played(clip, 0, 9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
        assert [*clips.played(clip, 3, 3)] == [3, 2, 1]
        assert [*clips.played(clip[:1], 0, 3)] == [0, 0, 0]

    def test_the_shipped_clip_is_read_at_the_size_asked_for(self):
        clip, name = clips.read_clip(Options(size=(64, 96), frames=12))
        assert clip.shape == (12, 64, 96, 3) and clip.dtype == np.uint8 and "12 frames" in name

    def test_without_a_video_reader_a_clip_is_drawn(self, monkeypatch):
        monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: None)
        clip, name = clips.read_clip(Options(size=(32, 48), frames=5))
        assert clip.shape == (5, 32, 48, 3) and name == "drawn pattern, 5 frames"
        assert (clip[0] != clip[1]).mean() > 0.5

    def test_a_clip_of_another_size_is_refused(self, tmp_path):
        np.save(tmp_path / "clip.npy", np.zeros((2, 8, 8, 3), np.uint8))
        with pytest.raises(ValueError, match="expected"):
            clips.read_clip(Options(clip=str(tmp_path / "clip.npy"), size=(64, 64)))

    def test_a_clip_that_cannot_be_read_is_one_sentence(self, tmp_path, monkeypatch):
        for name in ("clip.mp4", "clip.npy"):
            (tmp_path / name).write_text("no video, no array")
            with pytest.raises(ValueError, match=rf"{name}: (no video|expected an array)"):
                clips.read_clip(Options(clip=str(tmp_path / name)))
        monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="PyAV, which decodes videos, is not installed; pip"):
            clips.read_clip(Options(clip=str(clips.CLIP)))

    @pytest.mark.parametrize(
        "copies, only_the_frame",
        [
            ([("Memcpy HtoD", 12), ("Memcpy DtoH", 12)], True),
            ([("Memcpy HtoD", 12), ("Memcpy HtoD", 4), ("Memcpy DtoH", 12)], False),
            ([("Memcpy HtoD", 12), ("Memcpy DtoH", 13)], False),
            ([("Memcpy HtoD", 12)], False),
            ([], False),
        ],
    )
    def test_what_may_cross_the_bus(self, copies, only_the_frame):
        listed = [{"name": name, "bytes": size} for name, size in copies]
        assert bus._is_the_frame(listed, frame_bytes=12) == only_the_frame


@pytest.mark.parametrize(
    "case",
    [
        eight_bit.attention_case(1, 70, 64),
        eight_bit.linear_case(70, 128, 64),
        eight_bit.conv_case(32, 32, 9),
    ],
    ids=lambda case: case.op,
)
def test_eight_bits_in_the_emulator(case):
    subject = prepare(case, "bfloat16", OPTIONS)
    (kernel,) = op_named(case.op).kernels
    assert subject.judge(kernel.run(*subject.args)).passed
    half = peers.peers(case, subject.args, PEERS)["bf16"](*subject.args).double()
    assert (half - subject.truth).norm() < 0.08 * subject.truth.norm()
