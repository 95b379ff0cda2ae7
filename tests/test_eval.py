"""Evaluation: measures against their definitions, and oracles whose result is known in advance."""

import json
import math
import shutil

import pytest
import torch
from training_driver import add_minute_model

from mirage_hello.model import checkpoint, memory_probe, metrics
from mirage_hello.model import evaluation as ev
from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.rollout import Rollout
from mirage_hello.tools import cli, eval_page
from mirage_hello.tools.eval import requirements
from mirage_hello.tools.eval_strips import png


@pytest.fixture
def minute_checkpoint(tmp_path):
    add_minute_model()
    path = tmp_path / "minute.safetensors"
    checkpoint.save(path, *build("minute"))
    yield path
    PRESETS.pop("minute")


# Measures


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 8, 8)
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert metrics.psnr(a, b).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    assert metrics.psnr(a, a).tolist() == [100.0, 100.0]


def test_ssim_of_equal_noisy_and_inverted(seed):
    torch.manual_seed(seed)
    a = torch.rand(1, 3, 32, 32) * 2 - 1
    assert metrics.ssim(a, a).item() == pytest.approx(1.0, abs=1e-5)
    assert metrics.ssim(a, -a).item() < 0
    noisy = metrics.ssim((a + 0.3 * torch.randn_like(a)).clamp(-1, 1), a).item()
    assert 0.1 < noisy < 0.95


def test_ssim_formula_on_constant_pictures():
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)
    x, y = 0.4, 0.7  # their lumas in [0, 1]; variances are 0
    expected = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    assert metrics.ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_statistics_move_the_way_they_are_named(seed):
    torch.manual_seed(seed)
    a = (torch.rand(1, 3, 32, 32) - 0.5) * 1.2
    base = metrics.statistics(a, a)
    assert metrics.statistics(a + 0.2, a)["brightness"] > base["brightness"]
    assert metrics.statistics(a * 0.5, a)["contrast"] < base["contrast"]
    assert metrics.statistics(a * 9, a)["clipped"].clamp_min(0) >= base["clipped"]
    grey = a.mean(1, keepdim=True).expand_as(a)
    assert metrics.statistics(grey, a)["saturation"].item() == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert metrics.statistics(blurred, a)["sharpness"] < base["sharpness"]
    assert base["motion"].item() == 0


def test_warp_undoes_a_shift_and_sees_flicker():
    picture = torch.rand(1, 3, 16, 16)
    shifted = picture.roll(2, 3)
    motion = torch.zeros(1, 2, 16, 16)
    motion[:, 0] = -2  # two pixels to the left it was, one frame earlier
    depth = torch.full((1, 1, 16, 16), 5.0)
    visible = metrics.visible_before(motion, depth, depth)
    assert visible[..., :2].sum() == 0 and visible[..., 2:].min() == 1
    assert metrics.warp_error(shifted, picture, motion, visible).item() == pytest.approx(
        0, abs=1e-5
    )
    flicker = metrics.warp_error(shifted + 0.1, picture, motion, visible)
    assert flicker.item() == pytest.approx(0.05, abs=1e-4)
    hidden = metrics.visible_before(motion, depth, depth * 2)
    assert hidden.sum() == 0


def test_interval_is_students():
    found = metrics.interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert metrics.interval([5.0]).as_dict() == {"mean": 5.0, "low": None, "high": None}


def test_interval_covers_the_truth_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        found = metrics.interval((1 + torch.randn(8, generator=generator)).tolist())
        hits += found.low <= 1 <= found.high
    assert 930 <= hits <= 970


def test_slope_and_ends():
    frames = torch.arange(0, 1000, 10)
    values = torch.stack((20 - 0.002 * frames, 0.0 * frames + 7), 1)
    assert metrics.slope(frames, values).tolist() == pytest.approx([-2.0, 0.0], abs=1e-6)
    early, late = metrics.ends(values)
    assert early[0] > late[0] and early[1] == late[1] == 7


def test_recovery_counts_frames_above_the_settled_level():
    errors = torch.ones(300)
    errors[100:107] = 5.0
    errors[200:230] = 5.0
    assert metrics.recovery(errors, [100, 200], settle=40) == [7, 30]
    assert metrics.recovery(errors, [290], settle=40) == []  # too close to the end to settle


# Oracles through the whole evaluation


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


def oracle_evaluation(monkeypatch, answer, **values):
    """An evaluation whose candidate answers from the truth of the frame that it is shown."""
    settings = {"frames": 24, "seeds": 2, "styles": ("clay",), "size": 24, "supersample": 1}
    config = ev.EvalConfig(**{**settings, "every": 4, "burn_in": 4, **values})
    evaluation = ev.Evaluation(config, torch.device("cpu"))
    shot = ev.Evaluation.shot

    def remembered(self, worlds, frame, truth, clips=None):
        found = shot(self, worlds, frame, True, clips)
        if clips is None:
            self.last = found.target
        return found

    monkeypatch.setattr(ev.Evaluation, "shot", remembered)
    monkeypatch.setattr(
        ev.Evaluation, "rollout", lambda self, candidate, seed=0: Oracle(evaluation, answer)
    )
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
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: truth + 0.01 * n)
    (curves,) = evaluation.long_run([CANDIDATE])
    found = ev.summary(evaluation.config, curves, evaluation.names)
    assert found["psnr_slope_db_per_1000"]["high"] < -100
    assert found["contrast"]["brightness"]["mean"] > 0.1
    assert len(found["collapsed"]) == 2


def test_a_flickering_model_is_caught(monkeypatch):
    steady = oracle_evaluation(monkeypatch, lambda truth, n: truth)
    a = ev.summary(steady.config, steady.long_run([CANDIDATE])[0], steady.names)
    flicker = oracle_evaluation(monkeypatch, lambda truth, n: truth + 0.2 * (-1) ** n)
    b = ev.summary(flicker.config, flicker.long_run([CANDIDATE])[0], flicker.names)
    assert b["warp_error"]["output"] > 2 * a["warp_error"]["output"]


def test_persistence_is_one_for_memory_and_less_for_none(monkeypatch):
    monkeypatch.setattr(ev, "AWAY", 6)
    monkeypatch.setattr(ev, "EARLY", 2)
    evaluation = oracle_evaluation(monkeypatch, lambda truth, n: truth)
    assert evaluation.persistence([CANDIDATE])[0] == pytest.approx([1.0, 1.0], abs=0.01)
    forget = oracle_evaluation(monkeypatch, lambda t, n: t if n < 8 else -t)
    assert max(forget.persistence([CANDIDATE])[0]) < 0.3


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
    b = evaluation.shot(evaluation.worlds, 3, True, evaluation.other_dice)
    assert torch.equal(a.view, b.view) and (a.target - b.target).abs().mean() > 0.02


# The command


def check_parts(result, path, capsys):
    """The result's halves, joined, are the result again; what cannot be joined is said."""
    parts = []
    for name, other in (("models", "ablations"), ("ablations", "models")):
        parts.append(path.with_name(f"{name}.json"))
        parts[-1].write_text(json.dumps({**result, other: {}}))
    out = ["--name", "joined", "--out", str(path.parent)]
    assert cli.main(["eval", "--join", *map(str, parts), *out]) == 1
    joined = json.loads(path.with_name("joined.json").read_text())
    for key in ("models", "ablations", "requirements", "size"):
        assert joined[key] == result[key]
    path.with_name("other.json").write_text(json.dumps({**result, "size": 512}))
    for second, words in (
        (path, "1-step is in"), (path.with_name("other.json"), "size 512"),
        (path.with_name("none.json"), "cannot be read"),
    ):  # fmt: skip
        capsys.readouterr()
        assert cli.main(["eval", "--join", str(path), str(second), *out]) == 2
        assert words in capsys.readouterr().err


def test_a_part_of_the_candidates(tmp_path, minute_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(ev, "AWAY", 2)
    monkeypatch.setattr(ev, "EARLY", 1)
    arguments = ["eval", "--checkpoint", str(minute_checkpoint), "--frames", "6", "--seeds", "1",
                 "--styles", "clay", "--size", "16", "--supersample", "1", "--device", "cpu",
                 "--cut-frames", "3", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*arguments, "--only", "no-history"]) == 0  # nothing is required of it alone
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert not result["models"] and list(result["ablations"]) == ["no-history"]
    assert cli.main([*arguments, "--only", "3-step"]) == 2
    assert "unknown candidate '3-step'; known: 2-step, no-history" in capsys.readouterr().err


def test_eval_writes_results_pictures_and_a_page(tmp_path, minute_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(ev, "AWAY", 2)
    monkeypatch.setattr(ev, "EARLY", 1)
    code = cli.main(
        ["eval", "--checkpoint", str(minute_checkpoint), "--steps", "1", "2", "--frames", "8",
         "--seeds", "2", "--styles", "clay", "--size", "16", "--supersample", "1",
         "--teacher", str(minute_checkpoint), "--teacher-steps", "3", "--device", "cpu",
         "--ablation", f"no-augmentation={minute_checkpoint}", "--cut-frames", "3",
         "--out", str(tmp_path / "eval"), "--name", "minute"]
    )  # fmt: skip
    assert code == 1  # random weights are no stable model
    assert "FAIL" in capsys.readouterr().out
    path = tmp_path / "eval" / "minute.json"
    result = json.loads(path.read_text())
    check_parts(result, path, capsys)
    assert list(result["models"]) == ["1-step", "2-step", "teacher-3-step"]
    assert list(result["ablations"]) == ["no-history", "no-augmentation"]
    model = result["models"]["2-step"]
    wanted = {"steps", "frames", "seeds", "psnr_slope_db_per_1000", "contrast", "warp_error"}
    assert wanted | {"cut_recovery_frames", "persistence", "memory_db", "collapsed"} <= set(model)
    assert model["psnr_slope_db_per_1000"]["low"] <= model["psnr_slope_db_per_1000"]["high"]
    assert 0 < model["ceiling_db"] < 60
    for file in model["strips"].values():
        assert not file or (tmp_path / "eval" / file).stat().st_size > 100
    assert cli.main(["eval", "--page", str(path)]) == 0
    page = (tmp_path / "eval" / "minute.html").read_text()
    assert "no-augmentation" in page and "<video" in page and "<td>2</td>" in page
    assert (tmp_path / "eval" / "minute.png").stat().st_size > 5000


def test_requirements_read_the_numbers():
    slope = {"mean": -0.01, "low": -0.05, "high": -0.001}
    model = {
        "psnr_slope_db_per_1000": slope, "collapsed": [], "contrast": {"red": {"mean": 0.01}},
        "warp_error": {"output": 0.02}, "psnr_db": {"mean": 24.0},
    }  # fmt: skip
    bad = {**model, "warp_error": {"output": 0.03}, "collapsed": ["clay seed 1"]}

    result = {"models": {"2-step": model}, "ablations": {"no-history": bad, "no-augmentation": bad}}
    assert [c["passed"] for c in requirements(result)] == [True, True, True, False, True]
    slope["low"] = -0.2  # costs 1 dB over 5000 frames, and zero is not inside
    assert not requirements(result)[0]["passed"]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no file" in capsys.readouterr().err
    assert cli.main(["eval", "--page", str(tmp_path / "none.json")]) == 2
    assert "run `mirage eval` first" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert cli.main(["eval", "--page", str(tmp_path / "other.json")]) == 2


def test_png_is_read_back_by_another_reader(tmp_path):
    picture = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    (tmp_path / "a.png").write_bytes(png(picture))
    pyplot = pytest.importorskip("matplotlib.image")
    read = torch.from_numpy(pyplot.imread(tmp_path / "a.png"))[..., :3]
    assert torch.equal((read * 255).round().byte(), picture)
    shutil.rmtree(tmp_path)


def test_page_escapes_names():
    model = {
        "steps": 2, "psnr_db": {"mean": 1.0, "low": None, "high": None}, "strips": {},
        "warp_error": {"output": 0.1, "truth": 0.1},
    }  # fmt: skip
    assert "&lt;b&gt;" in eval_page.row("<b>", model)
