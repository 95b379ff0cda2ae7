"""The evaluation, on oracles whose result is known in advance."""

import itertools
import math

import pytest
import torch
from training_driver import add_minute_model

from mirage_hello.model import evaluation as ev
from mirage_hello.model import memory_probe, persistence
from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.rollout import Rollout


class Oracle:
    """A rollout that knows the truth: its output is `answer(truth, number of the frame)`."""

    def __init__(self, evaluation, answer):
        self.evaluation, self.answer, self.number = evaluation, answer, 0

    def remember_true(self, frames):
        pass

    def push(self, views):
        truth = self.evaluation.last
        self.number += 1
        return self.answer(truth, self.number)

    push_unseen = push


def unremembered(truth, n):
    """As a sound model draws without a memory: soft, and in somewhat wrong colours."""
    soft = torch.nn.functional.avg_pool2d(truth, 3, 1, 1, count_include_pad=False)
    return soft + torch.tensor([0.2, -0.15, 0.1]).view(3, 1, 1)


def oracle_evaluation(monkeypatch, answer, **values):
    """An evaluation whose candidate answers from the truth of the frame that it is shown."""
    settings = {"frames": 24, "seeds": 2, "styles": ("clay",), "size": 24, "supersample": 1}
    config = ev.EvalConfig(**{**settings, "every": 4, "burn_in": 4, **values})
    without = ev.Candidate("without", None, None, remember=False)
    evaluation = ev.Evaluation(config, torch.device("cpu"), without)
    shot = ev.Evaluation.shot

    def remembered(self, worlds, frame, truth, clips=None):
        found = shot(self, worlds, frame, True, clips)
        if clips is None:
            self.last = found.target
        return found

    monkeypatch.setattr(ev.Evaluation, "shot", remembered)

    def rollout(self, candidate, seed=0):
        return Oracle(evaluation, answer if candidate.remember else unremembered)

    monkeypatch.setattr(ev.Evaluation, "rollout", rollout)
    return evaluation


CANDIDATE = ev.Candidate("oracle", None, None)


def test_a_perfect_model_is_measured_as_perfect(monkeypatch):
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: truth)
    (curves,) = evaluation.long_run([CANDIDATE])
    found = ev.summary(evaluation.config, curves, evaluation.names)
    assert curves.frames == [*range(4, 24, 4), 23]
    assert found["psnr_db"]["mean"] > 50 and found["ssim"]["mean"] > 0.999  # bytes are rounded
    assert abs(found["psnr_slope_db_per_1000"]["mean"]) < 5
    assert all(v["mean"] < 0.03 for v in found["contrast"].values())
    assert found["warp_error"]["output"] == pytest.approx(found["warp_error"]["truth"], rel=0.1)
    assert not found["collapsed"]


def test_a_drifting_model_is_caught(monkeypatch):
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: truth + 0.02 * n)
    (curves,) = evaluation.long_run([CANDIDATE])
    found = ev.summary(evaluation.config, curves, evaluation.names)
    assert found["psnr_slope_db_per_1000"]["high"] < -100
    assert found["contrast"]["brightness"]["mean"] > 0.1
    assert len(found["collapsed"]) == 2


COLLAPSES = {
    "saturation": lambda truth, n: truth.mean(1, keepdim=True).expand_as(truth),
    "contrast": lambda truth, n: truth * 0.2 + truth.mean((2, 3), keepdim=True) * 0.8,
    "dB, without a memory": lambda truth, n: -truth,
    "edges": lambda truth, n: truth.flip(3),  # all statistics are right, and the scene is gone
}


@pytest.mark.parametrize("what", COLLAPSES)
def test_a_model_that_was_lost_before_the_burn_in_is_caught(monkeypatch, what):
    """From the first frame on: nothing falls between the ends."""
    evaluation = oracle_evaluation(monkeypatch, COLLAPSES[what])
    (curves,) = evaluation.long_run([CANDIDATE])
    found = ev.summary(evaluation.config, curves, evaluation.names)
    assert found["ends_db"]["early"] - found["ends_db"]["late"] < 3
    assert len(found["collapsed"]) == found["streams"] == 2
    assert found["collapsed"][0].startswith("clay seed 0: ") and what in found["collapsed"][0]


def test_to_forget_is_no_collapse(monkeypatch):
    """From nearly the truth to what is drawn without a memory: 20 dB, and yet it follows."""
    evaluation = oracle_evaluation(
        monkeypatch, lambda truth, n: truth if n < 12 else unremembered(truth, n)
    )
    (curves,) = evaluation.long_run([CANDIDATE])
    found = ev.summary(evaluation.config, curves, evaluation.names)
    assert found["ends_db"]["early"] > found["ends_db"]["late"] + 15 and not found["collapsed"]
    assert found["ends_db"]["late"] == pytest.approx(found["ends_db"]["without"])


def test_the_burn_in_is_measured_often_and_the_last_frame_of_each_end():
    evaluation = ev.Evaluation(
        ev.EvalConfig(frames=300, every=50, burn_in=20, seeds=1, styles=("clay",), size=16),
        torch.device("cpu"),
    )
    ends = {300, 120}
    shown = [n for n in range(300) if evaluation.measured(n, ends)]
    assert shown == [0, 4, 8, 12, 16, 50, 100, 119, 150, 200, 250, 299]


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_streams_of_a_rollout_hold_their_noise(correlation):
    add_minute_model()
    networks = build("minute")
    PRESETS.pop("minute")
    rollout = Rollout(*networks, [0, 1], 128, 128, noise_correlation=correlation)
    view, noises = torch.zeros(2, 3, 128, 128), []
    for _ in range(3):
        rollout.push_unseen(view)
        noises.append(rollout.noise.clone())
    for a, b in itertools.pairwise(noises):
        assert b.std() == pytest.approx(1, abs=0.1)
        assert (a * b).mean() == pytest.approx(correlation, abs=0.12)


def test_frames_that_nobody_sees_move_the_memory_as_others_do():
    add_minute_model()
    networks = build("minute")
    PRESETS.pop("minute")
    seen, unseen = (Rollout(*networks, [0, 1], 16, 16, steps=2, seed=3) for _ in "ab")
    for number in range(4):
        view = torch.rand(2, 3, 16, 16) * 2 - 1
        picture = seen.push(view)
        if number < 3:
            assert unseen.push_unseen(view) is None
    assert torch.equal(unseen.push(view), picture)
    assert torch.equal(unseen.memory.history, seen.memory.history)


def test_a_flickering_model_is_caught(monkeypatch):
    steady = oracle_evaluation(monkeypatch, lambda truth, n: truth)
    a = ev.summary(steady.config, steady.long_run([CANDIDATE])[0], steady.names)
    flicker = oracle_evaluation(monkeypatch, lambda truth, n: truth + 0.2 * (-1) ** n)
    b = ev.summary(flicker.config, flicker.long_run([CANDIDATE])[0], flicker.names)
    assert b["warp_error"]["output"] > 2 * a["warp_error"]["output"]


def test_persistence_is_one_for_memory_and_less_for_none(monkeypatch):
    monkeypatch.setattr(persistence, "AWAY", 6)
    monkeypatch.setattr(persistence, "EARLY", 2)
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: truth)
    (found,) = persistence.persistence(evaluation, [CANDIDATE])
    for values in found.values():
        assert values == pytest.approx([1.0, 1.0], abs=0.02)
    forget = oracle_evaluation(monkeypatch, lambda t, n: t if n < 8 else -t)
    assert max(persistence.persistence(forget, [CANDIDATE])[0]["persistence"]) < 0.3


def test_a_steady_guess_is_persistent_and_recalls_nothing(monkeypatch):
    monkeypatch.setattr(persistence, "AWAY", 6)
    monkeypatch.setattr(persistence, "EARLY", 2)
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: torch.zeros_like(truth), seeds=4)
    (found,) = persistence.persistence(evaluation, [CANDIDATE])
    assert found["persistence"] == pytest.approx([1.0] * 4, abs=0.01)
    assert abs(sum(found["recall"])) / 4 < 0.5


def test_cut_recovery_of_a_slow_model(monkeypatch):
    state = {"since": 100}

    def answer(truth, n):
        state["since"] = 0 if evaluation.cut_now else state["since"] + 1
        return truth + (0.5 if state["since"] < 5 else 0.1)

    evaluation = oracle_evaluation(
        monkeypatch, answer, seeds=1, cut_frames=24, cut_run=60, burn_in=0
    )
    evaluation.cut_now = False
    shot = ev.Evaluation.shot

    def watched(self, worlds, frame, truth, clips=None):
        found = shot(self, worlds, frame, truth, clips)
        self.cut_now = bool(found.cut.any()) and frame > 0
        return found

    monkeypatch.setattr(ev.Evaluation, "shot", watched)
    (recoveries,) = evaluation.cut_run([CANDIDATE])
    assert recoveries and all(4 <= r <= 6 for r in recoveries)


def test_memory_of_a_copier_a_forgetter_and_one_that_fades(monkeypatch):
    """Oracles: what each rollout answers from the truth and from what its memory holds."""
    monkeypatch.setattr(memory_probe, "FRAMES", 5)
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: truth)

    class Fading:
        """Draws the truth with an error that grows by every frame of its own in the memory."""

        def __init__(self, candidate):
            self.remember, self.error = candidate.remember, 0.0

        def remember_true(self, frames):
            self.error = 0.0

        correct = remember_true

        def push(self, views):
            self.error = self.error + 0.02 if self.remember else 0.2
            return evaluation.truth_now + self.error

    shot = evaluation.shot

    def watched(*arguments):
        found = shot(*arguments)
        found.target.mul_(0.5)  # room for errors without clipping
        evaluation.truth_now = found.target
        return found

    monkeypatch.setattr(evaluation, "shot", watched)
    monkeypatch.setattr(evaluation, "rollout", lambda candidate, seed=0: Fading(candidate))
    (found,) = memory_probe.memory_db(evaluation, [CANDIDATE])
    expected = {"true": 0.02, "own": 0.1, "none": 0.2}
    for name, error in expected.items():
        assert found[name] == pytest.approx(20 * math.log10(2 / error), abs=1.0)


def test_a_corrected_memory_holds_the_truth():
    add_minute_model()
    denoiser, autoencoder = build("minute")
    rollout = Rollout(denoiser, autoencoder, [0], 16, 16, steps=1)
    truth = torch.rand(1, 3, 16, 16) * 2 - 1
    rollout.remember_true(truth)
    rollout.push(-truth)
    sink = rollout.memory.sink.clone()
    rollout.correct(truth)
    newest, before = rollout.memory.history[:, :4], rollout.memory.history[:, 4:8]
    assert torch.equal(newest, before) and torch.equal(rollout.memory.sink, sink)
    PRESETS.pop("minute")


def test_unknown_style_is_named():
    with pytest.raises(ValueError, match="unknown style 'oil'; known: neon_city"):
        ev.Evaluation(ev.EvalConfig(styles=("oil",)), torch.device("cpu"))


def test_other_dice_change_the_truth_and_not_the_view():
    config = ev.EvalConfig(seeds=1, styles=("neon_city",), size=32, supersample=1)
    evaluation = ev.Evaluation(config, torch.device("cpu"))
    a = evaluation.shot(evaluation.worlds, 3, True)
    b = evaluation.shot(evaluation.worlds, 3, True, persistence.other_dice(evaluation))
    assert torch.equal(a.view, b.view) and (a.target - b.target).abs().mean() > 0.02
