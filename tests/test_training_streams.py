"""What live streams are held to: the true details while they can know them, then the means."""

from __future__ import annotations

import pytest
import torch
from training_driver import add_minute_model, quick

from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.training.config import SMOKE, TrainingError, changed
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.pool import ClipPool
from mirage_hello.model.training.streams import LiveStreams
from mirage_hello.model.training.video_stage import Batch, VideoStage


def test_streams_are_held_to_details_while_they_are_young():
    config = changed(SMOKE, {"size": 16, "clip_frames": 8})
    pool = ClipPool(config, lambda f: f[:, :1, ::8, ::8].repeat(1, 4, 1, 1), 4,
                    torch.device("cpu"), 0, 1)  # fmt: skip
    pool.targets.normal_()
    streams = LiveStreams(64, pool, 4)
    streams.begin(torch.ones(64, dtype=torch.bool), torch.Generator().manual_seed(1))
    assert 0 < streams.blank.sum() < 64
    assert (streams.held_to_details(4) == 1).all()  # an empty memory invents nothing yet
    state = streams.state_dict()
    for age in range(1, 6):
        streams.age.fill_(age)
        kept = streams.held_to_details(4)
        assert (kept[streams.blank] == 0).all()
        assert torch.allclose(kept[~streams.blank], torch.tensor(max(0.0, 1 - age / 4)))
    streams.blank.zero_()
    streams.load_state_dict(state)
    assert torch.equal(streams.blank, state["blank"])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_a_stream_goes_on_from_its_noise_and_so_does_its_loss(correlation, monkeypatch):
    add_minute_model()
    config = quick(batch=128, live_share=0.75, noise_correlation=correlation)
    stage = VideoStage(config, *build("minute"), Workers(config, "cpu"))
    PRESETS.pop("minute")
    stage.start()
    stage.longest.fill_(9)
    before = stage.streams.noise.clone()
    assert before.abs().max() == 0  # nothing has begun
    batch = stage.next_batch()
    last = stage.streams.noise.clone()
    assert last.std() == pytest.approx(1, abs=0.05)
    noise = stage.noise_of(batch.target)
    assert noise.std() == pytest.approx(1, abs=0.05)
    true, own = noise[:32], noise[32:]
    assert (own * last).mean() == pytest.approx(correlation, abs=0.05)
    assert true.abs().max() > 0 and abs((true * last[:32]).mean()) < 0.1
    stage.roll(1)
    assert (stage.streams.noise * last).mean() == pytest.approx(correlation, abs=0.05)
    assert torch.equal(stage.streams.noise, last) == (correlation == 1)
    state = stage.streams.state_dict()
    stage.streams.noise.zero_()
    stage.streams.load_state_dict(state)
    assert torch.equal(stage.streams.noise, state["noise"]) and state["noise"].std() > 0.9
    del state["noise"]
    with pytest.raises(TrainingError, match="streams have no noise: another version wrote it"):
        stage.streams.load_state_dict(state)


def test_without_details_only_the_means_of_quarters_count():
    torch.manual_seed(0)
    e = torch.randn(3, 4, 8, 8)
    details = torch.tensor([0.0, 0.5, 1.0])
    empty = torch.empty(0)
    batch = Batch(empty, empty, empty, torch.zeros_like(e), details)
    full = e.square().mean((1, 2, 3))
    means = e.view(3, 4, 2, 4, 2, 4).mean((3, 5)).square().mean((1, 2, 3))
    found = VideoStage.error(None, e, batch)
    assert torch.allclose(found, details * full + (1 - details) * means)
