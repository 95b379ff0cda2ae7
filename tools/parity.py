"""`mirage parity`: every kernel that runs here against the float64 reference, on small samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mirage_hello.tools import arguments, terminal
from mirage_hello.tools.errors import BadInput, unknown_name

if TYPE_CHECKING:
    import torch

    from mirage_hello.kernels import Kernel, Op

EXAMPLES = """\
  mirage parity                              every op, backend and dtype that runs here
  mirage parity --op silu --backend ptx-emulated
  mirage parity --dtype bf16 --device cuda --json > parity.json
  TRITON_INTERPRET=1 mirage parity --backend triton --device cpu    without a GPU

exit codes: 0 all passed, 1 a kernel failed, 2 bad input or nothing could run
"""
DTYPES = ("float32", "float16", "bfloat16")
Row = dict[str, Any]


def add_parser(subparsers: Any) -> None:
    parser = arguments.add_parser(
        subparsers, "parity", "compare every kernel with the float64 reference", EXAMPLES
    )
    parser.add_argument("--op", help="one op (default: all)")
    parser.add_argument("--backend", help="one backend (default: all that run on the device)")
    parser.add_argument("--dtype", help="fp32, fp16 or bf16 (default: all three)")
    parser.add_argument("--all", action="store_true", help="a line for each case, not the worst")
    arguments.add_device(parser)


def run(args: argparse.Namespace) -> int:
    result = measure(args.op, args.backend, arguments.device(args.device), args.dtype)
    if args.backend and not result["rows"]:
        reasons = {row["reason"] for row in result["refused"]}
        raise BadInput(
            f"--backend: {args.backend} cannot run on {result['device']}: "
            + ("; ".join(sorted(reasons)) or f"no {args.backend} kernel is registered")
        )
    if args.json:
        terminal.print_json(result)
    else:
        show(result, every_case=args.all)
    return 0 if result["passed"] else 1


def measure(
    op_name: str | None, backend: str | None, device: torch.device, dtype_name: str | None
) -> dict[str, Any]:
    """Run the comparison; None means all.

    Returns:
        {"device", "passed", "rows": [{"op", "kernel", "backend", "dtype", "case", "error",
        "allowed", "max_error", "max_allowed", "passed", "note"}],
        "refused": [{"op", "kernel", "backend", "dtype", "reason"}]}

    Raises:
        BadInput: an unknown op, backend or dtype.
    """
    from mirage_hello.kernels import backends, ops

    if op_name is not None and op_name not in ops:
        raise BadInput("--op: " + unknown_name("op", op_name, dir(ops)))
    if backend is not None and backend not in backends.BACKENDS:
        raise BadInput("--backend: " + unknown_name("backend", backend, backends.BACKENDS))
    names = DTYPES if dtype_name is None else (dtype_name,)
    dtypes = [arguments.dtype(name) for name in names]
    chosen = [getattr(ops, op_name)] if op_name else list(ops)
    work = [
        (op, kernel, dtype)
        for op in chosen
        for kernel in op.kernels
        if backend in (None, kernel.backend)
        for dtype in dtypes
    ]
    rows: list[Row] = []
    refused: list[Row] = []
    with terminal.progress_bar("kernels") as progress:
        task = progress.add_task("parity", total=len(work))
        for op, kernel, dtype in work:
            progress.update(task, description=kernel.name)
            _compare_samples(op, kernel, device, dtype, rows, refused)
            progress.advance(task)
    passed = all(row["passed"] for row in rows)
    return {"device": str(device), "passed": passed, "rows": rows, "refused": refused}


def _compare_samples(
    op: Op,
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    rows: list[Row],
    refused: list[Row],
) -> None:
    """Every sample that the kernel takes becomes a row; a kernel that takes none is refused."""
    from mirage_hello.kernels import parity

    named: Row = {
        "op": op.name,
        "kernel": kernel.name,
        "backend": kernel.backend,
        "dtype": str(dtype).removeprefix("torch."),
    }
    reason = None
    ran = False
    for positional, keywords in op.samples(device, dtype):
        call = op.describe(positional, keywords)
        reason = kernel.refuses(call)
        if reason:
            continue
        ran = True
        case = call.label.split(" ", 1)[-1]
        try:
            result = parity.compare(op.name, kernel, positional, keywords)
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            result = parity.Parity(float("inf"), 0.0, float("inf"), 0.0, f"{error}")
        rows.append({**named, "case": case, **vars(result), "passed": result.passed})
    if not ran:
        refused.append({**named, "reason": reason})


def show(result: dict[str, Any], every_case: bool) -> None:
    """The table for people: a line for each kernel and dtype (its worst case), or for each case."""
    from rich.markup import escape
    from rich.table import Table

    console = terminal.console()
    table = Table(box=None, pad_edge=False)
    for name in ("op", "backend", "dtype", "cases", "worst case"):
        table.add_column(name, no_wrap=name != "worst case")
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("result")
    for count, row in _lines(result["rows"], every_case):
        verdict = "[green]passed[/]" if row["passed"] else "[bold red]FAILED[/]"
        note = f" {row['note']}" if row["note"] else ""
        table.add_row(
            row["op"], row["backend"], row["dtype"], str(count), escape(row["case"]),
            f"{row['error']:.1e}", f"{row['allowed']:.1e}", verdict + escape(note),
        )  # fmt: skip
    console.print(table)
    for reason, names in _grouped(result["refused"], lambda row: row["reason"]):
        backends = sorted({row["backend"] for row in names})
        console.print(f"not run on {result['device']}: {', '.join(backends)}: {escape(reason)}")
    failed = sum(not row["passed"] for row in result["rows"])
    kernels = len({row["kernel"] for row in result["rows"]})
    verdict = f"[bold red]{failed} FAILED[/]" if failed else "[green]all passed[/]"
    console.print(f"{len(result['rows'])} comparisons of {kernels} kernels: {verdict}")


def _lines(rows: list[Row], every_case: bool) -> Iterator[tuple[int, Row]]:
    if every_case:
        yield from ((1, row) for row in rows)
        return
    for _, group in _grouped(rows, lambda row: (row["kernel"], row["dtype"])):
        # A failure first, then whatever comes nearest to what is allowed.
        worst = max(group, key=lambda r: (not r["passed"], r["error"] / max(r["allowed"], 1e-300)))
        yield len(group), worst


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> Iterator[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    yield from groups.items()
