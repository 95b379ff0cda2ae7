"""Training: parts against their definitions, whole runs of a minute model, broken runs."""

import itertools
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from training_driver import Fault, add_minute_model, free_port, replica, start

from mirage_hello.model import checkpoint
from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.rollout import Rollout, quantised
from mirage_hello.model.stream import FrameStream
from mirage_hello.model.training import Options, TrainingError, preset, train
from mirage_hello.model.training import state as states
from mirage_hello.model.training.config import TrainConfig, changed, read
from mirage_hello.model.training.export import export
from mirage_hello.model.training.history import (
    ErrorBank,
    augmented,
    drawn_tint,
    drifted,
    tinted,
    true_memory,
)
from mirage_hello.model.training.journal import read as read_metrics
from mirage_hello.model.training.optimise import Optimiser, learning_rate
from mirage_hello.model.training.place import Place
from mirage_hello.model.training.pool import ClipPool, plain_of, plan
from mirage_hello.model.training.streams import LiveStreams
from mirage_hello.model.training.video_stage import VideoStage

QUICK = ("model=minute", "size=16", "clip_frames=4", "autoencoder_steps=2", "distill_steps=1")


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


def quick(**values) -> TrainConfig:
    pairs = dict(item.split("=") for item in QUICK)
    return changed(preset("smoke"), {**pairs, **values})


def losses(out) -> dict:
    return {(r["stage"], r["step"]): r["loss"] for r in read_metrics(Path(out))}


# Configuration


def test_unknown_key_names_the_nearest():
    with pytest.raises(TrainingError, match="unknown key 'histroy_noise'; did you mean 'history_n"):
        changed(preset("smoke"), {"histroy_noise": 0.1})
    with pytest.raises(TrainingError, match="did you mean 'shipped'"):
        preset("shiped")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch", "many", "batch must be like"),
        ("batch", "2.5", "batch must be like"),
        ("batch", 0, "batch must be at least 1"),
        ("autoencoder_batch", 1, "autoencoder_batch must be at least 2"),
        ("size", 100, "multiple of 8"),
        ("compile", "yes", "compile must be like"),
        ("precision", "fp8", "precision must be bf16 or fp32"),
        ("pool_clips", 5, "multiple of refresh_clips"),
    ],
)
def test_wrong_values_are_refused(key, value, message):
    with pytest.raises(TrainingError, match=message):
        changed(preset("smoke"), {key: value})


def test_values_are_read_from_text_and_toml(tmp_path):
    config = changed(
        preset("smoke"), {"lr": "1e-3", "compile": "true", "rollouts": "1,2", "seed": "7"}
    )
    assert (config.lr, config.compile, config.rollouts, config.seed) == (1e-3, True, (1, 2), 7)
    (tmp_path / "run.toml").write_text('preset = "smoke"\nbatch = 6\nrollouts = [2, 5]\n')
    assert read(tmp_path / "run.toml").rollouts == (2, 5)
    (tmp_path / "bad.toml").write_text("batch = = 6")
    with pytest.raises(TrainingError, match="not TOML"):
        read(tmp_path / "bad.toml")
    with pytest.raises(TrainingError, match="no file"):
        read(tmp_path / "none.toml")


# Parts


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


@pytest.fixture
def pool():
    config = quick(pool_clips=2, refresh_clips=2, clip_frames=8)
    made = ClipPool(config, lambda x: x[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4], 4,
                    torch.device("cpu"), 0, 1)  # fmt: skip
    made.fill()
    return made


def test_pools_are_the_same_for_the_same_numbers(pool):
    config = pool.config
    again = ClipPool(config, pool.encode, 4, torch.device("cpu"), 0, 1)
    again.load_state_dict(pool.state_dict())
    again.fill()
    assert torch.equal(again.targets, pool.targets) and torch.equal(again.sinks, pool.sinks)
    other = plan(config, 1, 0, 2)  # another rank sees other clips
    assert not torch.equal(other.seeds, plan(config, 0, 0, 2).seeds)
    assert plan(config, 0, 0, 64).seeds.max() < 1 << 30  # never a held-out one
    replaced = pool.advance()
    assert replaced.tolist() == [0, 1] and not torch.equal(again.targets, pool.targets)


def test_a_share_of_the_clips_is_rendered_with_one_ray_a_pixel():
    rays = [plan(quick(supersample=3, rough_share=0.5), 0, n, 2).supersample for n in range(60)]
    assert set(rays) == {1, 3} and 15 < rays.count(1) < 45
    assert plan(quick(supersample=3), 0, 0, 2).supersample == 3


def test_true_memory_is_what_the_ring_buffer_would_hold(pool):
    from mirage_hello.model.memory import ContextMemory

    for time_ in (0, 2, 6):
        memory = ContextMemory(1, 4, *pool.targets.shape[3:], history=4)
        for t in range(time_):
            memory.push(pool.targets[:1, t])
        expected = torch.cat((memory.history, memory.sink), 1)
        at = torch.tensor([time_])
        got = true_memory(pool, torch.tensor([0]), at, 4, torch.tensor([False]))
        assert torch.equal(got, expected)
    far = true_memory(pool, torch.tensor([1]), torch.tensor([6]), 4, torch.tensor([True]))
    assert torch.equal(far[0, -4:], pool.sinks[1])


def test_augmentation_rates_and_levels():
    config = quick(history_noise=0.3, clean_share=0.2, corruption=0.5)
    generator = torch.Generator().manual_seed(0)
    memory = torch.ones(2000, 20, 2, 2)
    memory[:500] = 0  # an empty memory stays empty
    bank = ErrorBank(8, torch.zeros(1, 4, 2, 2))
    own = torch.zeros(2000, dtype=torch.bool)
    noisy, level = augmented(memory, own, bank, config, generator)
    assert ((level == 0).float().mean() - 0.2).abs() < 0.04 and level.max() <= 0.3
    exact = noisy[level == 0]
    assert ((exact == 0).all((1, 2, 3)).float().mean() - 0.25).abs() < 0.07
    assert ((exact == 1).all((1, 2, 3)).float().mean() - 0.75 * 0.5).abs() < 0.08
    spread = (noisy - 1).flatten(1).std(1)
    kept = (level > 0.1) & ((noisy - 1).mean((1, 2, 3)).abs() < 0.05)
    assert (spread[kept] / level[kept]).mean() == pytest.approx(1.0, abs=0.1)


def test_a_tint_changes_all_frames_of_a_memory_alike():
    generator = torch.Generator().manual_seed(0)
    where = torch.arange(6) < 4
    tint = drawn_tint(where, 4, generator)
    frame = torch.randn(6, 4, 3, 3)
    memory = torch.cat((frame, torch.zeros_like(frame), frame), 1)
    first, empty, last = tinted(memory, tint).chunk(3, 1)
    assert torch.equal(first, last) and torch.equal(first[4:], frame[4:]) and (empty == 0).all()
    change = (first - frame)[:4].square().mean() / frame[:4].square().mean()
    assert 0.05 < change < 0.5
    assert torch.equal(tinted(frame, tint.only(torch.zeros(6, dtype=torch.bool))), frame)


@pytest.mark.parametrize("history", [True, False])
def test_a_forgotten_memory_has_true_colours_and_a_kept_one_its_own(history):
    from mirage_hello.model.training.parallel import Workers

    config = quick(
        batch=64, live_share=0.5, tint=1.0, history=history, history_dropout=0.5, corruption=0.0,
        error_bank=0.0, history_noise=0.0,
    )  # fmt: skip
    stage = VideoStage(config, *build("minute"), Workers(config, "cpu"))
    stage.start()
    stage.pool.targets[:] = stage.pool.targets[:, :1].clone()  # nothing moves ...
    stage.pool.sinks[:] = stage.pool.targets[:, 0]
    stage.longest.fill_(9)
    batch = stage.next_batch()
    channels = stage.channels
    memory = batch.inputs[:, channels:]
    kept = (memory != 0).flatten(1).any(1)
    # ... so the newest frame in a memory is the one to be drawn, in the same colours
    torch.testing.assert_close(batch.target[kept], memory[kept, :channels])
    plain = (batch.target[:, None] == stage.pool.targets[:, 0]).flatten(2).all(2).any(1)
    assert plain[~kept].all() and not plain[kept].any()
    assert (10 < kept.sum() < 54) == history and (history or not kept.any())
    assert stage.streams is not None
    held, _, _ = stage.streams.read()
    errors = stage.streams.push(held[:, :channels].clone())
    full = (held != 0).flatten(1).any(1)
    torch.testing.assert_close(errors[full], torch.zeros_like(errors[full]))


def test_drift_is_the_same_for_all_frames_of_a_memory_and_small():
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(64, 4, 8, 8) * 0.5
    out = drifted(frame.repeat(1, 5, 1, 1), 4, generator)
    parts = out.chunk(5, 1)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0])
    change = (parts[0] - frame).square().mean().sqrt()
    assert 0.05 < change < 0.4


def test_error_bank_is_a_ring():
    bank = ErrorBank(4, torch.zeros(1, 1, 1, 1))
    for value in range(6):
        bank.add(torch.full((1, 1, 1, 1), float(value)))
    drawn = bank.draw(200, torch.Generator().manual_seed(0)).flatten().unique().tolist()
    assert drawn == [2, 3, 4, 5]


def test_live_streams_end_and_begin_again(pool):
    generator = torch.Generator().manual_seed(0)
    streams = LiveStreams(3, pool, 4)
    streams.retire(4, generator)
    for _ in range(12):
        memory, _, time_ = streams.read()
        assert memory.shape == (3, 20, 2, 2) and (time_ < 8).all() and (streams.age < 4).all()
        errors = streams.push(torch.zeros(3, 4, 2, 2))
        assert torch.isfinite(errors).all()
        streams.retire(4, generator)
    streams.lose(torch.tensor([0, 1]))
    streams.retire(100, generator)
    assert (streams.age == 0).all()  # the pool replaced every clip


def test_plain_view_of_real_frames_is_plain():
    frames = torch.rand(1, 3, 32, 32) * 2 - 1
    plain = plain_of(frames)
    assert plain.shape == frames.shape and len(plain.unique()) <= 6


def test_sampler_start_holds_nothing_of_the_target():
    denoiser, autoencoder = build("minute")
    from mirage_hello.model.training.parallel import Workers

    config = quick(start_share=1.0, live_share=0.0)
    stage = VideoStage(config, denoiser, autoencoder, Workers(config, "cpu"))
    target = torch.full((64, 4, 2, 2), 100.0)
    x, sigma = stage.noised(target)
    assert (sigma == denoiser.config.sigma_max).all() and x.mean().abs() < 2


@pytest.mark.parametrize("steps", [1, 2])
def test_rollout_is_frame_stream_for_many(steps, monkeypatch, seed):
    torch.manual_seed(seed)
    denoiser, autoencoder = build("minute", seed % 1000)
    # The two draw their noise in another order: without any, both are deterministic.
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *a, **kw: self.zero_())
    monkeypatch.setattr(Rollout, "normal", lambda self, *shape: torch.zeros(shape))
    streams = [FrameStream(denoiser, autoencoder, steps=steps, history_noise=0.1) for _ in "ab"]
    streams[1].set_style(3)
    rollout = Rollout(denoiser, autoencoder, [0, 3], 16, 24, steps=steps, history_noise=0.1)
    for _ in range(3):
        frames = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
        expected = torch.stack([s.push(f) for s, f in zip(streams, frames, strict=True)])
        views = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        got = ((quantised(rollout.push(views)) + 1) * 127.5).round().permute(0, 2, 3, 1)
        assert (got - expected.float()).abs().max() <= 1  # one rounding to a byte
    assert rollout.memory.count.tolist() == [3, 3]


# Whole runs


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


def test_a_checkpoint_of_another_format_is_named(tmp_path):
    """A format says which tensors a checkpoint has: those without `blank` cannot go on exactly."""
    train(quick(video_steps=2, distill_steps=0), tmp_path, Options(device="cpu", quiet=True))
    for path in states.checkpoints(tmp_path / "checkpoints"):
        torch.save(torch.load(path) | {"format": "mirage-training-1"}, path)
    with pytest.raises(TrainingError, match=r"has format 'mirage-training-1', not .*-3'"):
        states.load(tmp_path / "checkpoints")


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


@pytest.mark.parametrize(
    ("parallel", "precision"), [("ddp", "fp32"), ("ddp", "bf16"), ("fsdp", "fp32")]
)
def test_two_processes_train_together(tmp_path, parallel, precision):
    config = quick(
        video_steps=4, checkpoint_every=3, parallel=parallel, precision=precision, keep=9
    )
    options = Options(device="cpu", quiet=True)
    codes, texts = start(config, tmp_path, options, ranks=2).finish()
    assert codes == [0, 0], texts
    curve = losses(tmp_path)
    assert len(curve) == 2 + 4 + 1 and all(math.isfinite(v) for v in curve.values())
    denoiser, _ = checkpoint.load(tmp_path / "model.safetensors")
    assert all(torch.isfinite(p).all() for p in denoiser.parameters())
    for path in states.checkpoints(tmp_path / "checkpoints"):
        if path.name != "1-video-00000003.pt":
            path.unlink()
    options.resume = True
    with pytest.raises(TrainingError, match=r"written by 2 processes .* resume with as many"):
        train(config, tmp_path, options)


def test_replicas_in_half_precision_step_as_one_with_the_mean_gradient(tmp_path):
    config = quick(precision="bf16", warmup=1, ema=0.5)
    context = multiprocessing.get_context("forkserver")
    for ranks in (1, 2):
        port, processes = free_port(), []
        for rank in range(ranks):
            arguments = (rank, ranks, port, tmp_path / f"{rank}-of-{ranks}.pt", config)
            processes.append(context.Process(target=replica, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    alone, first, second = (
        torch.load(tmp_path / f"{n}.pt") for n in ("0-of-1", "0-of-2", "1-of-2")
    )
    for one, two, three in zip(alone, first, second, strict=True):
        assert torch.equal(two, three)
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-3)


def test_a_lost_rank_is_one_sentence_and_the_run_goes_on_exactly(tmp_path):
    config = quick(
        autoencoder_steps=0, distill_steps=0, video_steps=6, checkpoint_every=3, parallel="fsdp",
        rank_timeout_s=6,
    )  # fmt: skip
    options = Options(device="cpu", quiet=True)
    codes, texts = start(config, tmp_path / "whole", options, ranks=2).finish()
    assert codes == [0, 0], texts
    lost = start(config, tmp_path / "lost", options, ranks=2, fault=Fault(die_at=4))
    codes, texts = lost.finish()
    assert codes == [2, 9], texts
    assert "another rank was lost at step 4" in texts[0]
    assert "1-video-00000003.pt; start all ranks again with --resume" in texts[0]
    options.resume = True
    codes, texts = start(config, tmp_path / "lost", options, ranks=2).finish()
    assert codes == [0, 0], texts
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "lost")
    assert again.keys() == whole.keys()
    for key, value in whole.items():
        assert again[key] == pytest.approx(value, rel=1e-4), key


# Broken runs


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


def test_tensorboard_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="tensorboard package is not installed"):
        train(quick(), tmp_path, Options(device="cpu", tensorboard=True))


def test_list_prints_the_settings(capsys):
    from mirage_hello.tools import cli

    assert cli.main(["train", "--preset", "smoke", "--set", "batch=3", "--list"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 3
    assert cli.main(["train", "--preset", "smoke", "--set", "batchh=3", "--list"]) == 2
    assert "did you mean 'batch'" in capsys.readouterr().err
