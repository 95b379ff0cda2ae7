"""`mirage eval`: closed-loop quality over thousands of frames against rendered truth."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_hello.tools.arguments import add_device
from mirage_hello.tools.arguments import add_parser as add
from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.eval_join import join

if TYPE_CHECKING:
    from mirage_hello.model.evaluation import Candidate

FORMAT = "mirage-eval-1"
TEACHER_FRAMES = 1000  # most frames of a teacher and of what is compared with it
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
    parser.add_argument("--steps", type=int, nargs="+", default=[2], help="evaluations a frame")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=8, help="held-out clips of each style")
    parser.add_argument("--styles", nargs="+", help="default: all")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--supersample", type=int, default=2, help="rays a pixel and axis")
    parser.add_argument("--every", type=int, default=4, help="measure each so many frames")
    parser.add_argument("--burn-in", type=int, default=100, help="frames before the fits begin")
    parser.add_argument("--cut-frames", type=int, default=600, help="frames of the run with cuts")
    parser.add_argument("--history-noise", type=float, default=0.05, help="sigma on the memory")
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
    from mirage_hello.tools import eval_page

    if args.page:
        print(eval_page.write(args.page))
        return 0
    try:
        result = join(args.join, args.name) if args.join else evaluate(args)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    result["requirements"] = requirements(result)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{path}; `mirage eval --page {path}` makes the plots")
        for item in result["requirements"]:
            print(f"  {'pass' if item['passed'] else 'FAIL'}  {item['text']}: {item['value']}")
    return 0 if all(item["passed"] for item in result["requirements"]) else 1


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All the candidates that the arguments name, in the JSON schema of docs/evaluation.md."""
    import torch

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
        burn_in=min(args.burn_in, args.frames // 4),
    )  # fmt: skip
    evaluation = ev.Evaluation(config, device)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    began = time.time()
    result: dict[str, Any] = {
        "format": FORMAT, "name": args.name, "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "size": args.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "styles": list(config.styles), "seeds": args.seeds, "models": {}, "ablations": {},
    }  # fmt: skip
    chosen = candidates(args, device)
    strips = {c.name: Strips(config, args.out / f"{args.name}-{c.name}") for _, c in chosen}

    def keep(name: str, *frame) -> None:
        strips[name].keep(*frame)

    # Many streams of a small model: what the kernels are made for is one stream of a frame.
    with use("torch"):
        numbers = ev.evaluate([c for _, c in chosen], evaluation, keep, say)
    for (group, candidate), found in zip(chosen, numbers, strict=True):
        result[group][candidate.name] = found | {"strips": strips[candidate.name].write()}
    result["seconds"] = round(time.time() - began)
    return result


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
    steps = args.steps[-1]
    forgetful = Candidate("no-history", *networks, steps, remember=False, short=True, frames=most)
    found.append(("ablations", forgetful))
    for item in args.ablation:
        name, equals, path = item.partition("=")
        if not equals:
            raise ValueError(f"--ablation: expected NAME=FILE (got {item!r})")
        other = Candidate(name, *load(Path(path), dtype, device), steps, short=True)
        other.history_noise = 0.0  # trained without: it runs without
        found.append(("ablations", other))
    if args.only:
        known = [candidate.name for _, candidate in found]
        for name in args.only:
            if name not in known:
                raise ValueError(f"--only: unknown candidate {name!r}; known: {', '.join(known)}")
        found = [item for item in found if item[1].name in args.only]
    return found


def requirements(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stable model must show, each with its value and whether it holds."""
    models, ablations = result["models"], result["ablations"]
    checks: list[tuple[str, str, bool]] = []
    for name, model in models.items():
        slope = model["psnr_slope_db_per_1000"]
        flat, text = False, "one seed has no interval; give --seeds 2 or more"
        if slope["low"] is not None:
            # Zero inside, or the worst end costs less than 0.5 dB in 5000 frames.
            flat = slope["low"] <= 0 <= slope["high"] or 5 * -slope["low"] < 0.5
            text = f"{slope['mean']:.3f} ({slope['low']:.3f} to {slope['high']:.3f})"
        checks.append((f"{name}: PSNR slope in dB per 1000 frames holds zero", text, flat))
        text = ", ".join(model["collapsed"]) or "none"
        checks.append((f"{name}: no stream collapses", text, not model["collapsed"]))
        worst = max(model["contrast"], key=lambda k: model["contrast"][k]["mean"])
        value = model["contrast"][worst]["mean"]
        checks.append(
            (f"{name}: start-end contrast below 3 %", f"{worst} {value:.2%}", value < 0.03)
        )
    students = [m for n, m in models.items() if not n.startswith("teacher")]
    if "no-history" in ablations and students:
        base = students[-1]
        ratio = ablations["no-history"]["warp_error"]["output"] / base["warp_error"]["output"]
        checks.append(("without history at least twice the flicker", f"{ratio:.2f}", ratio >= 2))
    if "no-augmentation" in ablations:
        count = len(ablations["no-augmentation"]["collapsed"])
        checks.append(("without augmentation it collapses", f"{count} streams", count > 0))
    teacher = next((m for n, m in models.items() if n.startswith("teacher")), None)
    for name, most in (("2-step", 0.5), ("1-step", 1.5)):
        if teacher and name in models:
            same = models[name].get("shorter", {}).get(str(TEACHER_FRAMES), models[name])
            lost = teacher["psnr_db"]["mean"] - same["psnr_db"]["mean"]
            text = f"{name} within {most} dB of the teacher"
            checks.append((text, f"{lost:.2f} dB lost", lost <= most))
    return [{"text": a, "value": b, "passed": bool(c)} for a, b, c in checks]
