"""`mirage bench` and `mirage report`: arguments, pages, plots, README tables, bad input."""

import argparse
import json
import re

import pytest

from mirage_hello.bench import run_file, worker
from mirage_hello.tools import bench, report, report_rows, report_tables
from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.report_rows import best_rows, geometric_mean, newest_rows


def a_row(op="silu", case="64 KiB", backend="ptx", p50=10.0, **changes):
    whole = {
        "op": op,
        "case": case,
        "dtype": "float32",
        "backend": backend,
        "time_us": {"p10": 0.9 * p50, "p50": p50, "p90": 1.1 * p50},
        "tflops": 0.1,
        "gbps": 100.0,
        "fraction_of_ceiling": 0.5,
        "peers": {"torch-eager": 30.0, "torch-compile": 20.0, "copy": 5.0},
        "parity": {"error": 1e-8, "allowed": 1e-7},
        "kernel": f"{op}/{backend}",
        "cache": "hot",
        "flops": 10_000,
        "bytes": 8_000,
    }
    return whole | changes


def a_frame():
    times = {"p50": 9000.0, "p95": 9500.0, "p99": 9900.0, "peak_bytes": 2**32, "frames": 1000}
    return a_row(
        "frame",
        "880m 512x512 1 step",
        "auto",
        4000.0,
        peers={"cuda-graph": 9000.0},
        frame_us={"p50": 4000.0, "p95": 4100.0, "p99": 4300.0, "frames": 1000},
        peer_frames={"cuda-graph": times},
        tflops=None,
        gbps=None,
        fraction_of_ceiling=None,
        flops=None,
    )


def a_run(*rows, gpu="NVIDIA H200", date="2026-11-22T12:00:00+00:00", commit="0123456"):
    run = run_file.new_run("cpu", commit)
    run["meta"] |= {"gpu": gpu, "date": date, "cuda": "13.0", "driver": "580.1"}
    run["meta"]["ceilings"] = {
        "copy_gbps": 4000.0,
        "matrix_tflops": {"bfloat16": 700.0, "float32": 50.0},
        "launch_us": 0.9,
    }
    run["rows"] = list(rows)
    return run


def parsed(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    return parser.parse_args([module.__name__.split(".")[-1], *arguments])


def draw(folder, *arguments):
    return report.run(parsed(report, "--results", str(folder), *arguments))


class TestRows:
    def test_the_newest_of_each_row_with_its_commit(self):
        old, new = a_run(a_row(p50=10.0)), a_run(a_row(p50=5.0), commit="89abcde")
        rows = newest_rows([old, new])
        assert [(r["time_us"]["p50"], r["run"]["commit"]) for r in rows] == [(5.0, "89abcde")]

    def test_torch_stands_for_us_only_where_nothing_else_ran(self):
        rows = [a_row(backend="torch", p50=1.0), a_row(p50=10.0), a_row("axpby", backend="torch")]
        assert [row["backend"] for row in best_rows(rows)] == ["ptx", "torch"]

    def test_sizes_are_in_the_order_of_their_bytes(self):
        cases = ["1 MiB", "64 KiB", "1024 MiB", "1 KiB"]
        rows = newest_rows([a_run(*(a_row(case=case) for case in cases))])
        assert [row["case"] for row in rows] == ["1 KiB", "64 KiB", "1 MiB", "1024 MiB"]

    def test_geometric_mean(self):
        assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
        assert geometric_mean([]) == 0.0


class TestPage:
    @pytest.fixture
    def folder(self, tmp_path):
        rows = (a_row(), a_row(case="1 MiB", p50=40.0), a_row(cache="cold"), a_frame())
        run_file.write(a_run(*rows), tmp_path / "in" / "nvidia-h200" / "run.json")
        return tmp_path / "in"

    def test_everything_is_in_one_file(self, folder, tmp_path, capsys):
        assert draw(folder, "--out", str(tmp_path / "out"), "--json") == 0
        written = json.loads(capsys.readouterr().out)
        text = (tmp_path / "out" / "index.html").read_text()
        assert written["page"].endswith("index.html") and len(written["plots"]) == 4
        for said in ("NVIDIA H200", "0123456", "2026-11-22", "580.1", "2.00x", "cold", "GiB"):
            assert said in text
        assert text.count("<svg") == 4 and "prefers-color-scheme: dark" in text
        # Namespaces of SVG are names, not addresses; nothing may be fetched.
        fetched = re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", re.sub(r"xmlns\S+", "", text))
        assert fetched == []

    def test_plots_are_png_and_svg(self, folder, tmp_path):
        draw(folder, "--out", str(tmp_path / "out"))
        names = {path.name for path in (tmp_path / "out").iterdir()}
        for name in ("speedup", "speedup-silu", "roofline", "frame"):
            assert {f"{name}.png", f"{name}.svg"} <= names
        assert (tmp_path / "out" / "frame.png").read_bytes()[:4] == b"\x89PNG"

    def test_a_cpu_run_says_so(self, tmp_path):
        run = a_run(a_row(backend="numba"), gpu="CPU x")
        run["meta"]["cuda"] = "none"
        run_file.write(run, tmp_path / "in" / "run.json")
        assert draw(tmp_path / "in", "--out", str(tmp_path / "out")) == 0
        assert "Measured on a CPU" in (tmp_path / "out" / "index.html").read_text()

    def test_rows_without_peers_or_failures_alone_are_drawn(self, tmp_path):
        run = a_run(a_row(peers={}))
        run["failures"] = [
            {"op": "silu", "case": "<b>", "dtype": "float32", "kernel": "silu/x", "reason": "wrong"}
        ]
        run_file.write(run, tmp_path / "in" / "run.json")
        assert draw(tmp_path / "in", "--out", str(tmp_path / "out")) == 0
        text = (tmp_path / "out" / "index.html").read_text()
        assert "wrong" in text and "&lt;b&gt;" in text and "<b>" not in text.split("<h2>How")[0]

    def test_a_corrupt_file_is_left_out_and_named(self, folder, tmp_path, capsys):
        (folder / "broken.json").write_text("{")
        assert draw(folder, "--out", str(tmp_path / "out")) == 1
        assert "broken.json" in capsys.readouterr().err
        assert "broken.json" in (tmp_path / "out" / "index.html").read_text()


class TestBadInputOfReport:
    def test_no_results(self, tmp_path):
        with pytest.raises(BadInput, match="mirage bench"):
            draw(tmp_path, "--out", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_a_path_that_is_not_there(self, tmp_path):
        with pytest.raises(BadInput, match="does not exist"):
            draw(tmp_path / "nothing")

    def test_a_readme_that_is_not_there(self, tmp_path):
        run_file.write(a_run(a_row()), tmp_path / "run.json")
        with pytest.raises(BadInput, match="cannot read"):
            draw(tmp_path, "--readme", str(tmp_path / "README.md"), "--out", str(tmp_path / "o"))


class TestReadme:
    TEXT = (
        "a\n<!-- bench:silu -->\nold\n<!-- /bench -->\nb\n<!-- bench:machine -->\n<!-- /bench -->\n"
    )

    def test_tables_stand_between_the_markers(self):
        text = report.fill(self.TEXT, [a_run(a_row())])
        assert "old" not in text and text.startswith("a\n") and "\nb\n" in text
        assert "| 64 KiB fp32 | ptx | 10.0 us | 30.0 us | 20.0 us | 2.00x | 50 % |" in text
        assert "NVIDIA H200, driver 580.1" in text

    def test_filling_twice_changes_nothing(self):
        once = report.fill(self.TEXT, [a_run(a_row())])
        assert report.fill(once, [a_run(a_row())]) == once

    def test_an_unknown_table_names_the_nearest(self):
        with pytest.raises(BadInput, match="did you mean silu"):
            report.fill(self.TEXT.replace("bench:silu", "bench:silo"), [a_run(a_row())])

    def test_a_cpu_never_fills_a_table(self):
        run = a_run(a_row())
        run["meta"]["cuda"] = "none"
        assert "Not measured on a GPU yet" in report.fill(self.TEXT, [run])

    def test_a_gpu_comes_before_a_newer_cpu_run(self):
        cpu = a_run(a_row(p50=1.0), gpu="CPU x", date="2027-01-01T00:00:00+00:00")
        cpu["meta"]["cuda"] = "none"
        assert "10.0 us" in report.fill(self.TEXT, [a_run(a_row()), cpu])

    def test_frame_and_summary_tables(self):
        text = "<!-- bench:frame -->\n<!-- /bench -->\n<!-- bench:summary -->\n<!-- /bench -->\n"
        filled = report.fill(text, [a_run(a_row(), a_frame())])
        assert "| 880m 512x512 1 step | ours | 4.00 ms | 4.10 ms | 4.30 ms | 250.0 |" in filled
        assert "| silu | 1 | ptx | 2.00x |" in filled

    def test_hot_and_cold_side_by_side(self):
        cold = a_row(p50=16.0, cache="cold-weights", peers={"torch-eager": 48.0})
        text = "<!-- bench:silu/cold -->\n<!-- /bench -->\n"
        filled = report.fill(text, [a_run(a_row(), cold, a_row(p50=99.0, cache="cold"))])
        assert (
            "| 64 KiB fp32 | 30.0 us | 20.0 us | 10.0 us | 2.00x | 48.0 us |  | 16.0 us |" in filled
        )
        assert "ours, cold weights" in filled and "hot and cold, commit" in filled
        assert "| geometric mean |  |  |  | 2.00x |  |  |  | 3.00x |  |  |" in filled

    def test_a_kernel_a_column(self):
        rows = (a_row(), a_row(p50=12.0, backend="cuda"), a_row(case="1 MiB", p50=40.0))
        filled = report.fill("<!-- bench:silu/kernels -->\n<!-- /bench -->\n", [a_run(*rows)])
        assert "| case | best peer | ptx | cuda |" in filled
        assert "| 64 KiB fp32 | 20.0 us | 10.0 us | 12.0 us |" in filled
        assert "| 1 MiB fp32 | 20.0 us | 40.0 us |  |" in filled

    def test_an_unknown_kind_of_table(self):
        text = "<!-- bench:silu/warm -->\n<!-- /bench -->\n"
        with pytest.raises(BadInput, match="silu/warm"):
            report.fill(text, [a_run(a_row())])

    def test_parity_table_puts_the_closest_first(self):
        rows = [a_row(), a_row("axpby", parity={"error": 9e-8, "allowed": 1e-7})]
        assert [line[0] for line in report_tables.parity(rows, []).rows] == ["axpby", "silu"]

    def test_time_text(self):
        assert [report_rows.time_text(t) for t in (0.8512, 12.34, 4530.0, 2.5e6)] == [
            "0.851 us", "12.3 us", "4.53 ms", "2.50 s",
        ]  # fmt: skip


class TestBench:
    @pytest.mark.parametrize(
        "arguments, says",
        [
            (["--op", "silo"], "did you mean silu"),
            (["--case", "65 KiB"], "unknown case"),
            (["--device", "cpu", "--op", "silu", "--case", "1024 MiB"], "no case matches"),
            (["--dtype", "fp8"], "unknown dtype"),
            (["--backend", "pxt"], "did you mean ptx"),
            (["--backend", "ptx", "--device", "cpu"], "mirage env"),
            (["--peers", "cudn"], "did you mean cudnn"),
            (["--device", "cpu", "--cold"], "--cold"),
            (["--device", "cpu", "--size", "100x100"], "multiples of 8"),
            (["--device", "cpu", "--size", "big"], "WIDTHxHEIGHT"),
            (["--device", "cpu", "--steps", "0"], "--steps"),
            (["--device", "cpu", "--frames", "3"], "at least 10"),
            (["--device", "cpu", "--clip", "nothing.mp4"], "not a file"),
            (["--device", "cpu", "--clip", __file__], "no video that FFmpeg reads"),
            (["--device", "cpu", "--out", "x.csv"], ".json"),
            (["--device", "cpu", "--op", "silu", "--case", "h2 256x256 d40"], "unknown case"),
        ],
    )
    def test_bad_input_is_one_sentence(self, arguments, says):
        with pytest.raises(BadInput, match=says) as error:
            bench.run(parsed(bench, *arguments))
        assert "\n" not in str(error.value)

    def test_what_an_option_selects(self):
        def groups(*arguments):
            return bench._groups(bench._options(parsed(bench, "--device", "cpu", *arguments)))

        assert groups("--op", "silu") == ["elementwise"]
        assert groups("--op", "frame") == ["frame"]
        assert groups("--dtype", "bf16", "--op", "linear") == ["linear"]
        gone = ("ceilings", "eight bit")  # which a CPU only emulates
        assert groups() == [g for g in worker.GROUPS if g not in gone]

    def test_a_run_on_the_cpu(self, tmp_path, capfd):
        out = tmp_path / "run.json"
        arguments = ("--device", "cpu", "--op", "residual_add", "--quick", "--out", str(out))
        code = bench.run(parsed(bench, *arguments, "--case", "64 KiB", "--json"))
        printed = json.loads(capfd.readouterr().out)
        run = run_file.load(out)
        assert code == 0 and printed == run and run["failures"] == []
        assert {row["op"] for row in run["rows"]} == {"residual_add"}
        assert run["meta"]["ceilings"]["copy_gbps"] > 0
        row = run["rows"][0]
        assert row["parity"]["error"] <= row["parity"]["allowed"] and row["peers"]["copy"] > 0
        assert len(row["samples_us"]) == 10

    def test_an_unwritable_place(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="cannot write"):
            bench.run(parsed(bench, "--device", "cpu", "--out", str(tmp_path / "file" / "x.json")))
