"""`mirage eval`: the command, its requirements, joined and interrupted parts, pictures and page."""

import copy
import json
import os
import shutil
import signal

import pytest
import torch
from training_driver import add_minute_model

from mirage_hello.model import checkpoint, persistence
from mirage_hello.model import evaluation as ev
from mirage_hello.model.data.png import png
from mirage_hello.model.presets import PRESETS, build
from mirage_hello.tools import cli, eval_page
from mirage_hello.tools.eval_requirements import requirements, unmeasured


@pytest.fixture
def minute_checkpoint(tmp_path):
    add_minute_model()
    path = tmp_path / "minute.safetensors"
    checkpoint.save(path, *build("minute"))
    yield path
    PRESETS.pop("minute")


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
    monkeypatch.setattr(persistence, "AWAY", 2)
    monkeypatch.setattr(persistence, "EARLY", 1)
    arguments = ["eval", "--checkpoint", str(minute_checkpoint), "--frames", "6", "--seeds", "1",
                 "--styles", "clay", "--size", "16", "--supersample", "1", "--device", "cpu",
                 "--cut-frames", "3", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*arguments, "--only", "no-history"]) == 0  # nothing is required of it alone
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert not result["models"] and list(result["ablations"]) == ["no-history"]
    assert cli.main([*arguments, "--only", "3-step"]) == 2
    assert "unknown candidate '3-step'; known: 1-step, no-history" in capsys.readouterr().err


def test_eval_writes_results_pictures_and_a_page(tmp_path, minute_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(persistence, "AWAY", 2)
    monkeypatch.setattr(persistence, "EARLY", 1)
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
    wanted |= {"cut_recovery_frames", "persistence", "memory_db", "collapsed", "psnr_db", "ssim"}
    assert all(wanted <= set(found) for found in (model, *result["ablations"].values()))
    assert set(model["contrast"]) >= {"red", "green", "blue", "saturation", "clipped", "sharpness"}
    assert set(model["by_style"]["clay"]) >= {"psnr_db", "ssim", "psnr_slope_db_per_1000"}
    assert model["psnr_slope_db_per_1000"]["low"] <= model["psnr_slope_db_per_1000"]["high"]
    assert 0 < model["ceiling_db"] < 60
    for file in model["strips"].values():
        assert not file or (tmp_path / "eval" / file).stat().st_size > 100
    assert cli.main(["eval", "--page", str(path)]) == 0
    page = (tmp_path / "eval" / "minute.html").read_text()
    assert "no-augmentation" in page and "<video" in page and "<td>2</td>" in page
    assert (tmp_path / "eval" / "minute.png").stat().st_size > 5000


def whole_result() -> dict:
    """A result that meets every requirement."""
    model = {
        "steps": 2, "frames": 5000, "streams": 40, "collapsed": [], "psnr_db": {"mean": 24.0},
        "psnr_slope_db_per_1000": {"mean": -0.01, "low": -0.05, "high": -0.001},
        "contrast": {"red": {"output": -0.01}, "clipped": {"output": 0.002}},
        "warp_error": {"output": 0.012, "truth": 0.009}, "ends_db": {"first": 27.0, "late": 24.0},
    }  # fmt: skip
    model["shorter"] = {"1000": {"psnr_db": {"mean": 24.5}, "warp_error": model["warp_error"]}}
    teacher = {**model, "steps": 8, "frames": 1000, "psnr_db": {"mean": 24.9}, "shorter": {}}
    forgetful = {**teacher, "steps": 2, "warp_error": {"output": 0.025, "truth": 0.009}}
    dead = [f"clay seed {i}: 9.0 dB, a flat picture has 18.0" for i in range(21)]
    fragile = {**teacher, "steps": 2, "collapsed": dead, "ends_db": {"first": 26.0, "late": 9.0}}
    result = {
        "models": {"1-step": {**model, "steps": 1}, "2-step": model, "teacher-8-step": teacher},
        "ablations": {"no-history": forgetful, "no-augmentation": fragile},
        "settings": {"frames": 5000},
    }
    return copy.deepcopy(result)


def failed(result: dict) -> list[str]:
    return [check["text"] for check in requirements(result) if not check["passed"]]


def test_a_whole_result_meets_every_requirement():
    checks = requirements(whole_result())
    assert len(checks) == 2 * 4 + 2 + 2 and not failed(whole_result())
    values = {check["text"]: check["value"] for check in checks}
    assert values["2-step within 0.5 dB of the teacher"] == "0.40 dB lost"
    text = values["without history at least 2 times the flicker"]
    assert text == "2.08 (beyond the truth's own: 5.3)"
    assert "21 of 40 streams; 26.0 dB at first, 9.0 late" in values.values()
    assert not unmeasured(whole_result())


FAULTS = {
    "frames in closed loop": ("models", {"frames": 891}),
    "PSNR slope": ("models", {"psnr_slope_db_per_1000": {"mean": -1, "low": -1.1, "high": -0.9}}),
    "collapses": ("models", {"collapsed": ["clay seed 1: 9.0 dB after 20.0"]}),
    "contrast below 3%": ("models", {"contrast": {"blue": {"output": -0.031}}}),
    "0.5 dB of the teacher": ("models", {"shorter": {"1000": {"psnr_db": {"mean": 24.3}}}}),
    "times the flicker": ("no-history", {"warp_error": {"output": 0.0239, "truth": 0.009}}),
    "most streams collapse": ("no-augmentation", {"collapsed": ["clay seed 1"] * 20}),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_each_requirement_can_fail_alone(what):
    result, (where, change) = whole_result(), FAULTS[what]
    broken = result["models"]["2-step"] if where == "models" else result["ablations"][where]
    if "shorter" in change:
        broken["shorter"]["1000"] |= change["shorter"]["1000"]
    else:
        broken |= change
    (text,) = failed(result)
    assert what in text


def test_one_step_may_lose_more_and_a_seed_alone_has_no_interval():
    result = whole_result()
    result["models"]["1-step"]["shorter"] = {"1000": {"psnr_db": {"mean": 23.5}}}
    assert not failed(result)
    result["models"]["1-step"]["shorter"] = {"1000": {"psnr_db": {"mean": 23.3}}}
    assert failed(result) == ["1-step within 1.5 dB of the teacher"]
    result = whole_result()
    result["models"]["2-step"]["psnr_slope_db_per_1000"] = {"mean": 0.0, "low": None, "high": None}
    assert "slope" in failed(result)[0]


def test_what_was_not_measured_is_said():
    result = whole_result()
    del result["ablations"]["no-augmentation"], result["models"]["teacher-8-step"]
    result["settings"]["frames"] = 1000
    assert unmeasured(result) == ["teacher", "no-augmentation", "5000 frames"]


def test_sigterm_ends_the_run_and_what_was_measured_is_written(tmp_path, minute_checkpoint, capsys):
    """As `timeout` ends a part: the parts are joined all the same, and one is known to be short."""
    saved = ev.Evaluation.long_run
    parts = []
    for name, stop_at in (("whole", None), ("cut", 12)):

        def long_run(self, candidates, keep, say, stop_at=stop_at):
            def watched(candidate, frame, *pictures):
                keep(candidate, frame, *pictures)
                if frame == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)

            return saved(self, candidates, watched, say)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ev.Evaluation, "long_run", long_run)
            only = ["1-step"] if stop_at is None else ["2-step"]
            code = cli.main(
                ["eval", "--checkpoint", str(minute_checkpoint), "--frames", "40", "--seeds", "2",
                 "--styles", "clay", "--size", "16", "--supersample", "1", "--device", "cpu",
                 "--short", "--steps", "1", "2", "--only", *only, "--out", str(tmp_path / name)]
            )  # fmt: skip
        assert code == 1
        parts.append(str(tmp_path / name / "tiny.json"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    capsys.readouterr()
    assert cli.main(["eval", "--join", *parts, "--out", str(tmp_path / "all")]) == 1
    said = capsys.readouterr().out
    assert "FAIL  2-step: 40 frames in closed loop: 13" in said
    assert "pass  1-step: 40 frames in closed loop: 40" in said
    assert "not measured: teacher, no-history, no-augmentation, 5000 frames" in said
    assert (tmp_path / "all" / "tiny-2-step.png").stat().st_size > 100
    assert cli.main(["eval", "--page", str(tmp_path / "all" / "tiny.json")]) == 0


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
        "warp_error": {"output": 0.1, "truth": 0.1}, "edges": {"output": 0.3, "without": 0.4},
    }  # fmt: skip
    assert "&lt;b&gt;" in eval_page.row("<b>", model)
