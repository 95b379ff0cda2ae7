"""Publishing: weights with their record, results with their pictures, and a card made of both."""

import json
from pathlib import Path

import pytest
import torch
from training_driver import add_minute_model

from mirage_hello.model import checkpoint, persistence, shipped
from mirage_hello.model.presets import PRESETS
from mirage_hello.model.training import Options, preset, train
from mirage_hello.model.training.config import changed
from mirage_hello.tools import cli, publish, training_tables
from mirage_hello.tools.errors import BadInput

QUICK = {
    "model": "minute", "size": 16, "clip_frames": 4, "autoencoder_steps": 3, "distill_steps": 2,
    "history_noise": 0.3,
}  # fmt: skip
FRAMES = {
    "meta": {"gpu": "CPU x", "host": "Linux, 2 cores", "device": "cpu", "commit": "0" * 40},
    "rows": [
        {"op": "frame", "case": "tiny 512x512 2 steps", "dtype": "float32",
         "frame_us": {"p50": 256100.0, "p95": 301000.0, "frames": 40}},
        {"op": "frame", "case": "880m 512x512 1 step", "dtype": "bfloat16", "frame_us": {}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained minute model and its evaluation: the folder of both."""
    folder = tmp_path_factory.mktemp("made")
    add_minute_model()
    train(changed(preset("smoke"), QUICK), folder / "run", Options(device="cpu", quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persistence, "AWAY", 2)
        patch.setattr(persistence, "EARLY", 1)
        cli.main(
            ["eval", "--checkpoint", str(folder / "run" / "model.safetensors"), "--frames", "8",
             "--steps", "1", "2", "--seeds", "2", "--styles", "clay", "--size", "16", "--device",
             "cpu", "--supersample", "1", "--cut-frames", "3", "--out", str(folder / "eval")]
        )  # fmt: skip
    PRESETS.pop("minute")
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package to publish into."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "PICTURE", tmp_path / "styles.png")
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "eval").mkdir()
    (tmp_path / "results" / "eval" / "tiny-old.mp4").write_bytes(b"old")
    (tmp_path / "results" / "cpu" / "frame.json").write_text(json.dumps(FRAMES))
    return tmp_path


def words(made: Path) -> list[str]:
    return ["--checkpoint", str(made / "run" / "model.safetensors"), "--run", str(made / "run:2"),
            "--eval", str(made / "eval" / "tiny.json")]  # fmt: skip


def test_weights_results_and_card_are_published_together(made, package, capsys):
    assert publish.main(words(made)) == 0
    assert capsys.readouterr().out.count("\n") == 3
    denoiser, _ = shipped.load("tiny", torch.bfloat16)  # checks the sum
    trained, _ = checkpoint.load(made / "run" / "model.safetensors", torch.bfloat16)
    assert torch.equal(denoiser.unet.conv_in.weight, trained.unet.conv_in.weight)
    record = json.loads((package / "weights" / "tiny.json").read_text())
    assert record["bytes"] == (package / "weights" / "tiny.safetensors").stat().st_size
    assert [s["stage"] for s in record["training"]] == ["autoencoder", "video", "distill"]
    assert [s["steps"] for s in record["training"]] == [3, 8, 2]
    assert publish.main([*words(made)[:4], "--began-with", str(shipped.FOLDER / "tiny.json")]) == 0
    record = json.loads((package / "weights" / "tiny.json").read_text())
    assert [s["stage"] for s in record["training"]] == 2 * ["autoencoder", "video", "distill"]
    results = package / "results" / "eval"
    assert not (results / "tiny-old.mp4").exists()
    assert {"tiny.json", "tiny.html", "tiny.png", "tiny-2-step.png"} <= {
        path.name for path in results.iterdir()
    }


def test_the_card_says_what_the_files_say(made, package):
    publish.main(words(made))
    text = (package / "weights" / "README.md").read_text()
    result = json.loads((made / "eval" / "tiny.json").read_text())
    record = json.loads((package / "weights" / "tiny.json").read_text())
    model = result["models"]["2-step"]
    seconds = sum(2 * s["seconds"] for s in record["training"])
    for words_ in (
        f"| 2-step | 2 | 8 | {model['psnr_db']['mean']:.2f} [", f"{seconds:.0f} GPU seconds",
        f"U-Net of {record['parameters']['unet']:,} parameters", "history_noise=0.3",
        "| video | 8 | 8 | 0.0006 |", "| CPU x, Linux, 2 cores | 512x512 2 steps | float32 | 256 |",
        "- Not measured: teacher, no-augmentation, 5000 frames.", "**missed**", "- Missed: ",
    ):  # fmt: skip
        assert words_ in text, words_
    assert "880m" not in text and "no-history" in text


def test_the_card_in_the_package_is_the_one_that_its_files_make():
    assert (shipped.FOLDER / "README.md").read_text() == publish.card_text()


def test_the_results_in_the_repository_stay_small():
    files = [path for path in (publish.RESULTS / "eval").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--run"], "expected at least one argument"),
        (["--run", "{made}/eval"], "config.json cannot be read"),
        (["--checkpoint", "{made}/none"], "no file"),
        (["--eval", "{made}/run/config.json"], "not a result of `mirage eval`"),
    ],
)
def test_what_cannot_be_published_is_one_sentence(made, package, capsys, change, message):
    parts = words(made)
    at = parts.index(change[0])
    parts[at : at + 2] = [word.format(made=made) for word in change]
    with pytest.raises(SystemExit):
        publish.main(parts)
    assert message in capsys.readouterr().err


def test_a_model_without_its_runs_or_too_large_is_refused(made, package, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        publish.main(words(made)[:2])
    assert "--checkpoint needs --run" in capsys.readouterr().err
    monkeypatch.setattr(publish, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit):
        publish.main(words(made))
    assert "more than the 1,000 that ship" in capsys.readouterr().err
    assert not (package / "weights").exists()


def test_results_without_their_pictures_are_refused(made, package, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tiny.json").write_text((made / "eval" / "tiny.json").read_text())
    with pytest.raises(SystemExit):
        publish.main(["--eval", str(tmp_path / "alone" / "tiny.json")])
    assert "is not beside it; copy it there" in capsys.readouterr().err
    assert (package / "results" / "eval" / "tiny-old.mp4").exists()


def test_pictures_are_drawn_by_the_shipped_model(made, package, monkeypatch):
    publish.main(words(made))
    calls = []

    def run(words_):
        calls.append(words_)
        Path(words_[words_.index("-o") + 1]).write_bytes(publish.ROOT.joinpath(
            "assets", "demo.mp4").read_bytes())  # fmt: skip
        return 0

    monkeypatch.setattr(cli, "main", run)
    assert publish.main(["--pictures", "2"]) == 0
    styles = [call[call.index("--style") + 1] for call in calls]
    assert styles == ["neon_city", "watercolour", "desert_dusk", "snow_night", "clay"]
    assert (package / "styles.png").read_bytes()[:4] == b"\x89PNG"


def test_tables_of_training_are_those_of_their_files():
    text = training_tables.DOCUMENT.read_text(encoding="utf-8")
    assert len(training_tables.MARKED.findall(text)) == 3
    assert training_tables.fill(text) == text
    with pytest.raises(BadInput, match="no table 'nois'; known: noise, shares, throughput"):
        training_tables.fill("<!-- training:nois a.json -->\n<!-- /training -->")
    with pytest.raises(BadInput, match=r"none\.json cannot be read"):
        training_tables.fill("<!-- training:noise none.json -->\n<!-- /training -->")
