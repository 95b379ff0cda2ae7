"""The clock and what stands around it: timing, results files, the journal, the supervisor."""

import json
import math
import time

import pytest
import torch

from mirage_hello.bench import (
    attention,
    ceilings,
    choices,
    composed,
    conv2d,
    elementwise,
    folded,
    group_norm,
    harness,
    layer_norm,
    linear,
    rows,
    run_file,
    supervisor,
    worker,
)
from mirage_hello.bench.case import Draw
from mirage_hello.bench.rows import Options
from mirage_hello.bench.summary import best_peer, row_line, speedup

SHORT = harness.Effort(rounds=3, sample_us=50.0)
LIMITS = {"copy_gbps": 4000.0, "matrix_tflops": {"bfloat16": 700.0, "float32": 50.0}}


def row(**changes):
    """A row that is valid, with some keys changed."""
    whole = {
        "op": "silu",
        "case": "64 KiB",
        "dtype": "float32",
        "backend": "ptx",
        "time_us": {"p10": 9.0, "p50": 10.0, "p90": 11.0},
        "tflops": 0.1,
        "gbps": 100.0,
        "fraction_of_ceiling": 0.5,
        "peers": {"torch-eager": 30.0, "torch-compile": 20.0, "copy": 5.0},
        "parity": {"error": 1e-8, "allowed": 1e-7},
        "kernel": "silu/ptx",
        "cache": "hot",
        "label": "float32 1x16384",
    }
    return whole | changes


def a_run(*rows):
    run = run_file.new_run("cpu", commit="0123456")
    run["rows"] = list(rows)
    return run


class TestMeasure:
    def test_keeps_every_sample_and_the_last_output(self):
        timings = harness.measure({"add": lambda: torch.ones(3) + 1}, "cpu", effort=SHORT)
        timing = timings["add"]
        assert len(timing.samples_us) == SHORT.rounds and min(timing.samples_us) > 0
        assert torch.equal(timing.output, torch.full((3,), 2.0))
        assert timing.how == "perf_counter"

    def test_a_slower_function_takes_longer(self):
        def wait(seconds):
            def function():
                time.sleep(seconds)
                return torch.zeros(1)

            return function

        timings = harness.measure({"1": wait(0.002), "3": wait(0.006)}, "cpu", effort=SHORT)
        assert timings["1"].median_us > 1900
        assert timings["3"].median_us > 2 * timings["1"].median_us

    def test_input_sets_take_turns(self):
        seen = []
        functions = [lambda i=i: seen.append(i) or torch.zeros(1) for i in range(3)]
        timing = harness.measure({"sets": functions}, "cpu", effort=SHORT)["sets"]
        assert timing.calls % 3 == 0
        assert [seen.count(i) for i in (1, 2)] == [seen.count(1)] * 2

    def test_contenders_are_interleaved(self):
        order = []
        once = harness.Effort(rounds=2, sample_us=0.1)  # one call a sample
        functions = {n: lambda n=n: order.append(n) or torch.zeros(1) for n in "ab"}
        harness.measure(functions, "cpu", effort=once)
        assert order[-4:] == ["a", "b", "a", "b"]

    def test_percentiles(self):
        timing = harness.Timing("graph", 1, [1.0, 2.0, 3.0, 4.0, 5.0])
        assert timing.percentiles_us == pytest.approx({"p10": 1.4, "p50": 3.0, "p90": 4.6})

    def test_cold_needs_a_gpu(self):
        with pytest.raises(ValueError, match="L2"):
            harness.measure({"a": lambda: torch.zeros(1)}, "cpu", cold=True)


@pytest.mark.gpu
class TestMeasureOnGpu:
    def test_a_graph_times_a_copy_at_a_believable_rate(self):
        limits = ceilings.ceilings("cuda")
        assert 100 < limits["copy_gbps"] < 20_000
        assert limits["launch_us"] < 20

    def test_cold_is_slower_than_hot_where_the_data_fits_in_l2(self):
        x = torch.randn(1 << 20, device="cuda")  # 4 MiB in, 4 MiB out
        hot = harness.measure({"a": lambda: x + 1}, "cuda", effort=harness.QUICK)["a"]
        cold = harness.measure({"a": lambda: x + 1}, "cuda", cold=True, effort=harness.QUICK)["a"]
        assert hot.how == cold.how == "graph"
        assert cold.median_us > 1.1 * hot.median_us

    def test_what_cannot_be_captured_is_timed_with_events_and_says_why(self):
        def synchronises():
            x = torch.ones(8, device="cuda")
            x.sum().item()
            return x

        timing = harness.measure({"a": synchronises}, "cuda", effort=harness.QUICK)["a"]
        assert timing.how.startswith("events: ") and timing.median_us > 0

    def test_a_replay_that_writes_nothing_is_seen(self):
        kept = torch.ones(8, device="cuda")
        timing = harness.measure({"a": lambda: kept}, "cuda", effort=harness.QUICK)["a"]
        assert timing.output.isnan().all()


class TestCases:
    def all_cases(self):
        modules = (attention, conv2d, elementwise, group_norm, layer_norm, linear)
        return [case for module in modules for case in (*module.CASES, *module.SMALL)]

    def test_names_are_unique_within_an_op(self):
        for module in (attention, conv2d, elementwise, group_norm, layer_norm, linear):
            for cases in (module.CASES, module.SMALL):
                names = [(case.op, case.name) for case in cases]
                assert len(set(names)) == len(names)

    @pytest.mark.parametrize("group", worker.CASES)
    def test_small_cases_count_the_bytes_of_their_arguments_and_output(self, group):
        for case in worker.CASES[group][1]:
            args = case.make(Draw("cpu", torch.float32, 0))
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if case.op in composed.OPS:
                del tensors[1]  # the sums, which only some ways read
            if case.op in folded.OPS:
                del tensors[-2:]  # the folded weight and its columns, likewise
            tensors.append(rows.op_named(case.op).reference(*args))
            moved = sum(t.numel() * t.element_size() for t in tensors)
            assert case.bytes_moved(torch.float32) == moved, (case.op, case.name)

    def test_known_flops(self):
        by_name = {(case.op, case.name): case for case in self.all_cases()}
        # 4 x 8 heads x 4096^2 x 40, and 2 x 4096 pixels x 320 x 320 x 9.
        assert by_name["attention", "h8 4096x4096 d40"].flops == 21_474_836_480
        assert by_name["conv2d", "320->320 @64"].flops == 7_549_747_200
        assert by_name["linear", "4096x320x2560"].flops == 2 * 4096 * 320 * 2560

    def test_ceiling_is_the_larger_of_memory_and_matrix(self):
        conv = next(c for c in conv2d.CASES if c.name == "320->320 @64")
        assert ceilings.bound_us(conv, "bfloat16", LIMITS) == pytest.approx(7549.7 / 700, rel=1e-3)
        silu = next(c for c in elementwise.CASES if (c.op, c.name) == ("silu", "64 MiB"))
        expected = 2 * 64 * 2**20 / 4000e3  # bytes / (GB/s) in microseconds
        assert ceilings.bound_us(silu, "float32", LIMITS) == pytest.approx(expected)
        assert ceilings.bound_us(silu, "bfloat16", LIMITS) == pytest.approx(expected)

    def test_ceilings_of_this_machine(self):
        limits = ceilings.ceilings("cpu", SHORT)
        assert limits["copy_gbps"] > 0.1 and limits["launch_us"] > 0
        assert set(limits["matrix_tflops"]) == {"float32", "bfloat16"}


class TestResults:
    def test_a_run_survives_the_disk(self, tmp_path):
        path = tmp_path / "new" / "run.json"
        run_file.write(a_run(row()), path)
        assert run_file.load(path)["rows"] == [row()]
        assert [p.name for p in path.parent.iterdir()] == ["run.json"]

    def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(self, tmp_path):
        path = tmp_path / "run.json"
        run_file.write(a_run(row()), path)
        before = path.read_bytes()
        with pytest.raises(ValueError):
            run_file.write_json({"x": math.nan}, path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["run.json"]

    @pytest.mark.parametrize(
        "damage, says",
        [
            (lambda run: run.pop("meta"), "meta is missing"),
            (lambda run: run["meta"].pop("gpu"), "meta.gpu"),
            (lambda run: run.update(rows={}), "rows must be a list"),
            (lambda run: run["rows"][0].pop("tflops"), r"rows\[0\].tflops is missing"),
            (lambda run: run["rows"][0]["time_us"].pop("p90"), r"rows\[0\].time_us.p90"),
            (lambda run: run["rows"][0].update(gbps="fast"), r"rows\[0\].gbps"),
            (lambda run: run["rows"][0]["peers"].update(magic=1.0), "peers.magic"),
            (lambda run: run["rows"][0].update(parity={}), "parity"),
            (lambda run: run["rows"][0].update(cache="warm"), "cache"),
        ],
    )
    def test_damage_is_named(self, tmp_path, damage, says):
        path, run = tmp_path / "run.json", json.loads(json.dumps(a_run(row())))
        damage(run)
        path.write_text(json.dumps(run))
        with pytest.raises(run_file.BadResults, match=says) as error:
            run_file.load(path)
        assert "run.json" in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]"])
    def test_a_folder_goes_on_without_a_corrupt_file(self, tmp_path, content):
        (tmp_path / "bad.json").write_bytes(content)
        run_file.write(a_run(row()), tmp_path / "gpu" / "good.json")
        runs, problems = run_file.load_folder(tmp_path)
        assert [run["meta"]["file"] for run in runs] == ["gpu/good.json"]
        assert len(problems) == 1 and "bad.json" in problems[0]

    def test_default_path(self):
        meta = {"gpu": "NVIDIA H200", "date": "2026-11-22T12:55:01+00:00", "commit": "0123abcd"}
        path = run_file.default_path(meta)
        assert path.parts[-3:] == ("results", "nvidia-h200", "20261122T125501-0123abcd.json")

    def test_committed_results_are_valid(self):
        _, problems = run_file.load_folder(run_file.FOLDER)
        assert problems == []


class TestSummary:
    def test_copy_is_no_rival(self):
        assert best_peer(row()) == ("torch-compile", 20.0)
        assert speedup(row()) == 2.0 and speedup(row(), "torch-eager") == 3.0
        assert speedup(row(), "flash") is None
        assert best_peer(row(peers={"copy": 1.0})) is None

    def test_line(self):
        line = row_line(row())
        assert "10.00 us" in line and "50.0 % of the ceiling" in line
        assert "2.00 x torch-compile" in line


class TestChoices:
    def test_fastest_kernel_of_a_backend_with_rotating_weights_first(self, tmp_path):
        slow = {"p10": 1.0, "p50": 40.0, "p90": 50.0}
        rows = [
            row(),
            row(kernel="silu/ptx/sm_80", time_us=slow),
            row(backend="triton", kernel="silu/triton", cache="cold-weights", time_us=slow),
            row(backend="triton", kernel="silu/triton"),
        ]
        table = choices.choices(a_run(*rows))
        times = {"ptx": 10.0, "triton": 40.0, "torch": 30.0}  # torch's by the eager peer
        assert table == {"silu": {"float32 1x16384": times}}

    def test_shapes_measured_earlier_stay(self, tmp_path):
        choices.save(a_run(row(label="float32 1x1")), tmp_path)
        path = choices.save(a_run(row()), tmp_path)
        assert set(json.loads(path.read_text())["ops"]["silu"]) == {
            "float32 1x1",
            "float32 1x16384",
        }


class TestJournal:
    def test_remembers_what_was_lost_and_what_is_finished(self, tmp_path):
        journal = worker.Journal(tmp_path / "run.json")
        journal.append(worker.Entry("silu | 1 KiB | float32", "silu/ptx", 60))
        journal.append(worker.Entry("silu | 1 KiB | float32", "silu/ptx", state="lost"))
        journal.append(worker.Entry("axpby | 1 KiB | float32", "", state="end"))
        assert journal.lost("silu | 1 KiB | float32") == ["silu/ptx"]
        assert journal.finished() == {"axpby | 1 KiB | float32"}

    def test_a_line_being_written_is_not_there_yet(self, tmp_path):
        journal = worker.Journal(tmp_path / "run.json")
        journal.append(worker.Entry("a", "b"))
        with journal.path.open("a") as file:
            file.write('{"unit": "c')
        assert [entry.unit for entry in journal.entries()] == ["a"]

    def test_options_travel(self):
        options = Options(ops=("silu",), size=(64, 128), deadline=float("inf"))
        assert worker.decoded(worker.encoded(options)) == options


class TestSupervisor:
    """The supervisor with a worker of our own, which hangs or dies where it is told to."""

    WORKER = """
import os, sys, time
from pathlib import Path
from mirage_hello.bench import run_file, worker
out = Path(sys.argv[3]); journal = worker.Journal(out); run = run_file.load(out)
assert sys.argv[1] == "ceilings+elementwise"
run["meta"]["ceilings"] = {}
run_file.write(run, out)
for unit in ("silu | a | float32", "silu | b | float32"):
    if unit in journal.finished(): continue
    for step in ("silu/good", "silu/bad"):
        if step in journal.lost(unit): continue
        journal.append(worker.Entry(unit, step, 0.5))
        if step == "silu/bad" and " a " in unit:
            ACTION
    journal.append(worker.Entry(unit, "", state="end"))
"""

    def supervise(self, tmp_path, monkeypatch, action, **kwargs):
        script = tmp_path / "worker.py"
        script.write_text(self.WORKER.replace("ACTION", action))
        popen = supervisor.subprocess.Popen

        def start(command, **options):
            return popen([command[0], str(script), *command[4:]], **options)

        monkeypatch.setattr(supervisor.subprocess, "Popen", start)
        out = tmp_path / "run.json"
        run = supervisor.run_groups(["elementwise"], Options(), out, commit="0", **kwargs)
        assert not worker.Journal(out).path.exists()
        return run

    @pytest.mark.parametrize(
        "action, says", [("time.sleep(60)", "no answer"), ("os._exit(3)", "exit code 3")]
    )
    def test_a_lost_kernel_costs_only_itself(self, tmp_path, monkeypatch, action, says):
        run = self.supervise(tmp_path, monkeypatch, action)
        assert [f["kernel"] for f in run["failures"]] == ["silu/bad"]
        assert says in run["failures"][0]["reason"]
        assert run["skipped"] == []

    def test_the_budget_ends_a_run_and_what_was_measured_stays(self, tmp_path, monkeypatch):
        monkeypatch.setattr(supervisor, "OVERTIME_SECONDS", 0.2)
        started = time.time()
        run = self.supervise(tmp_path, monkeypatch, "pass", budget_seconds=0.1)
        assert time.time() - started < 10
        assert "budget" in run["skipped"][0]["reason"]
        assert run_file.load(tmp_path / "run.json") == run
