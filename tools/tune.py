"""`mirage tune`: times the tiles of the kernels that have some, and keeps the best on disk."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mirage_hello.tools import arguments
from mirage_hello.tools.errors import BadInput, unknown_name

EXAMPLES = """\
  mirage tune                                        the benchmark's shapes of every op with tiles
  mirage tune --op conv2d --case "320->320 @64"      one shape
  mirage tune --model 880m --size 512x512            every shape that the model's step asks for
  mirage tune --model 880m --budget-seconds 120      what fits into 120 s; the rest keeps its tiles

Results go to the kernel cache ($MIRAGE_CACHE, or mirage-hello in the user's cache folder), where
every later process on this kind of card finds them. `mirage explain` shows what it takes and why.
exit codes: 0 done, 1 a kernel hung, crashed or raised, 2 bad input
"""


def add_parser(subparsers: Any) -> None:
    parser = arguments.add_parser(
        subparsers, "tune", "time the tiles of kernels on this card, and keep the best", EXAMPLES
    )
    add = parser.add_argument
    add("--op", action="append", default=[], help="only this op (repeat for more)")
    add("--case", action="append", default=[], help="only this case of the benchmark")
    add("--model", metavar="PRESET", help="the shapes of this model in place of the benchmark's")
    add("--size", default="512x512", help="WIDTHxHEIGHT of the model's frames (default: 512x512)")
    add("--count", type=int, default=8, help="candidates timed of each shape (default: 8)")
    add(
        "--budget-seconds",
        type=arguments.seconds,
        help="begin nothing new after this; keep the rest",
    )
    add("--out", type=Path, help="keep every time in this .json file as well")
    add("--ship", action="store_true", help="write kernels/choices/<card>-tiles.json, which ships")
    add("--commit", help="what to record where the sources are not a git checkout")


def run(args: argparse.Namespace) -> int:
    """Measure, keep each result in the card's file as it comes, say where it is.

    Returns:
        0 done; 1 something hung, crashed or raised.

    Raises:
        BadInput: no GPU, an unknown name, a file that cannot be written.
    """
    import torch

    from mirage_hello.bench import supervisor
    from mirage_hello.bench.worker import MODEL_TILES
    from mirage_hello.kernels import tuning

    if not torch.cuda.is_available():
        raise BadInput("there is no CUDA device here, and tiles are those of a card")
    options = _options(args)
    groups = [MODEL_TILES] if args.model else _groups(options)
    card = torch.cuda.get_device_name()
    path = tuning.shipped_path(card) if args.ship else tuning.user_path(card)
    try:
        tuning.save(card, args.commit or "", {}, path)  # before anything is measured
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error}); choose another $MIRAGE_CACHE") from error
    options = dataclasses.replace(options, save=str(path))
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch, "tiles.json")
        try:
            measured = supervisor.run_groups(
                groups, options, out, args.budget_seconds, args.commit, to_stderr=args.json
            )
        except OSError as error:
            raise BadInput(f"cannot write {out} ({error}); choose another --out") from error
    results = measured.get("tiles", [])
    failures = measured["failures"]
    if args.json:
        print(json.dumps({"card": card, "path": str(path), "tiles": results, "failed": failures}))
    else:
        print(f"\n{len(results)} shapes, {len(failures)} failures -> {path}", file=sys.stderr)
    return 1 if failures else 0


def _options(args: argparse.Namespace) -> Any:
    from mirage_hello.bench.rows import Options
    from mirage_hello.bench.worker import CASES
    from mirage_hello.model import PRESETS

    if args.count < 1:
        raise BadInput(f"--count: at least one candidate (got {args.count})")
    if args.model and (args.op or args.case):
        raise BadInput("--model: its own calls say which ops and shapes; leave --op and --case out")
    if args.model and args.model not in PRESETS:
        raise BadInput("--model: " + unknown_name("preset", args.model, PRESETS))
    cases = [case for full, _ in CASES.values() for case in full]
    for op in args.op:
        if op not in {case.op for case in cases}:
            raise BadInput("--op: " + unknown_name("op", op, {case.op for case in cases}))
    for name in args.case:
        if name not in {case.name for case in cases}:
            raise BadInput("--case: " + unknown_name("case", name, {case.name for case in cases}))
    size = arguments.size(args.size)
    return Options(
        device="cuda",
        ops=tuple(args.op),
        cases=tuple(args.case),
        preset=args.model or "880m",
        size=size[::-1] if size else (512, 512),
        tiles=args.count,
    )


def _groups(options: Any) -> list[str]:
    """Groups with a case of an op that has tiles."""
    from mirage_hello.bench.rows import op_named
    from mirage_hello.bench.worker import CASES, cases
    from mirage_hello.kernels import tuning

    def tiled(op: str) -> bool:
        return any(tuning.has_tiles(kernel.run) for kernel in op_named(op).kernels)

    groups = [g for g in CASES if any(tiled(case.op) for case, _ in cases(options, g))]
    if not groups:
        raise BadInput(f"none of {', '.join(options.ops + options.cases)} has kernels with tiles")
    return groups
