"""`mirage bench`: times kernels against peers and the measured ceilings, into one JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from mirage_hello.bench import choices, run_file
from mirage_hello.bench.case import PEERS
from mirage_hello.bench.clip import read_clip
from mirage_hello.bench.rows import Options
from mirage_hello.bench.supervisor import run_groups
from mirage_hello.bench.worker import CASES, GROUPS, MODEL_OPS, cases
from mirage_hello.kernels import backends
from mirage_hello.model import PRESETS
from mirage_hello.tools.arguments import seconds
from mirage_hello.tools.errors import BadInput, unknown_name

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
EPILOG = """\
examples:
  mirage bench --quick                              a few cases of everything
  mirage bench --op silu --op axpby                 two ops, all sizes
  mirage bench --op attention --case "h8 4096x4096 d40" --backend ptx --cold
  mirage bench --op frame --clip clip.mp4 --frames 1000 --preset 880m
  mirage bench --budget-seconds 500 --out run.json  what fits into 500 s; partial results are kept
  mirage bench --save-choices                       `auto` follows the times measured here
  mirage report                                     then draw it

On a machine without a GPU small versions of the cases are measured, and the results say so.
exit codes: 0 done, 1 a kernel failed parity (it is not timed), 2 bad input
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `bench` to the `mirage` command."""
    parser = subparsers.add_parser(
        "bench",
        help="time kernels against PyTorch and the measured ceilings",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--op", action="append", default=[], help="only this op (repeat for more)")
    add("--case", action="append", default=[], help="only this case, by its name")
    add("--backend", action="append", default=[], help="only this backend")
    add("--dtype", action="append", default=[], help="fp32, fp16 or bf16 in place of the usual")
    add("--peers", default="all", help="comma-separated, or all, or none (default: all)")
    add("--quick", action="store_true", help="a few cases of each op, fewer samples")
    add("--cold", action="store_true", help="also with the L2 flushed, and with rotating weights")
    add("--out", type=Path, help="file or folder (default: bench/results/<gpu>/<date>-<commit>)")
    add("--budget-seconds", type=seconds, help="begin nothing new after this; keep the rest")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--preset", help="model of unet_step and frame (default: 880m on a GPU, else tiny)")
    add("--size", help="WIDTHxHEIGHT of the model's frames (default: 512x512; CPU 64x64)")
    add("--steps", default="1,4", help="denoising steps of the frame rows (default: 1,4)")
    add("--frames", type=int, help="frames of each frame row (default: 1000; quick or CPU: 30)")
    add("--clip", type=Path, help="the video whose frames are pushed (default: the shipped clip)")
    add("--compile-seconds", type=seconds, default=240.0, help="most that torch.compile may take")
    add("--commit", help="what to record where the sources are not a git checkout")
    add("--no-warm", action="store_true", help="do not compile first, in several processes")
    add("--save-choices", action="store_true", help="let `auto` follow these times on this GPU")
    add("--json", action="store_true", help="print the run as JSON; progress goes to stderr")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, write the results, print where they are.

    Returns:
        0 done; 1 a kernel failed parity, hung or crashed.

    Raises:
        BadInput: an unknown name, a backend that cannot run here, a path that cannot be written.
    """
    options = _options(args)
    groups = _groups(options)
    if not groups:
        asked = ", ".join(filter(None, (*options.ops, *options.cases)))
        raise BadInput(f"no case matches {asked}; `mirage bench --help` shows the filters")
    out = _out(args, options)
    if options.device == "cpu":
        print("no GPU: small versions of the cases, on the CPU", file=sys.stderr)
    try:
        measured = run_groups(groups, options, out, args.budget_seconds, args.commit, args.json)
    except OSError as error:
        raise BadInput(f"cannot write {out} ({error}); choose another --out") from error
    if args.save_choices:
        print(f"choices: {choices.save(measured)}", file=sys.stderr)
    if args.json:
        print(json.dumps(measured))
    else:
        _print_end(measured, out)
    return 1 if measured["failures"] else 0


def _options(args: argparse.Namespace) -> Options:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device; leave --device out")
    if device == "cpu" and args.cold:
        raise BadInput("--cold flushes a GPU's L2 and there is no GPU here; leave --cold out")
    wanted_ops = _known("op", args.op, [case.op for case in _all_cases()] + [*MODEL_OPS])
    of_ops = [case.name for case in _all_cases() if not wanted_ops or case.op in wanted_ops]
    on_gpu, short = device == "cuda", args.quick or device == "cpu"
    (preset,) = _known("preset", [args.preset or ("880m" if on_gpu else "tiny")], [*PRESETS])
    size = _size(args.size or ("512x512" if on_gpu else "64x64"))
    return Options(
        device=device,
        ops=wanted_ops,
        cases=_known("case", args.case, of_ops),
        backends=tuple(_backend(name, device) for name in args.backend),
        dtypes=_known("dtype", [DTYPES.get(d, d) for d in args.dtype], [*DTYPES.values()]),
        peers=_peers(args.peers, device),
        quick=args.quick,
        cold=args.cold,
        preset=preset,
        size=size,
        steps=_steps(args.steps),
        frames=_frames(args.frames if args.frames is not None else 30 if short else 1000),
        clip=_clip(args.clip, size),
        compile_seconds=args.compile_seconds,
        warm=on_gpu and not args.no_warm,
    )


def _all_cases() -> list:
    return [case for full, small in CASES.values() for case in (*full, *small)]


def _known(kind: str, names: list[str], known: list[str]) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise BadInput(unknown_name(kind, name, set(known)))
    return tuple(names)


def _backend(name: str, device: str) -> str:
    _known("backend", [name], [*backends.BACKENDS, "auto"])
    reason = backends.unavailable(name, device) if name != "auto" else None
    if reason:
        raise BadInput(f"--backend {name}: {reason}; `mirage env` lists what works here")
    return name


def _peers(text: str, device: str) -> tuple[str, ...]:
    # Compiling takes minutes on two cores: on a CPU torch-compile must be asked for.
    usual = PEERS if device == "cuda" else ("torch-eager", "copy")
    if text in ("all", "none"):
        return usual if text == "all" else ()
    return _known("peer", [name.strip() for name in text.split(",")], list(PEERS))


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.split("x"))
    except ValueError:
        raise BadInput(f"--size: expected WIDTHxHEIGHT, such as 768x432 (got {text!r})") from None
    if min(height, width) < 64 or height % 8 or width % 8:
        raise BadInput(f"--size: both must be multiples of 8 and at least 64 (got {text})")
    return height, width


def _steps(text: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        steps = ()
    if not steps or min(steps) < 1:
        raise BadInput(f"--steps: expected whole numbers from 1, such as 1,4 (got {text!r})")
    return steps


def _frames(count: int) -> int:
    if count < 10:
        raise BadInput(f"--frames: at least 10 are needed for percentiles (got {count})")
    return count


def _clip(path: Path | None, size: tuple[int, int]) -> str:
    """The clip's path, after its first frame was read: the worker reads it minutes later."""
    if path is None:
        return ""
    if not path.is_file():
        raise BadInput(f"--clip: {path} is not a file; give a video, or leave --clip out")
    try:
        read_clip(Options(clip=str(path), size=size, frames=1))
    except ValueError as error:
        raise BadInput(f"--clip: {error}") from error
    return str(path.resolve())


def _groups(options: Options) -> list[str]:
    """Groups with something to measure; the model's only where no case or dtype narrows the run."""
    groups = [g for g in CASES if next(cases(options, g), None) is not None]
    narrowed = options.cases or options.dtypes or options.backends
    for name in MODEL_OPS:
        if name in options.ops or not (options.ops or narrowed):
            groups.append(name)
    return [g for g in GROUPS if g in groups]


def _out(args: argparse.Namespace, options: Options) -> Path:
    meta = run_file.new_run(options.device, args.commit)["meta"]
    if args.out is None:
        return run_file.default_path(meta)
    if args.out.is_dir() or not args.out.suffix:
        return run_file.default_path(meta, args.out)
    if args.out.suffix != ".json":
        raise BadInput(f"--out: expected a folder or a .json file (got {args.out})")
    return args.out


def _print_end(measured: run_file.Run, out: Path) -> None:
    rows, failures = len(measured["rows"]), len(measured["failures"])
    print(f"\n{rows} rows, {failures} failures, {len(measured['skipped'])} left out -> {out}")
    print("draw them: mirage report")
