"""Tiles by measurement: which one a request gets, the files, and what a kernel asks for."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mirage_hello.bench import model_calls, tune
from mirage_hello.bench.case import Case
from mirage_hello.bench.harness import Timing
from mirage_hello.bench.rows import Options
from mirage_hello.kernels import (
    Kernel,
    backends,
    conv2d_tiles,
    explain,
    forget_choices,
    group_norm_apply,
    group_norm_launch,
    group_norm_plan,
    linear_sm90a,
    ops,
    tuning,
    use,
)
from mirage_hello.tools import cli
from mirage_hello.tools.explain import as_dict

CARD = "NVIDIA H200"


@dataclass(frozen=True)
class Tile:
    rows: int
    split: int = 1
    patch: bool = False


TILES = [Tile(64), Tile(128), Tile(128, 4), Tile(256, 2, patch=True)]


def cost(tile):
    return 100 / tile.rows


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    """A cache and a shipped file of this test; nothing chosen before."""
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "shipped_path", lambda card: tmp_path / "shipped.json")
    monkeypatch.setattr(tuning, "current_card", lambda: CARD)
    tuning.forget()
    yield
    tuning.forget()


def tile_for(m=64):
    return tuning.tile_for("conv2d", {"m": m, "fused": True}, lambda: TILES, cost)


def entry(tile, runner_up=None, **times):
    stored = {"tile": tuning.encoded(tile)} | times
    return stored | ({"runner_up": tuning.encoded(runner_up)} if runner_up else {})


def saved(path, tile, key="m=64 fused=True", op="conv2d"):
    found = entry(tile, Tile(64), time_us=3.0, runner_up_us=3.5)
    tuning.save(CARD, "0123456", {op: {key: found}}, path)


def test_the_model_decides_where_nothing_was_measured():
    assert tile_for() == Tile(256, 2, patch=True)
    choice = tuning.choose(tuning.Request("conv2d", "m=1", lambda: TILES[:2], cost))
    assert choice.source == "cost model" and choice.runner_up == Tile(64)
    assert choice.cost_ratio == 2.0


def test_own_results_come_before_shipped_ones(tmp_path):
    saved(tmp_path / "shipped.json", Tile(128))
    assert tile_for() == Tile(128)
    saved(tuning.user_path(CARD), Tile(128, 4))
    assert tile_for() == Tile(128, 4)
    assert tile_for(m=65) == Tile(256, 2, patch=True)
    choice = tuning.choose(tuning.Request("conv2d", "m=64 fused=True", lambda: TILES, cost))
    expected = "Tile(rows=128, split=4) 3.00 us (tuned on this card); runner-up Tile(rows=64) 3.50"
    assert str(choice) == f"{expected} us"


def test_another_card_has_other_results(monkeypatch):
    saved(tuning.user_path(CARD), Tile(128))
    monkeypatch.setattr(tuning, "current_card", lambda: "NVIDIA H100")
    assert tile_for() == Tile(256, 2, patch=True)


def test_results_are_merged_and_read_back(tmp_path):
    path = tmp_path / "tiles.json"
    saved(path, Tile(128))
    saved(path, Tile(64), "m=1 fused=True")
    table = tuning.read(path)["conv2d"]
    assert {key: e["tile"] for key, e in table.items()} == {
        "m=1 fused=True": {"rows": 64},
        "m=64 fused=True": {"rows": 128},
    }
    assert json.loads(path.read_text())["card"] == CARD
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("tmp")]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"ops": 3}', '{"ops": {"conv2d": {"m=64 fused=True": {}}}}']
)
def test_a_damaged_file_is_reported_and_written_anew(text, caplog):
    path = tuning.user_path(CARD)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "mirage_hello"):
        assert tile_for() == Tile(256, 2, patch=True)
    assert str(path) in caplog.text and "mirage tune" in caplog.text
    saved(path, Tile(64))
    assert tile_for() == Tile(64)


def test_a_stored_tile_that_no_longer_fits_is_not_used(caplog):
    saved(tuning.user_path(CARD), Tile(512))
    with caplog.at_level(logging.WARNING, "mirage_hello"):
        assert tile_for() == Tile(256, 2, patch=True)
    assert "no candidate any more" in caplog.text


def test_strings_are_candidates_too():
    saved(tuning.user_path(CARD), "separate", "m=64")
    ways = ["fused", "separate"]
    assert tuning.tile_for("conv2d", {"m": 64}, lambda: ways, ways.index) == "separate"
    assert tuning.tile_for("conv2d", {"m": 65}, lambda: ways, ways.index) == "fused"


def test_a_listener_answers_every_request():
    saved(tuning.user_path(CARD), Tile(128))
    assert tile_for() == Tile(128)
    heard = []

    def listen(request):
        heard.append((request.op, request.key, request.ranked()[0]))
        return Tile(64)

    with tuning.listening(listen):
        assert tile_for() == Tile(64)
    assert heard == [("conv2d", "m=64 fused=True", Tile(256, 2, patch=True))]
    assert tile_for() == Tile(128)


def test_a_kernel_is_asked_without_data():
    def run(x):
        tuning.tile_for("conv2d", {"m": x.shape[0]}, lambda: TILES, cost)
        raise AssertionError("the launch")

    request = tuning.request_of(run, [torch.empty(7, device="meta")])
    assert request.key == "m=7"
    assert tuning.request_of(lambda x: x.cpu(), [torch.empty(7, device="meta")]) is None


def test_the_candidates_are_made_once_a_shape():
    counts = []

    def candidates():
        counts.append(1)
        return TILES

    for _ in range(3):
        tuning.tile_for("linear", {"m": 1}, candidates, cost)
    assert len(counts) == 1


class TestExplain:
    """A kernel with tiles says which one it would take, from where, and the runner-up."""

    @pytest.fixture
    def silu_with_tiles(self):
        def run(x, tile=None):
            tuning.tile_for("silu", {"n": x.numel()}, lambda: TILES, cost)
            return x.sigmoid() * x

        kernel = Kernel("silu", "cupy", run, devices=("cpu", "cuda"))
        ops.silu.kernels.append(kernel)
        yield kernel
        ops.silu.kernels.remove(kernel)
        forget_choices()

    def test_the_tile_and_the_runner_up(self, silu_with_tiles, monkeypatch):
        monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
        saved(tuning.user_path(CARD), Tile(128), "n=12", "silu")
        explanation = explain("silu", torch.zeros(3, 4))
        (candidate,) = [c for c in explanation.candidates if c.tile]
        assert candidate.tile.tile == Tile(128)
        assert "(tuned on this card); runner-up Tile(rows=64) 3.50 us" in str(explanation)
        assert json.dumps(as_dict(explanation))


class TestMeasuring:
    """bench/tune.py on a kernel that runs on a CPU, with a clock of ours."""

    TIMES = {Tile(64): 5.0, Tile(128): 2.0, Tile(128, 4): 3.0}  # noqa: RUF012

    @pytest.fixture
    def kernel(self, monkeypatch):
        """silu with TILES; the one of 256 rows, the model's favourite, is wrong."""

        def run(x, tile=None):
            def ask():
                return tuning.tile_for("silu", {"n": x.numel()}, lambda: TILES, cost)

            out = torch.nn.functional.silu(x)
            return out + 1 if (tile or ask()).rows == 256 else out

        kernel = Kernel("silu", "cupy", run, devices=("cpu", "cuda"))
        monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
        monkeypatch.setattr(ops.silu, "kernels", [*ops.silu.kernels, kernel])
        monkeypatch.setattr(tune, "measure", self.measure)
        forget_choices()
        yield kernel
        forget_choices()

    def measure(self, contenders, device, effort):
        names = {tuning.name(tile): us for tile, us in self.TIMES.items()}
        return {n: Timing("fake", 1, [names[n]], run[0]()) for n, run in contenders.items()}

    def tuned(self, lost=(), begin=lambda step, seconds: None):
        options = Options(device="cpu", backends=("cupy",), tiles=8)
        case = Case("silu", "12", lambda draw: (draw.normal(3, 4),), flops=1, elements=1)
        (called,) = tune.calls_of(case, "float32", options)
        tune.compile_all([called], options.tiles)  # nothing to do on a CPU
        outcome = tune.tune_call(called, options.tiles, begin, lost)
        assert not outcome.rows and not outcome.failures
        return outcome.tiles

    def test_the_fastest_right_tile_is_kept(self, kernel):
        steps = []
        (result,) = self.tuned(begin=lambda step, seconds: steps.append(step))
        assert result["asks"] == "silu" and result["key"] == "n=12"
        assert result["entry"] == {
            "tile": {"rows": 128}, "time_us": 2.0, "timing": "hot",
            "runner_up": {"rows": 128, "split": 4}, "runner_up_us": 3.0,
            "model": {"rows": 256, "split": 2, "patch": True}, "model_us": None,
        }  # fmt: skip
        assert list(result["wrong"]) == ["Tile(rows=256, split=2, patch=True)"]
        assert steps[0] == "Tile(rows=256, split=2, patch=True)" and steps[-1] == "timing"
        assert "3 right, 1 wrong" in tune.line(result)
        tuning.save(CARD, "0123456", tune.table([result]), tuning.user_path(CARD))
        assert kernel.run(torch.zeros(12)).sum() == 0  # the right tile from now on

    def test_a_tile_that_hung_is_left_out(self, kernel):
        (result,) = self.tuned(lost=["Tile(rows=128)"])
        assert result["entry"]["tile"] == {"rows": 128, "split": 4}

    def test_a_model_whose_choice_is_as_good_keeps_it(self, kernel, monkeypatch):
        monkeypatch.setattr(type(self), "TIMES", {t: 2.0 + 0.01 * t.split for t in TILES})
        monkeypatch.setattr(tune.Tuned, "problem", lambda self, tile: None)
        (result,) = self.tuned()
        assert result["entry"]["tile"] == result["entry"]["model"]

    def test_a_tile_that_raises_is_wrong(self, kernel, monkeypatch):
        def raising(self, tile, args, kwargs):
            raise RuntimeError("too much shared memory")

        monkeypatch.setattr(tune.Tuned, "run", raising)
        assert self.tuned() == []

    def test_nothing_right_gives_nothing(self, kernel, monkeypatch):
        monkeypatch.setattr(tune.Tuned, "problem", lambda self, tile: "wrong")
        assert self.tuned() == []


def test_the_calls_of_a_model_are_recorded():
    x, weight, bias = torch.randn(9, 64).half(), torch.randn(16, 64).half(), torch.randn(16).half()
    with model_calls.recorded() as calls, torch.no_grad(), use("ptx-emulated"):
        for _ in range(2):
            out = ops.linear(x, weight, bias=bias)
    ((op, key),) = calls
    run, args, kwargs = calls[op, key]
    assert op == "linear" and "n=16" in key and kwargs["bias"] is not bias
    judge = model_calls.held_against_its_own(run, args, kwargs)
    called = tune.Called({}, run, args, kwargs, judge)
    assert called.judge(out).passed and not called.judge(out + 0.1).passed
    assert len(called.arguments()) > 1  # copies of the weight
    assert [r.key for r in tune.requests(run, args, kwargs)] == [key]


def test_copies_keep_their_strides():
    @dataclass
    class Norm:
        sums: torch.Tensor
        groups: int

    v = torch.randn(2, 5, 3, 8).unbind(2)[1]
    norm = tune.copied(Norm(v, 4))
    assert norm.sums.stride() == v.stride() and torch.equal(norm.sums, v)
    assert norm.sums.data_ptr() != v.data_ptr() and norm.groups == 4


def test_tune_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--op", "conv2"], "unknown op"),
        (["--case", "1x1"], "unknown case"),
        (["--model", "881m"], "unknown preset"),
        (["--model", "880m", "--op", "conv2d"], "leave --op and --case out"),
        (["--op", "silu"], "none of silu has kernels with tiles"),
        (["--count", "0"], "at least one candidate"),
    ],
)
def test_bad_arguments_of_tune(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["tune", *arguments]) == 2
    assert text in capsys.readouterr().err


SHIPPED = sorted(Path(tuning.__file__).parent.glob("choices/*-tiles.json"))


def asked(op, key):
    """Ask for a stored key through the kernel's own choose_tile."""
    numbers = {name: int(value) for name, value in (part.split("=") for part in key.split())}
    if op.startswith("conv2d"):
        return conv2d_tiles.choose_tile(**numbers, fp8="fp8" in op)
    if op == "group_norm_trigger":
        shape = group_norm_plan.Shape(channels_last=True, **numbers)
        return group_norm_launch.trigger(shape, group_norm_plan.plan(shape))
    if op.startswith("group_norm_apply"):
        return group_norm_apply.choose_cut(**numbers, op=op)
    product = "geglu" if "geglu" in op else "linear"
    kinds = {"norm": "layer_norm" in op, "fp8": "fp8" in op, "quantised": "to_e4m3" in op}
    shape = [numbers[name] for name in ("m", "n", "blocks")]
    if "softmax" in op:
        del kinds["norm"]
        return linear_sm90a.choose_softmax_tile(*shape, numbers["width"], **kinds)
    return linear_sm90a.choose_tile(product, *shape, **kinds)


@pytest.mark.parametrize("pixels", [64, 4096])
def test_the_trigger_of_a_group_norm_is_asked(pixels):
    key = f"images=1 channels=448 pixels={pixels} groups=32 x_channels=0 size=2"
    assert asked("group_norm_trigger", key) == {64: "early", 4096: "late"}[pixels]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tiles_are_still_candidates(path, monkeypatch, caplog):
    monkeypatch.setattr(tuning, "shipped_path", lambda card: path)
    tuning.forget()
    with caplog.at_level(logging.WARNING, "mirage_hello"):
        for op, entries in tuning.read(path).items():
            for key, entry in entries.items():
                assert tuning.encoded(asked(op, key)) == entry["tile"], f"{op} {key}: tune again"
    assert not caplog.records
