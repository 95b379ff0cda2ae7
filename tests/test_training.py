"""Whole runs of a minute model: they end with a model, are killed, resume and borrow."""

import itertools
import math
import time

import pytest
import torch
from torch import nn
from training_driver import add_minute_model, losses, quick, start

from mirage_hello.model import checkpoint
from mirage_hello.model.presets import PRESETS
from mirage_hello.model.training import Options, TrainingError, train
from mirage_hello.model.training import state as states
from mirage_hello.model.training.config import changed
from mirage_hello.model.training.export import export
from mirage_hello.model.training.journal import read as read_metrics
from mirage_hello.model.training.optimise import Optimiser, learning_rate
from mirage_hello.model.training.place import Place


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(1.0, n, 10, n / 100) for n in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and rates[9] > 0.97
    assert rates[-1] < 0.06 and all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_optimiser_average_follows_its_formula():
    module = nn.Linear(2, 2)
    optimiser = Optimiser(module, quick(ema=0.9, warmup=1), 0.1)
    expected = module.weight.detach().clone()
    for n in range(5):
        optimiser.step(module(torch.ones(1, 2)).square().sum(), 0.0)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(optimiser.average[0], expected)
    raw = module.weight.detach().clone()
    with optimiser.averaged():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, raw)


def test_a_whole_run_ends_with_a_model(tmp_path, capsys):
    config = quick(sample_every=8, sample_frames=2, video_steps=8)
    assert train(config, tmp_path / "run", Options(device="cpu"))
    denoiser, autoencoder = checkpoint.load(tmp_path / "run" / "model.safetensors")
    assert denoiser.trained and autoencoder.trained
    stages = {r["stage"] for r in read_metrics(tmp_path / "run")}
    assert stages == {"autoencoder", "video", "distill"}
    assert all(math.isfinite(v) for v in losses(tmp_path / "run").values())
    assert (tmp_path / "run" / "samples" / "video-00000008.mp4").stat().st_size > 500
    assert "finished" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="holds a run already; go on with --resume"):
        train(config, tmp_path / "run", Options(device="cpu"))


def test_a_finished_autoencoder_is_borrowed(tmp_path):
    options = Options(device="cpu", quiet=True)
    train(quick(video_steps=0, distill_steps=0), tmp_path / "a", options)
    path = tmp_path / "a" / "model.safetensors"
    config = quick(autoencoder=str(path), video_steps=1, distill_steps=0)
    train(config, tmp_path / "b", options)
    assert {r["stage"] for r in read_metrics(tmp_path / "b")} == {"video"}
    a, b = (checkpoint.load(p / "model.safetensors")[1].state_dict()
            for p in (tmp_path / "a", tmp_path / "b"))  # fmt: skip
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(TrainingError, match="no file"):
        train(changed(config, {"autoencoder": "none.safetensors"}), tmp_path / "c", options)


def test_a_run_begins_with_the_weights_of_another(tmp_path):
    options = Options(device="cpu", quiet=True)
    config = quick(autoencoder_steps=2, video_steps=2, distill_steps=0)
    train(config, tmp_path / "a", options)
    path = tmp_path / "a" / "model.safetensors"
    begun = Place(changed(config, {"start": str(path), "seed": 7}), tmp_path / "b", options)
    saved = [module.state_dict() for module in checkpoint.load(path)[:2]]
    for weights, module in zip(saved, (begun.denoiser, begun.autoencoder), strict=True):
        assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())
    assert not begun.autoencoder.trained  # its stage is not skipped
    with pytest.raises(TrainingError, match=r"config: start='none.safetensors': .*no file"):
        train(changed(config, {"start": "none.safetensors"}), tmp_path / "c", options)


def test_latents_get_the_deviation_that_the_denoiser_expects(tmp_path):
    config = quick(autoencoder_steps=6, video_steps=0, distill_steps=0)
    train(config, tmp_path / "run", Options(device="cpu", quiet=True))
    _, autoencoder = checkpoint.load(tmp_path / "run" / "model.safetensors")
    from mirage_hello.model.training.pool import FramePool

    frames = FramePool(config, torch.device("cpu"), 0, 1)
    frames.fill()
    pixels = frames.sample(16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        deviation = autoencoder.encode(pixels).square().mean().sqrt()
    assert deviation == pytest.approx(0.5, rel=0.15)


def test_loss_falls(tmp_path):
    config = quick(
        autoencoder_steps=40, video_steps=30, distill_steps=0, batch=8, lr=3e-3, refresh_every=50
    )
    train(config, tmp_path / "run", Options(device="cpu", quiet=True))
    found = losses(tmp_path / "run")
    for stage, count in (("autoencoder", 40), ("video", 30)):
        values = [found[stage, n] for n in range(count)]
        assert sum(values[-10:]) / 10 < 0.9 * sum(values[:3]) / 3, stage


def test_a_killed_run_continues_its_loss_curve(tmp_path):
    """All three runs in processes of their own: the arithmetic depends on the number of threads,
    which another test may have changed in this one."""
    config, options = quick(video_steps=14, checkpoint_every=3), Options(device="cpu", quiet=True)
    assert start(config, tmp_path / "whole", options).finish()[0] == [0]
    whole = losses(tmp_path / "whole")
    killed = start(config, tmp_path / "killed", options)
    deadline = time.monotonic() + 90
    while ("video", 7) not in losses(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.processes[0].kill()  # SIGKILL: no handler, no farewell
    assert killed.finish()[0] == [-9]
    assert ("video", 7) in losses(tmp_path / "killed") and len(losses(tmp_path / "killed")) < 17
    options.resume = True
    assert start(config, tmp_path / "killed", options).finish()[0] == [0]
    assert losses(tmp_path / "killed") == whole


def test_training_on_real_clips_resumes_in_place(tmp_path):
    from test_video_data import encode

    (tmp_path / "clips").mkdir()
    encode(tmp_path / "clips" / "a.mp4")
    config = quick(
        video=str(tmp_path / "clips"), video_steps=8, refresh_every=2, checkpoint_every=3
    )
    train(config, tmp_path / "whole", Options(device="cpu", quiet=True))
    for path in states.checkpoints(tmp_path / "whole" / "checkpoints"):
        path.unlink()
    config_short = changed(config, {"video_steps": 6, "distill_steps": 0})
    train(config_short, tmp_path / "part", Options(device="cpu", quiet=True))
    for path in states.checkpoints(tmp_path / "part" / "checkpoints"):
        if path.name.startswith("2"):
            path.unlink()
    train(config, tmp_path / "part", Options(device="cpu", quiet=True, resume=True))
    whole, part = losses(tmp_path / "whole"), losses(tmp_path / "part")
    same = [k for k in whole if k[0] == "autoencoder"]
    assert all(whole[k] == part[k] for k in same) and whole.keys() == part.keys()


def test_compact_state_is_small_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "PART_BYTES", 100_000)
    config = quick(video_steps=12, checkpoint_every=4, distill_steps=3)
    options = Options(device="cpu", quiet=True, compact=tmp_path / "small", minutes=1e-9)
    assert not train(changed(config, {"autoencoder_steps": 2}), tmp_path / "a", options)
    parts = sorted((tmp_path / "small").glob("compact-*.safetensors"))
    assert len(parts) > 1 and max(p.stat().st_size for p in parts) < 140_000
    options = Options(device="cpu", quiet=True, resume_from=tmp_path / "small")
    assert train(config, tmp_path / "b", options)
    rows = read_metrics(tmp_path / "b")
    assert rows[0]["stage"] == "video" and rows[0]["step"] == 10
    export(tmp_path / "small", config, tmp_path / "m.safetensors")
    denoiser, _ = checkpoint.load(tmp_path / "m.safetensors")
    assert denoiser.trained
