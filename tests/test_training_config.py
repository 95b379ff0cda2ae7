"""Settings of a run: read, refused with a sentence, listed."""

import json
import sys

import pytest
from training_driver import add_minute_model, quick

from mirage_hello.model.presets import PRESETS
from mirage_hello.model.training import Options, TrainingError, preset, train
from mirage_hello.model.training.config import changed, read


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


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
        ("student_share", 1.5, "student_share must be from 0 to 1"),
        ("noise_correlation", "nan", "noise_correlation must be from 0 to 1"),
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


def test_list_prints_the_settings(capsys):
    from mirage_hello.tools import cli

    assert cli.main(["train", "--preset", "smoke", "--set", "batch=3", "--list"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 3
    assert cli.main(["train", "--preset", "smoke", "--set", "batchh=3", "--list"]) == 2
    assert "did you mean 'batch'" in capsys.readouterr().err


def test_tensorboard_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="tensorboard package is not installed"):
        train(quick(), tmp_path, Options(device="cpu", tensorboard=True))
