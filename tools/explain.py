"""`mirage explain OP`: each candidate kernel for a call, which one is chosen, and the reasons.

`mirage explain frame` is explain_frame.py.
"""

from __future__ import annotations

import argparse
import inspect
from typing import TYPE_CHECKING, Any

from mirage_hello.tools import arguments, explain_frame, terminal
from mirage_hello.tools.errors import BadInput, unknown_name

if TYPE_CHECKING:
    import torch

    from mirage_hello.kernels import Explanation, Op

EXAMPLES = """\
  mirage explain attention
  mirage explain attention --shape 1,4096,8,40 --dtype bf16
  mirage explain attention --shape 1,4096,8,40 --shape 1,77,8,40     cross-attention
  mirage explain group_norm_silu --shape 1,320,64,64 --set groups=32 --channels-last
  mirage explain silu --backend ptx                                  would ptx run here?
  mirage explain frame --preset 880m --size 512x512                  every launch of a frame
"""


def add_parser(subparsers: Any) -> None:
    parser = arguments.add_parser(
        subparsers, "explain", "every kernel of an op, and why it can or cannot run", EXAMPLES
    )
    parser.add_argument("op", metavar="OP", help="an op's name, such as attention, or frame")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="N,N,...",
        help="shape of a tensor, once for each in the op's order; the last one repeats "
        "(default: the op's first sample)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a parameter that is a number, such as groups=32",
    )
    parser.add_argument("--channels-last", action="store_true", help="store 4-d tensors as NHWC")
    parser.add_argument("--dtype", help="fp32, fp16 or bf16 (default: fp32; a frame on a GPU bf16)")
    parser.add_argument("--backend", default="auto", help=arguments.BACKEND_HELP)
    arguments.add_device(parser)
    explain_frame.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from mirage_hello.kernels import explain, ops, use

    if args.op == "frame":
        return explain_frame.run(args)
    if args.op not in ops:
        raise BadInput(unknown_name("op", args.op, dir(ops)))
    device, dtype = arguments.device(args.device), arguments.dtype(args.dtype or "fp32")
    op = getattr(ops, args.op)
    values = _call(op, device, dtype, args)
    try:
        with use(arguments.backend_policy(args.backend)):
            explanation = explain(op.name, **values)
    except (ValueError, TypeError) as error:  # the op's own sentence about shapes and dtypes
        raise BadInput(str(error)) from error
    if args.json:
        terminal.print_json(as_dict(explanation))
    else:
        print(explanation)
    return 0


def as_dict(explanation: Explanation) -> dict[str, Any]:
    call = explanation.call
    return {
        "op": explanation.op,
        "call": call.label,
        "arch": call.arch,
        "candidates": [
            vars(c) | {"tile": c.tile.as_dict() if c.tile else None} for c in explanation.candidates
        ],
    }


def _call(
    op: Op, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> dict[str, Any]:
    """The op's first sample as name -> value, with the shapes and numbers that were asked for."""
    import torch

    positional, named = op.samples(device, dtype)[0]
    bound = inspect.signature(op).bind(*positional, **named)
    values = dict(bound.arguments)
    for item in args.set:
        name, value = _number(item, op)
        values[name] = value
    shapes = [_shape(text) for text in args.shape]
    if not shapes:
        return values
    parameters = inspect.signature(op).parameters
    tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
    if len(shapes) > len(tensors):
        raise BadInput(
            f"--shape: {op.name} takes {len(tensors)} tensors ({', '.join(tensors)}), "
            f"got {len(shapes)} shapes"
        )
    for index, name in enumerate(tensors):
        if index >= len(shapes) and parameters[name].default is None:
            del values[name]  # an optional tensor that nobody asked for
            continue
        shape = shapes[min(index, len(shapes) - 1)]
        try:
            like = torch.empty(shape, dtype=values[name].dtype, device=device)
        except RuntimeError as error:  # out of memory is one, too
            raise BadInput(f"--shape: {shape} does not fit the memory; give a smaller") from error
        image = args.channels_last and len(shape) == 4
        values[name] = like.contiguous(memory_format=torch.channels_last) if image else like
    return values


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = (-1,)
    if min(shape) < 0:
        raise BadInput(f"--shape: expected sizes with commas, such as 1,4096,8,40 (got {text!r})")
    return shape


def _number(item: str, op: Op) -> tuple[str, int | float]:
    name, _, text = item.partition("=")
    parameters = inspect.signature(op).parameters
    if name not in parameters:
        raise BadInput("--set: " + unknown_name(f"parameter of {op.name}", name, parameters))
    for kind in (int, float):
        try:
            return name, kind(text)
        except ValueError:
            continue
    raise BadInput(f"--set: expected NAME=NUMBER, such as groups=32 (got {item!r})")
