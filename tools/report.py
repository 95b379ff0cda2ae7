"""`mirage report`: plots, tables and one HTML page from benchmark results; README tables too."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mirage_hello.bench import run_file
from mirage_hello.tools import report_tables
from mirage_hello.tools.errors import BadInput, unknown_name
from mirage_hello.tools.report_page import by_machine, on_cpu, write_page
from mirage_hello.tools.report_rows import Row, newest_rows

EPILOG = """\
examples:
  mirage report                              draw bench/results into report/
  mirage report --results run.json --out r   one file
  mirage report --readme README.md           also fill the tables between its markers:
                                               <!-- bench:attention -->
                                               ...
                                               <!-- /bench -->
                                             a name is an op (hot), OP/cold (hot and cold),
                                             OP/kernels (each of ours), machine, summary or frame

exit codes: 0 done, 1 a results file was left out (said on stderr), 2 bad input
"""
MARKED = re.compile(r"(<!-- bench:(?P<name>[\w/-]+) -->\n)(?P<old>.*?)(<!-- /bench -->)", re.DOTALL)

# What follows an op in the name of a marker
TABLES = {
    "": report_tables.speed_of_op,
    "cold": report_tables.hot_and_cold,
    "kernels": report_tables.kernels_of_op,
}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `report` to the `mirage` command."""
    parser = subparsers.add_parser(
        "report",
        help="plots, tables and an HTML page from results",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, action="append", help="file or folder (default: bench/results)")
    add("--out", type=Path, default=Path("report"), help="folder of the page (default: report)")
    add("--readme", type=Path, action="append", default=[], help="Markdown file to fill in")
    add("--json", action="store_true", help="print what was written, as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw the results.

    Returns:
        0 done; 1 some results file was left out.

    Raises:
        BadInput: no usable results, a marker of an unknown name, a path that cannot be written.
    """
    runs, problems = _load(args.results or [run_file.FOLDER])
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        where = ", ".join(map(str, args.results or [run_file.FOLDER]))
        raise BadInput(f"no benchmark results in {where}; run `mirage bench` first")
    filled = {path: fill(_read(path), runs, path) for path in args.readme}
    try:
        page = write_page(runs, problems, args.out)
        for path, text in filled.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {error.filename or args.out} ({error.strerror})") from error
    written = {"page": str(page), "readme": [str(path) for path in filled], "left_out": problems}
    plots = sorted(str(path) for path in args.out.glob("*.png"))
    print(json.dumps(written | {"plots": plots}) if args.json else f"report: {page}")
    return 1 if problems else 0


def _load(paths: Sequence[Path]) -> tuple[list[run_file.Run], list[str]]:
    runs: list[run_file.Run] = []
    problems: list[str] = []
    for path in paths:
        if path.is_dir():
            found, bad = run_file.load_folder(path)
            runs, problems = runs + found, problems + bad
        elif path.exists():
            try:
                runs.append(run_file.load(path))
            except run_file.BadResults as error:
                problems.append(str(error))
        else:
            raise BadInput(f"--results: {path} does not exist; give a file or a folder")
    return sorted(runs, key=lambda run: run["meta"]["date"]), problems


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--readme: cannot read {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"--readme: {path} is not text ({error}); give a Markdown file") from error


def fill(text: str, runs: Sequence[run_file.Run], path: Path | str = "README.md") -> str:
    """The text with the tables between its markers replaced by those of the newest GPU.

    Args:
        text: Markdown with `<!-- bench:NAME -->` ... `<!-- /bench -->`; NAME is an op of the
            results, also with `/cold` or `/kernels` behind it, `machine`, `summary` or `frame`.
        runs: at least one, oldest first.
        path: named in errors.

    Raises:
        BadInput: a NAME that the results do not have.
    """
    machine = by_machine(runs)[0]
    rows = newest_rows(machine)

    def replaced(match: re.Match[str]) -> str:
        body = _table(match["name"], rows, machine, path)
        return f"{match[1]}{body}\n{match[4]}"

    return MARKED.sub(replaced, text)


def _table(
    name: str, rows: Sequence[Row], machine: Sequence[run_file.Run], path: Path | str
) -> str:
    if on_cpu(machine):
        return "Not measured on a GPU yet: `mirage bench` on one, then `mirage report --readme`.\n"
    line = f"{report_tables.machine(machine[-1])}."
    op, _, kind = name.partition("/")
    if name == "machine":
        return f"{line}\n"
    if name == "summary":
        table = report_tables.summary(rows)
    elif name == "frame":
        table = report_tables.frames(rows)
    elif any(row["op"] == op for row in rows) and kind in TABLES:
        table = TABLES[kind](rows, op)
    else:
        known = {row["op"] for row in rows} | {"machine", "summary", "frame"}
        raise BadInput(f"{path}: {unknown_name('table of a bench marker', name, known)}")
    of_table = [row for row in rows if op in ("summary", row["op"])]
    commits = ", ".join(dict.fromkeys(row["run"]["commit"] for row in of_table))
    state = "hot and cold" if kind == "cold" else "hot"
    return f"{table.markdown()}\n\n*{machine[-1]['meta']['gpu']}, {state}, commit {commits}.*\n"
