"""`mirage eval`: closed-loop quality over thousands of frames against rendered truth."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_hello.tools import eval_page
from mirage_hello.tools.arguments import add_device
from mirage_hello.tools.arguments import add_parser as add
from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.eval_join import bring_pictures, join
from mirage_hello.tools.eval_requirements import TEACHER_FRAMES, requirements, unmeasured

if TYPE_CHECKING:
    import torch

    from mirage_hello.model.evaluation import Candidate, EvalConfig

EXAMPLES = """\
  mirage eval                                               the shipped model, 1000 frames
  mirage eval --checkpoint run/model.safetensors --steps 1 2 8
  mirage eval --frames 5000 --seeds 8 --device cuda
  mirage eval --ablation no-augmentation=ablation/model.safetensors
  mirage eval --only 1-step no-history --name part          some of the candidates
  mirage eval --join part.json other.json --name all        candidates that ran apart, as one
  mirage eval --page bench/results/eval/tiny.json           plots and a page from results
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add(subparsers, "eval", "measure drift, flicker and memory in closed loop", EXAMPLES)
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped model")
    parser.add_argument("--teacher", type=Path, help="its teacher, measured at --teacher-steps")
    parser.add_argument("--teacher-steps", type=int, default=8)
    parser.add_argument(
        "--ablation", nargs="+", default=[], metavar="NAME=FILE", help="models that should fail"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="evaluations a frame")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=8, help="held-out clips of each style")
    parser.add_argument("--styles", nargs="+", help="default: all")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--supersample", type=int, default=2, help="rays a pixel and axis")
    parser.add_argument("--every", type=int, default=4, help="measure each so many frames")
    parser.add_argument("--burn-in", type=int, default=100, help="frames before the fits begin")
    parser.add_argument("--cut-frames", type=int, default=600, help="frames of the run with cuts")
    parser.add_argument("--history-noise", type=float, default=0.02, help="sigma on the memory")
    parser.add_argument(
        "--noise-correlation", type=float, default=0.5, help="of neighbouring frames' start noise"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="end the long run by then")
    parser.add_argument("--short", action="store_true", help="the long run alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these candidates alone")
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="JSON", help="put results together, and stop"
    )
    parser.add_argument("--name", default="tiny", help="of the results")
    parser.add_argument("--out", type=Path, default=Path("bench/results/eval"))
    parser.add_argument("--page", type=Path, help="make plots and a page from this JSON, and stop")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate; 0 when every requirement holds, 1 when one does not."""
    if args.page:
        print(eval_page.write(args.page))
        return 0
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out: {args.out} is a file; name a folder")
    if min(args.steps) < 1 or args.teacher_steps < 1:
        steps = f"{' '.join(map(str, args.steps))} and {args.teacher_steps}"
        raise BadInput(f"--steps, --teacher-steps: at least 1 (got {steps})")
    try:
        result = join(args.join, args.name) if args.join else evaluate(args)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    result["requirements"] = requirements(result)
    result["not_measured"] = unmeasured(result)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    bring_pictures(args.join or [], args.out)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{path}; `mirage eval --page {path}` makes the plots")
        for item in result["requirements"]:
            print(f"  {'pass' if item['passed'] else 'FAIL'}  {item['text']}: {item['value']}")
        if result["not_measured"]:
            print(f"  not measured: {', '.join(result['not_measured'])}")
    return 0 if all(item["passed"] for item in result["requirements"]) else 1


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All the candidates that the arguments name, in the JSON schema of docs/evaluation.md."""
    from mirage_hello.kernels import use
    from mirage_hello.model import evaluation as ev
    from mirage_hello.model.data.styles import STYLES
    from mirage_hello.tools import arguments
    from mirage_hello.tools.eval_strips import Strips

    device = arguments.device(args.device)
    config = ev.EvalConfig(
        frames=args.frames, seeds=args.seeds, styles=tuple(args.styles or STYLES), size=args.size,
        supersample=args.supersample, every=args.every, cut_run=args.cut_frames,
        history_noise=args.history_noise, seconds=args.seconds,
        noise_correlation=args.noise_correlation,
        burn_in=min(args.burn_in, max(0, args.frames) // 4),
    )  # fmt: skip
    known = candidates(args, device)
    chosen = only(known, args.only)
    without = replace(known[0][1], steps=args.steps[-1], remember=False)
    evaluation = ev.Evaluation(config, device, without)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    began = time.time()
    result = about(args, config, device)
    strips = {c.name: Strips(config, args.out / f"{args.name}-{c.name}") for _, c in chosen}

    def keep(name: str, *frame) -> None:
        strips[name].keep(*frame)

    def keep_cuts(name: str, *frame) -> None:
        strips[name].keep_cuts(*frame)

    # Many streams of a small model: what the kernels are made for is one stream of a frame.
    with use("torch"), ended_by_sigterm(evaluation):
        numbers = ev.evaluate([c for _, c in chosen], evaluation, keep, say, keep_cuts)
    for (group, candidate), found in zip(chosen, numbers, strict=True):
        result[group][candidate.name] = found | {"strips": strips[candidate.name].write()}
    result["seconds"] = round(time.time() - began)
    return result


def about(args: argparse.Namespace, config: EvalConfig, device: torch.device) -> dict[str, Any]:
    """A result without candidates: what was run, and where."""
    import torch

    return {
        "format": eval_page.FORMAT, "name": args.name, "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "size": args.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "styles": list(config.styles), "seeds": args.seeds,
        "settings": {
            "frames": args.frames, "supersample": args.supersample, "every": args.every,
            "burn_in": config.burn_in, "cut_run": args.cut_frames,
            "history_noise": args.history_noise, "noise_correlation": args.noise_correlation,
        },
        "models": {}, "ablations": {},
    }  # fmt: skip


@contextlib.contextmanager
def ended_by_sigterm(evaluation: Any) -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the long run: what was measured is still written."""

    def stop(*_: object) -> None:
        evaluation.stopped = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def candidates(args: argparse.Namespace, device) -> list[tuple[str, Candidate]]:
    """(group, Candidate) in the order of the results."""
    import torch

    from mirage_hello.model import shipped
    from mirage_hello.model.checkpoint import load
    from mirage_hello.model.evaluation import Candidate

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as at run time
    networks = load(args.checkpoint or shipped.path("tiny"), dtype, device)
    short, most = args.short, min(args.frames, TEACHER_FRAMES)
    found = [("models", Candidate(f"{n}-step", *networks, n, short=short)) for n in args.steps]
    if args.teacher:
        teachers, many = load(args.teacher, dtype, device), args.teacher_steps
        # Eight times the work of a frame: its long run is shorter.
        teacher = Candidate(f"teacher-{many}-step", *teachers, many, short=short, frames=most)
        found.append(("models", teacher))
    # The ablations are compared with the model at the last of --steps.
    files = {"no-history": ""} | dict(ablation(item) for item in args.ablation)
    for name, path in files.items():
        these = load(Path(path), dtype, device) if path else networks
        other = Candidate(name, *these, args.steps[-1], name != "no-history", most, short)
        if other.remember:
            other.history_noise = 0.0  # trained without: it runs without
        found.append(("ablations", other))
    return found


def only(found: list[tuple[str, Candidate]], names: list[str] | None) -> list:
    """The candidates of these names; all of them without names."""
    known = [candidate.name for _, candidate in found]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--only: unknown candidate {name!r}; known: {', '.join(known)}")
    return [item for item in found if item[1].name in (names or known)]


def ablation(text: str) -> tuple[str, str]:
    """NAME=FILE; the model named no-history is one trained without, in place of the emptied one."""
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ValueError(f"--ablation: expected NAME=FILE (got {text!r})")
    return name, path
