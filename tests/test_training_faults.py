"""Runs that break: each is one sentence, and the last good checkpoint stays whole."""

import errno
import math

import pytest
import torch
from training_driver import QUICK, Fault, add_minute_model, quick, start

from mirage_hello.model.presets import PRESETS
from mirage_hello.model.training import Options, TrainingError, train
from mirage_hello.model.training import state as states
from mirage_hello.model.training.journal import Journal
from mirage_hello.model.training.video_stage import VideoStage


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


def test_nan_stops_with_the_batch_and_the_last_checkpoint(tmp_path, monkeypatch):
    forward = VideoStage.noised

    def poisoned(self, target):
        x, sigma = forward(self, target)
        return (x * math.nan if self.optimiser.count == 6 else x), sigma

    monkeypatch.setattr(VideoStage, "noised", poisoned)
    config = quick(checkpoint_every=2)
    with pytest.raises(
        TrainingError, match="the loss is nan at video step 5; its batch is in"
    ) as e:
        train(config, tmp_path, Options(device="cpu", quiet=True))
    assert "1-video-00000004.pt; go on from there with --resume" in str(e.value)
    batch = torch.load(tmp_path / "nan-video-00000005-rank0.pt", weights_only=True)
    assert batch["x"].isnan().all() and batch["target"].isfinite().all()
    monkeypatch.setattr(VideoStage, "noised", forward)
    assert train(config, tmp_path, Options(device="cpu", quiet=True, resume=True))


def test_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path):
    options = Options(device="cpu", quiet=True)
    train(quick(video_steps=3, distill_steps=0), tmp_path, options)
    before = states.checkpoints(tmp_path / "checkpoints")
    options.resume = True
    config = quick(video_steps=3, checkpoint_every=1, distill_steps=2)
    codes, texts = start(config, tmp_path, options, fault=Fault(file_limit=100_000)).finish()
    assert codes == [2] and "the disk is full" in texts[0], texts
    assert f"the last good checkpoint is {before[-1]}; free space" in texts[0]
    assert states.checkpoints(tmp_path / "checkpoints") == before
    assert not list((tmp_path / "checkpoints").glob("*.part"))
    states.load(tmp_path / "checkpoints")


def test_a_disk_that_is_full_between_checkpoints_is_the_same_sentence(tmp_path, monkeypatch):
    write = Journal.write

    def full(self, stage, step, values):
        if (stage, step) == ("video", 4):
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(self, stage, step, values)

    monkeypatch.setattr(Journal, "write", full)
    with pytest.raises(TrainingError, match=r"the disk is full .*metrics.*00000003.pt; free space"):
        train(quick(checkpoint_every=3), tmp_path, Options(device="cpu", quiet=True))
    monkeypatch.setattr(Journal, "write", write)
    assert train(
        quick(checkpoint_every=3), tmp_path, Options(device="cpu", quiet=True, resume=True)
    )


def test_checkpoint_of_another_shape(tmp_path):
    train(quick(video_steps=2, distill_steps=0), tmp_path, Options(device="cpu", quiet=True))
    other = PRESETS["minute"]
    from dataclasses import replace

    PRESETS["minute"] = replace(other, unet=replace(other.unet, channels=(24, 16)))
    with pytest.raises(
        TrainingError, match=r"has shape \[.*\], this model's has \[.*\]; resume with"
    ):
        train(quick(), tmp_path, Options(device="cpu", quiet=True, resume=True))
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(quick(), tmp_path / "empty", Options(device="cpu", quiet=True, resume=True))


def test_a_checkpoint_of_another_format_is_named(tmp_path):
    """A format says which tensors a checkpoint has: those without `blank` cannot go on exactly."""
    train(quick(video_steps=2, distill_steps=0), tmp_path, Options(device="cpu", quiet=True))
    for path in states.checkpoints(tmp_path / "checkpoints"):
        torch.save(torch.load(path) | {"format": "mirage-training-1"}, path)
    with pytest.raises(TrainingError, match=r"has format 'mirage-training-1', not .*-3'"):
        states.load(tmp_path / "checkpoints")


def test_a_cut_checkpoint_falls_back_to_the_one_before(tmp_path):
    config = quick(video_steps=6, distill_steps=0, checkpoint_every=2, keep=3)
    train(config, tmp_path, Options(device="cpu", quiet=True))
    newest = states.checkpoints(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    path, state, problems = states.load(tmp_path / "checkpoints")
    assert path != newest and state["step"] == 6 and "cannot be read" in problems[0]


def test_empty_video_folder_is_one_line(tmp_path, capsys):
    from mirage_hello.tools import cli

    (tmp_path / "clips").mkdir()
    words = ["train", "--preset", "smoke", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*words, "--video", str(tmp_path / "clips"), "--set", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "no readable video" in error and error.count("\n") == 1
