"""Bad arguments of every sub-command: one sentence on stderr, exit code 2, never a traceback."""

from pathlib import Path

import pytest

from mirage_hello.ptx import loader
from mirage_hello.tools import cli

PTX = str(Path(loader.__file__).with_name("merge_sums.ptx"))
MERGE = [PTX, "--tensor", "s=f32[1,2,4,4]:rand", "--tensor", "o=f32[1,4,4]"]
MERGE += ["--args", "s", "o", "2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "required: INPUT, -o/--output"),
        (["run", "a.mp4", "-o", "b.mp4", "--steps", "two"], "invalid int value: 'two'"),
        (["run", "a.mp4", "-o", "b.mp4", "--steps", "0"], "--steps: must be at least 1 (got 0)"),
        (["run", "a.mp4", "-o", "b.mp4", "--max-frames", "-1"], "--max-frames: must be at least"),
        (["run", "a.mp4", "-o", "b.mp4", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["run", "a.mp4", "-o", "b.mp4"], "no such file: 'a.mp4'"),
        (["bench", "--budget-seconds", "-1"], "seconds must be positive and finite (got -1)"),
        (["bench", "--compile-seconds", "nan"], "seconds must be positive and finite (got nan)"),
        (["tune", "--budget-seconds", "soon"], "seconds must be positive and finite (got soon)"),
        (["eval", "--frames", "1"], "frames must be at least 2 (got 1)"),
        (["eval", "--history-noise", "nan"], "history_noise must be at least 0 (got nan)"),
        (["eval", "--noise-correlation", "1.5"], "noise_correlation must be from 0 to 1 (got 1.5)"),
        (["eval", "--size", "20"], "size must be a multiple of 8 (got 20)"),
        (["eval", "--steps", "0"], "--steps, --teacher-steps: at least 1 (got 0 and 8)"),
        (["eval", "--out", __file__], "is a file; name a folder"),
        (["eval", "--page", __file__], "is not JSON"),
        (["parity", "--op", "sliu"], "did you mean silu?"),
        (["parity", "--backend", "pxt"], "did you mean ptx?"),
        (["parity", "--dtype", "int8"], "--dtype: unknown dtype 'int8'"),
        (["explain", "atention"], "did you mean attention?"),
        (["explain", "silu", "--shape", "4x4"], "--shape: expected sizes with commas"),
        (["explain", "silu", "--shape", "4", "--shape", "4"], "silu takes 1 tensors (x), got 2"),
        (["explain", "group_norm", "--set", "group=3"], "did you mean groups?"),
        (["explain", "group_norm", "--set", "groups=x"], "expected NAME=NUMBER"),
        (["explain", "silu", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
        (["explain", "silu", "--device", "cuda:99"], "--device: got cuda:99, but torch sees"),
        (["explain", "silu", "--device", "cpu:3"], "--device: expected cpu, cuda or cuda:N"),
        (["explain", "silu", "--shape", "99999999999,99999999999"], "does not fit the memory"),
        (["explain", "frame", "--steps", "0"], "--steps must be at least 1 (got 0)"),
        (["bench", "--preset", "tinny"], "did you mean tiny?"),
        (["report", "--readme", "BYTES", "--out", "x"], "--readme: BYTES is not text"),
        (["train", "--config", "BYTES"], "BYTES is not TOML"),
        (["train", "--config", "."], "config: no file . (Is a directory)"),
        (["train", "--set", "model=tinny"], "did you mean tiny?"),
        (["train", "--set", "size=1e400"], "config: size must be like"),
        (["train", "--set", "shares=1"], "shares must be one a stage"),
        (["train", "--set", "minutes=-1"], "minutes must not be negative (got -1.0)"),
        (["train", "--set", "checkpoint_every=0"], "checkpoint_every must be at least 1"),
        (["train", "--out", "BYTES"], "cannot use BYTES (File exists)"),
        (["train", "--out", "x", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
        (["ptx", "check", "BYTES"], "BYTES is not text"),
        (["ptx", "check", "EMPTY"], "there is no kernel in it"),
        (["ptx", "run", PTX, "--tensor", "x=f32[4]:@none.npy"], "cannot read or write none.npy"),
        (["ptx", "run", PTX, "--tensor", "x=f32[4]:@EMPTY"], "EMPTY: expected an array of shape"),
        (["ptx", "run", *MERGE, "--save", "o=none/x.npy"], "cannot read or write none/x.npy"),
        (["ptx", "run", *MERGE, "--html", "none/x.html"], "cannot read or write none/x.html"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("BYTES").write_bytes(b"\xff\xfe")
    Path("EMPTY").touch()
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith(f"mirage {arguments[0]}: ") and err.count("\n") == 1
