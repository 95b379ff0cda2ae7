"""`mirage train`: the autoencoder, the video model and its few-step student, on rendered worlds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mirage_hello.tools.arguments import add_device, device
from mirage_hello.tools.arguments import add_parser as add
from mirage_hello.tools.errors import BadInput, unknown_name

EXAMPLES = """\
  mirage train --preset smoke --out out/smoke            every stage, seconds, on a CPU
  mirage train --preset shipped --out out/run            the weights that ship (one GPU)
  mirage train --preset shipped --minutes 8 --out out/run --resume
  mirage train --preset shipped --video clips/ --set size=512 batch=32 --out out/mine
  torchrun --nproc-per-node 2 $(which mirage) train --preset 391m --out out/big
  mirage train --config run.toml --out out/run           a TOML file: preset = "shipped", ...
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add(subparsers, "train", "train a model on rendered worlds or on your clips", EXAMPLES)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", help="smoke, shipped, no-augmentation, no-history, 391m")
    source.add_argument("--config", type=Path, help="TOML file of settings")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--video", help="folder or .tar shards of real clips, instead of worlds")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--minutes", type=float, default=0.0, help="end this call after so long")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--resume-from", type=Path, help="go on from the folder of a --compact")
    parser.add_argument("--compact", type=Path, help="also keep a small copy of the state here")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
    parser.add_argument("--profile", action="store_true", help="write the slowest kernels")
    parser.add_argument("--export", type=Path, help="write the model of --resume-from, and stop")
    parser.add_argument("--list", action="store_true", help="print the settings, and stop")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is finished or its time ended as asked."""
    import json

    from mirage_hello.model.training import Options, TrainingError, train
    from mirage_hello.model.training.config import as_dict
    from mirage_hello.model.training.export import export

    try:
        config = settings(args)
        if args.list:
            print(json.dumps(as_dict(config), indent=1))
            return 0
        if args.export:
            if args.resume_from is None:
                raise TrainingError("--export needs --resume-from, the folder of a --compact")
            export(args.resume_from, config, args.export)
            return 0
        if args.out is None:
            raise TrainingError("--out is missing; give the folder of the run")
        if args.device:
            device(args.device)  # of one process; torchrun's choose their own
        args.out.mkdir(parents=True, exist_ok=True)
        options = Options(
            resume=args.resume, resume_from=args.resume_from, minutes=args.minutes,
            device=args.device, tensorboard=args.tensorboard, compact=args.compact,
            quiet=args.json, profile=args.profile,
        )  # fmt: skip
        finished = train(config, args.out, options)
    except TrainingError as error:
        raise BadInput(str(error)) from error
    except (FileExistsError, NotADirectoryError, PermissionError, FileNotFoundError) as error:
        raise BadInput(f"cannot use {error.filename} ({error.strerror}); choose another") from error
    if args.json:
        print(json.dumps({"finished": finished, "out": str(args.out)}))
    return 0


def settings(args: argparse.Namespace):
    """The configuration that the arguments describe."""
    from mirage_hello.model.presets import PRESETS
    from mirage_hello.model.training.config import TrainingError, changed, preset, read

    config = read(args.config) if args.config else preset(args.preset or "shipped")
    values: dict[str, Any] = {}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise TrainingError(f"--set: expected KEY=VALUE (got {item!r})")
        values[key] = value
    if args.video:
        values["video"] = args.video
    config = changed(config, values)
    if config.model not in PRESETS:
        raise TrainingError("config: model: " + unknown_name("preset", config.model, PRESETS))
    return config
