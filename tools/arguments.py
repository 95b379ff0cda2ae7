"""Arguments that several sub-commands share: device, dtype, backend policy."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from mirage_hello.tools.errors import BadInput, unknown_name

if TYPE_CHECKING:
    import torch

    from mirage_hello.kernels import Policy

DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
LONGEST_SIDE = 8192  # of an H.264 level that players know (level 6.2: 8192x4320)
BACKEND_HELP = (
    "auto (default), one backend for every op (torch, ptx, ...), a list in order of preference "
    "(ptx,auto), or op=backend pairs (attention=triton,conv2d=torch)"
)


def add_parser(subparsers: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A sub-command's parser with its examples below the arguments, and --json."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def seconds(text: str) -> float:
    """A duration of an argument, for argparse: positive and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"seconds must be positive and finite (got {text})")
    return value


def device(name: str | None) -> torch.device:
    """The torch device of --device; None is CUDA where there is one.

    Raises:
        BadInput: not a device, or one that this machine lacks.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise BadInput(f"--device: expected cpu, cuda or cuda:N (got {name!r})")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        have = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
        raise BadInput(
            f"--device: got {name}, but torch sees {have}; "
            "`mirage env` says why, and --device cpu runs without one"
        )
    return found


def dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for "bf16" or "bfloat16".  Raises BadInput for a name that is not known."""
    import torch

    if name not in DTYPES:
        raise BadInput("--dtype: " + unknown_name("dtype", name, DTYPES))
    return getattr(torch, DTYPES[name])


def backend_policy(text: str) -> Policy:
    """The policy that --backend spells (see BACKEND_HELP).

    Raises:
        BadInput: an unknown op or backend, with the nearest name, or an op named twice.
    """
    from mirage_hello.kernels import policy

    choices: dict[str, str] = {}
    everywhere: list[str] = []
    for item in text.split(","):
        op, equals, backend = (part.strip() for part in item.partition("="))
        if not equals:
            everywhere.append(op)
        elif op in choices:
            raise BadInput(f"--backend: {op} is named twice (got {text!r}); keep one of them")
        else:
            choices[op] = backend
    default = tuple(everywhere) or ("auto",)
    try:
        return policy({**choices, "default": default} if choices else default)
    except ValueError as error:
        raise BadInput(f"--backend: {error}") from error


def size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of "640x360".  Raises BadInput for anything else."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise BadInput(f"--size: expected WIDTHxHEIGHT, such as 640x360 (got {text!r})")
    width, height = int(parts[0]), int(parts[1])
    if max(width, height) > LONGEST_SIDE:
        raise BadInput(f"--size: at most {LONGEST_SIDE} pixels a side (got {text!r})")
    return width, height
