"""The `mirage` command: finds the sub-command's module, and turns its end into an exit code.

Each sub-command is a module with two functions:
    add_parser(subparsers)    its arguments, with examples in the epilog
    run(args) -> exit code
Only the module that is asked for is imported, so `mirage --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence

from mirage_hello.tools.errors import BadInput, unknown_name

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

# name: (module, the line in `mirage --help`)
COMMANDS = {
    "run": ("mirage_hello.tools.run", "push a video file through the model, frame by frame"),
    "parity": ("mirage_hello.tools.parity", "compare every kernel with the float64 reference"),
    "bench": ("mirage_hello.tools.bench", "time kernels against PyTorch and the measured ceilings"),
    "tune": ("mirage_hello.tools.tune", "time the tiles of kernels on this card, keep the best"),
    "report": ("mirage_hello.tools.report", "plots, tables and an HTML page from results"),
    "explain": (
        "mirage_hello.tools.explain",
        "every kernel of an op, and why it can or cannot run",
    ),
    "env": ("mirage_hello.tools.env", "this machine, and which backends work on it"),
    "demo": ("mirage_hello.tools.demo", "the whole path on one clip: run, parity, speed, report"),
    "train": ("mirage_hello.tools.train", "train a model on rendered worlds or on your clips"),
    "eval": ("mirage_hello.tools.eval", "closed-loop quality of a model over thousands of frames"),
    "ptx": ("mirage_hello.tools.ptx", "run, check or count a PTX file without a GPU"),
}

EPILOG = """\
examples:
  mirage env                                 what this machine has
  mirage run clip.mp4 -o out.mp4             a file through the model
  mirage parity --op silu                    is each silu kernel right?
  mirage explain attention --shape 1,4096,8,40
  mirage COMMAND --help                      arguments and examples of one command

exit codes:
  0    done
  1    a check failed (parity, or a result that is not as it must be)
  2    bad input: one sentence on stderr says what, got, expected and what to do
  130  interrupted by Ctrl-C; a video written so far is kept and plays
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise BadInput(f"{message}; `{self.prog} --help` shows the arguments")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: arguments without the program's name; default: the process's own.

    Returns:
        the exit code (see `mirage --help`).
    """
    # OpenMP's threads spin while they wait. On two cores shared with other work that made a frame
    # of the tiny model take 514 to 952 ms; asleep they took 243 to 274 ms. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    try:
        args = _parse(arguments, command)
        code = int(args.run(args) or OK)
        sys.stdout.flush()  # here, where a closed pipe is still understood
        return code
    except BadInput as error:
        print(f"mirage{f' {command}' if command else ''}: {error}", file=sys.stderr)
        if "--json" in arguments:
            print(json.dumps({"error": str(error)}))
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left; point stdout elsewhere so that the flush at exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _parse(arguments: Sequence[str], command: str | None) -> argparse.Namespace:
    parser = Parser(
        prog="mirage",
        description="Hand-written GPU kernels swapped into live video diffusion.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("mirage-hello")
    parser.add_argument("--version", action="version", version=f"mirage-hello {version}")
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    if command in COMMANDS:
        module = importlib.import_module(COMMANDS[command][0])
        module.add_parser(subparsers)
        subparsers.choices[command].set_defaults(run=module.run)
    else:
        for name, (_, summary) in COMMANDS.items():
            subparsers.add_parser(name, help=summary)
        if command is not None:
            raise BadInput(unknown_name("command", command, COMMANDS))
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        raise SystemExit(OK)
    return args
