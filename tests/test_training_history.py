"""What a step of training is made of: the pool, memories and their faults, live streams, noise."""

import pytest
import torch
from training_driver import add_minute_model, quick

from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.rollout import Rollout, quantised
from mirage_hello.model.stream import FrameStream
from mirage_hello.model.training.history import ErrorBank, augmented, drifted, true_memory
from mirage_hello.model.training.pool import ClipPool, plain_of, plan
from mirage_hello.model.training.streams import LiveStreams
from mirage_hello.model.training.video_stage import VideoStage


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


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


@pytest.mark.parametrize("history", [True, False])
def test_a_kept_memory_and_its_target_are_of_one_clip(history):
    from mirage_hello.model.training.parallel import Workers

    config = quick(
        batch=64, live_share=0.5, history=history, history_dropout=0.5, corruption=0.0,
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
    # ... so the newest frame in a memory is the one to be drawn
    torch.testing.assert_close(batch.target[kept], memory[kept, :channels])
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
