"""`mirage explain frame`: the plan of a frame, every launch in order, and its memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mirage_hello.tools import arguments, terminal
from mirage_hello.tools.errors import BadInput

SIZE = "512x512"
SIZE_ON_CPU = "64x64"  # the launches are the same, and the recording runs them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that only `explain frame` reads."""
    only = parser.add_argument_group("of `explain frame`")
    only.add_argument("--preset", help="tiny, 391m or 880m (default: 880m on a GPU, else tiny)")
    only.add_argument("--size", metavar="WxH", help=f"default: {SIZE}, on a CPU {SIZE_ON_CPU}")
    only.add_argument("--steps", type=int, default=1, help="denoising steps (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Print the plan of a frame with random weights, as a list or as JSON."""
    from mirage_hello.tools.run import open_stream, sentences

    if args.shape or args.set or args.channels_last:
        raise BadInput("explain frame: takes --preset, --size and --steps, not a shape")
    if args.steps < 1:
        raise BadInput(f"explain frame: --steps must be at least 1 (got {args.steps})")
    on_cpu = arguments.device(args.device).type == "cpu"
    width, height = arguments.size(args.size or (SIZE_ON_CPU if on_cpu else SIZE)) or (0, 0)
    args.checkpoint = args.style = None
    args.seed = 0
    with sentences((height, width)):
        record = open_stream(args, (height, width)).record()
    if args.json:
        terminal.print_json(as_dict(record))
    else:
        print(record)
    return 0


def as_dict(record: Any) -> dict[str, Any]:
    from mirage_hello.model.plan import place

    return {
        "launches": [asdict(launch) for launch in record.launches],
        "arena_bytes": place(record.buffers),
        "peak_bytes": record.peak_bytes,
        "buffers": [asdict(buffer) for buffer in record.buffers],
    }
