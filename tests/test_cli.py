"""The `mirage` command: help, errors, exit codes and JSON of its sub-commands."""

import argparse
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from mirage_hello.kernels import Kernel, ops
from mirage_hello.model import shipped
from mirage_hello.tools import cli, demo, install_cuda
from mirage_hello.tools.video_reader import Frame
from mirage_hello.tools.video_writer import VideoWriter

ON_CPU = ("--device", "cpu")


@pytest.fixture
def mirage(capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:  # --help and --version leave through argparse
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 32, 24, Fraction(10), Fraction(1, 10)) as writer:
        for index in range(4):
            writer.write(Frame(np.full((24, 32, 3), 40 * index, np.uint8), index))
    return path


def test_help_lists_every_command_and_the_exit_codes(mirage):
    code, out, _ = mirage("--help")
    assert code == 0
    for word in (*cli.COMMANDS, "examples:", "exit codes:", "130"):
        assert word in out


def test_help_does_not_import_torch():
    script = (
        "import sys; from mirage_hello.tools.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_has_help_with_examples(mirage, command):
    code, out, _ = mirage(command, "--help")
    assert code == 0
    assert "examples:" in out and f"mirage {command}" in out
    if command != "ptx":  # whose own sub-commands have it
        assert "--json" in out


def test_version(mirage):
    code, out, _ = mirage("--version")
    assert code == 0 and out.startswith("mirage-hello 0.")


def test_unknown_command_brings_the_nearest(mirage):
    code, out, err = mirage("bnech")
    assert (code, out) == (2, "")
    assert "unknown command 'bnech'" in err and "did you mean bench?" in err


def test_json_errors_are_json_too(mirage):
    code, out, err = mirage("run", "none.mp4", "-o", "o.mp4", "--json")
    assert code == 2
    assert json.loads(out) == {"error": err.removeprefix("mirage run: ").strip()}


@pytest.mark.parametrize("size", ["640", "0x4", "640x-2", "640x360x3", "9000x10", "axb"])
def test_bad_sizes(mirage, clip, size):
    code, _, err = mirage("run", clip, "-o", clip.with_name("o.mp4"), "--size", size)
    assert code == 2 and "--size: " in err and f"got {size!r}" in err


def test_run_json(mirage, clip):
    out_path = clip.with_name("o.mkv")
    code, out, _ = mirage(
        "run", clip, "-o", out_path, "--preset", "tiny", "--device", "cpu", "--json",
        "--backend", "attention=torch,auto", "--style", "clay", "--max-frames", 3,
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0
    assert (result["frames"], result["width"], result["height"]) == (3, 32, 24)
    assert result["trained"] is ("tiny" in shipped.names()) and result["interrupted"] is False
    assert result["frame_ms"]["p50"] <= result["frame_ms"]["p99"]
    assert result["output"] == str(out_path) and out_path.exists()


def test_run_says_plainly_that_untrained_weights_mean_nothing(mirage, clip, monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "none")
    code, out, err = mirage(
        "run", clip, "-o", clip.with_name("o.mp4"), "--preset", "tiny", "--device", "cpu"
    )
    assert code == 0 and err == ""  # no progress bar without a terminal
    assert "the weights are random: until they are trained the picture is meaningless" in out


def test_same_seed_gives_the_same_file(mirage, clip):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = clip.with_name(f"{name}.mp4")
        mirage("run", clip, "-o", path, "--device", "cpu", "--preset", "tiny", "--seed", seed)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_env_names_every_backend_with_its_reason(mirage):
    code, out, _ = mirage("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert {"machine", "packages", "gpus", "driver", "toolkit", "backends"} == set(found)
    for row in found["backends"]:
        assert row["works"] is (row["reason"] is None)
    torch_on_cpu = {"backend": "torch", "device": "cpu", "works": True, "reason": None}
    assert torch_on_cpu in found["backends"]
    code, text, _ = mirage("env")
    assert code == 0
    for row in found["backends"]:
        assert row["backend"] in text and (row["reason"] or "") in text


def test_explain_prints_the_chosen_kernel_and_the_reasons(mirage):
    code, out, _ = mirage("explain", "attention", "--shape", "1,64,2,40", "--device", "cpu")
    assert code == 0
    assert out.startswith("attention float32 1x64x2x40 1x64x2x40 1x64x2x40 on cpu")
    assert "-> attention/torch" in out
    code, out, _ = mirage(
        "explain", "attention", "--backend", "triton", "--json", "--device", "cpu"
    )
    result = json.loads(out)
    assert code == 0
    (triton,) = [c for c in result["candidates"] if c["backend"] == "triton"]
    assert triton["chosen"] is (triton["reason"] is None)


def test_explain_passes_shapes_numbers_and_layout_on(mirage):
    _, out, _ = mirage(
        "explain", "group_norm_silu", "--shape", "2,64,8,8", "--set", "groups=16",
        "--channels-last", "--dtype", "bf16", "--device", "cpu",
    )  # fmt: skip
    assert out.startswith("group_norm_silu bfloat16 2x64x8x8:nhwc groups=16 on cpu")
    code, _, err = mirage(
        "explain", "group_norm_silu", "--shape", "2,65,8,8", "--set", "groups=16", "--device", "cpu"
    )
    assert code == 2 and "C must be a multiple of groups" in err


def test_parity_of_one_op(mirage):
    code, out, _ = mirage(
        "parity", "--op", "silu", "--backend", "torch", "--device", "cpu", "--json"
    )
    result = json.loads(out)
    assert code == 0 and result["passed"] is True
    assert {row["dtype"] for row in result["rows"]} == {"float32", "float16", "bfloat16"}
    assert all(row["error"] <= row["allowed"] for row in result["rows"])
    code, out, _ = mirage("parity", "--op", "silu", "--dtype", "fp32", "--device", "cpu")
    assert code == 0 and "all passed" in out


def test_parity_of_a_wrong_kernel_fails(mirage, monkeypatch):
    wrong = Kernel("silu", "triton", lambda x: x.clone(), devices=("cpu",))
    monkeypatch.setattr(ops.silu, "kernels", [ops.silu.torch_kernel, wrong])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from mirage_hello.kernels import backends

    backends.unavailable.cache_clear()
    code, out, _ = mirage("parity", "--op", "silu", "--device", "cpu")
    assert code == 1 and "FAILED" in out
    code, out, _ = mirage("parity", "--op", "silu", "--device", "cpu", "--json")
    backends.unavailable.cache_clear()
    rows = json.loads(out)["rows"]
    assert code == 1
    assert False in {row["passed"] for row in rows if row["backend"] == "triton"}
    assert {row["passed"] for row in rows if row["backend"] == "torch"} == {True}


def test_parity_of_a_backend_that_cannot_run_here(mirage):
    code, out, err = mirage("parity", "--op", "silu", "--backend", "cuda", "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith("mirage parity: --backend: cuda cannot run on cpu: ")


def test_demo_runs_its_parts_and_says_where_everything_is(mirage, clip, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    usual = demo.parts(clip, folder, argparse.Namespace(device="cpu", max_frames=None))
    *runs, (_, parity), (_, bench), report = usual
    assert [command[0] for _, command in runs] == ["run"] * 5
    assert [parity[0], bench[0], report[1][0]] == ["parity", "bench", "report"]
    # The same, small.
    small = [
        *(("", [*run, "--size", "16x16", "--max-frames", "2"]) for _, run in runs),
        ("", [*parity, "--op", "silu", "--backend", "torch"]),
        ("", [*bench, "--op", "silu", "--dtype", "fp32", "--peers", "torch-eager"]),
        report,
    ]
    monkeypatch.setattr(demo, "parts", lambda *_: small)
    code, out, _ = mirage("demo", clip, "--output-folder", folder, "--device", "cpu")
    assert code == 0, out
    page = (folder / "index.html").read_text()
    assert "silu" in page
    endings = {path.suffix for path in folder.iterdir()}
    assert {".mp4", ".html", ".json", ".png", ".svg"} <= endings
    assert (folder / "clip-styles.png").read_bytes()[:4] == b"\x89PNG"
    assert str(folder / "clip-neon-city.mp4") in out and str(folder / "index.html") in out


def test_demo_without_a_clip_that_exists(mirage, tmp_path):
    code, _, err = mirage("demo", tmp_path / "none.mp4", "--output-folder", tmp_path / "out")
    assert code == 2 and "no such file" in err


def test_closed_pipe_ends_quietly():
    script = "from mirage_hello.tools.cli import main; raise SystemExit(main(['env']))"
    running = subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    running.stdout.close()
    error = running.stderr.read()
    assert running.wait(timeout=60) == 141
    assert error == b""


def test_pycuda_is_left_out_with_one_reason_each(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++" in install_cuda.missing_for_build(tmp_path)
    assert "cuda.h and curand.h are not found" in install_cuda.missing_for_build(None)
    (tmp_path / "include").mkdir()
    for header in install_cuda.HEADERS:
        (tmp_path / "include" / header).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert install_cuda.toolkit() == tmp_path
    if not torch.cuda.is_available():
        assert "libcuda.so.1 is not found" in install_cuda.missing_driver()
