"""mirage ptx: run, check or count a PTX file on the CPU.

mirage ptx run silu.ptx --tensor x=f32[1000]:randn --tensor y=f32[1000]:nan --args x y 1000
"""

from __future__ import annotations

import argparse
import json
import re
import time
from importlib.resources import files
from pathlib import Path

from mirage_hello.tools.errors import BadInput, unknown_name

EPILOG = """\
examples:
  mirage ptx check kernel.ptx                    parse it, and decode every kernel's instructions
  mirage ptx run silu.ptx --tensor x=f32[1000]:randn --tensor y=f32[1000]:nan --args x y 1000 \\
      --grid 4 --save y=y.npy                    run, with every detector on
  mirage ptx count tile.ptx --tensor x=s32[64,64]:arange --tensor y=s32[64,64]:zeros \\
      --args 'map(x,box=32x32,swizzle=0)' 'map(y,box=32x32,swizzle=0)' --grid 2,2 --html tile.html
  mirage ptx run silu.ptx.j2 --define dtype=bf16 --entry silu_bf16 --tensor ... --args ...

arguments of the kernel (--args), in its order:
  x                              a tensor of --tensor: its address
  map(x,box=32x32,swizzle=128)   a tensor map of x; box innermost first
  1000, 0x10, -1, 0.5, null      numbers and the null pointer

exit codes: 0 clean, 1 the detectors found something, 2 bad input or unsupported PTX
"""

DTYPES = ("f64", "f32", "f16", "bf16", "e4m3", "e5m2", "s64", "s32", "s16", "s8", "u8")
FILLS = ("randn", "rand", "zeros", "ones", "nan", "arange", "empty")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Arguments of `mirage ptx`."""
    parser = subparsers.add_parser(
        "ptx",
        help="run, check or count a PTX file without a GPU",
        description="Runs a kernel of a PTX file in the emulator and says what it found and cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("run", "check", "count"), help="what to do with the file")
    parser.add_argument("file", type=Path, help="a .ptx file, or a .ptx.j2 template")
    parser.add_argument("--entry", help="kernel; default: the only one")
    parser.add_argument("--define", action="append", default=[], metavar="NAME=VALUE",
                        help="a variable of a template; repeat")  # fmt: skip
    parser.add_argument("--grid", default="1", help="blocks, up to three sizes: 4 or 4,2,1")
    parser.add_argument("--block", help="threads; default: the kernel's .reqntid")
    parser.add_argument("--smem", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument("--tensor", action="append", default=[], metavar="NAME=DTYPE[SHAPE]:FILL",
                        help=f"{', '.join(DTYPES)}; {', '.join(FILLS)}, @file.npy")  # fmt: skip
    parser.add_argument("--args", nargs="*", help="the kernel's arguments")
    parser.add_argument("--seed", type=int, default=0, help="of rand and randn")
    parser.add_argument("--early", action="store_true", help="asynchronous copies complete at once")
    parser.add_argument("--save", action="append", default=[], metavar="NAME=FILE.npy",
                        help="write a tensor after the run; repeat")  # fmt: skip
    parser.add_argument("--html", type=Path, help="write the annotated listing here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """The sub-command; returns the exit code."""
    from mirage_hello.ptx import emulator

    try:
        module = emulator.parse(_text(args), name=args.file.name)
        if args.what == "check" and args.args is None:
            return _check_only(args, module)
        return _launch(args, module)
    except OSError as error:
        raise BadInput(
            f"cannot read or write {error.filename} ({error.strerror}); give another path"
        ) from error
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error


def _text(args: argparse.Namespace) -> str:
    if not args.file.is_file():
        raise BadInput(f"no file {args.file}; give the path of a .ptx or .ptx.j2 file")
    try:
        text = args.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{args.file} is not text ({error}); give a .ptx or .ptx.j2 file") from error
    if args.file.suffix != ".j2":
        return text
    import jinja2

    from mirage_hello.ptx import assembler

    # The project's own template settings, with the file's folder searched first.
    environment = assembler.templates.overlay(
        loader=jinja2.FileSystemLoader([args.file.parent, str(files("mirage_hello.ptx"))])
    )
    values = dict(_split(d, "--define NAME=VALUE") for d in args.define)
    variables = {k: int(v) if re.fullmatch(r"-?\d+", v) else v for k, v in values.items()}
    try:
        return environment.from_string(text).render(**variables)
    except jinja2.TemplateError as error:
        raise BadInput(f"{args.file.name}: {error}; give it with --define NAME=VALUE") from error


def _split(text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"expected {form}, got {text!r}")
    return name, value


def _check_only(args: argparse.Namespace, module) -> int:
    """Without arguments nothing can run: parse, resolve and decode."""
    from mirage_hello.ptx.emulator.program import program

    kernels = {}
    if not module.entries:
        raise BadInput(f"{args.file}: there is no kernel in it; expected a .visible .entry")
    for entry in [args.entry] if args.entry else module.entries:
        lowered = program(module, entry)
        kernels[entry] = {
            "instructions": len(lowered.ops) - 1,
            "registers": len(lowered.rows),
            "shared_static": lowered.shared_static,
            "parameters": list(lowered.params),
        }
    if args.json:
        print(json.dumps({"file": args.file.name, "kernels": kernels}, indent=1))
        return 0
    for entry, facts in kernels.items():
        parameters = ", ".join(facts["parameters"])
        print(
            f"{entry}({parameters}): {facts['instructions']} instructions, "
            f"{facts['registers']} registers, {facts['shared_static']} B static shared"
        )
    print("every instruction is supported; give --args to run the detectors")
    return 0


def _launch(args: argparse.Namespace, module) -> int:
    from mirage_hello.ptx import emulator

    entry = args.entry or _only_entry(module)
    tensors = _tensors(args)
    values = [_argument(text, tensors) for text in args.args or ()]
    checks = args.what != "count"
    begin = time.perf_counter()
    try:
        report = emulator.launch(
            module, entry, _sizes(args.grid), _block(args, module, entry), values, args.smem,
            checks=checks, early=args.early,
        )  # fmt: skip
    except emulator.EmulatorError as error:
        report = error.report
    seconds = time.perf_counter() - begin
    for item in args.save:
        name, path = _split(item, "--save NAME=FILE.npy")
        _save(tensors, name, path)
    if args.html:
        from mirage_hello.ptx.emulator import listing

        args.html.write_text(listing.page(module, report))
    _print(args, report, seconds)
    return 1 if report.findings else 0


def _only_entry(module) -> str:
    if len(module.entries) != 1:
        known = ", ".join(module.entries) or "none"
        raise BadInput(f"{module.name} has the kernels {known}; choose one with --entry")
    return module.entries[0]


def _sizes(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+([,x]\d+){0,2}", text):
        raise BadInput(f"expected up to three sizes such as 4 or 4,2,1 (got {text!r})")
    return tuple(int(v) for v in re.split("[,x]", text))


def _block(args: argparse.Namespace, module, entry: str) -> tuple[int, ...]:
    if args.block:
        return _sizes(args.block)
    if entry not in module.functions:
        raise BadInput(unknown_name("kernel", entry, module.entries))
    required = module.functions[entry].directives.get(".reqntid")
    if not required:
        raise BadInput(f"{entry} has no .reqntid; give --block")
    return required


def _tensors(args: argparse.Namespace) -> dict:
    """--tensor NAME=DTYPE[SHAPE]:FILL -> torch tensors."""
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    out = {}
    for item in args.tensor:
        name, spec = _split(item, "--tensor NAME=DTYPE[SHAPE]:FILL")
        out[name] = _tensor(spec, generator)
    return out


def _tensor(spec: str, generator):
    import numpy as np
    import torch

    found = re.fullmatch(r"(\w+)\[([\d,]+)\](?::([\w@./-]+))?", spec)
    if not found or found[1] not in DTYPES:
        raise BadInput(
            f"expected DTYPE[SHAPE]:FILL such as f32[64,64]:randn (got {spec!r}); "
            f"dtypes: {', '.join(DTYPES)}"
        )
    names = {"f": "float", "s": "int", "u": "uint", "b": "bfloat"}
    special = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "bf16": "bfloat16"}
    dtype = getattr(torch, special.get(found[1]) or names[found[1][0]] + found[1][1:])
    shape = tuple(int(v) for v in found[2].split(","))
    fill = found[3] or "zeros"
    if fill.startswith("@"):
        return _loaded(fill[1:], dtype, shape)
    count = int(np.prod(shape))
    makers = {
        "randn": lambda: torch.randn(shape, generator=generator).to(dtype),
        "rand": lambda: torch.rand(shape, generator=generator).to(dtype),
        "zeros": lambda: torch.zeros(shape).to(dtype),
        "ones": lambda: torch.ones(shape).to(dtype),
        "nan": lambda: torch.full(shape, float("nan")).to(dtype),
        "arange": lambda: torch.arange(count).reshape(shape).to(dtype),
        "empty": lambda: torch.empty(shape, dtype=dtype),
    }
    if fill not in makers:
        raise BadInput(unknown_name("fill", fill, FILLS))
    return makers[fill]()


def _loaded(path: str, dtype, shape: tuple[int, ...]):
    import numpy as np
    import torch

    try:
        found = torch.from_numpy(np.load(path))
        return found.to(dtype).reshape(shape).contiguous()
    except (ValueError, TypeError, EOFError, RuntimeError) as error:
        raise BadInput(f"{path}: expected an array of shape {shape} ({error})") from error


def _argument(text: str, tensors: dict):
    if text == "null":
        return None
    found = re.fullmatch(r"map\((\w+),box=([\dx]+)(?:,swizzle=(\d+))?\)", text)
    if found:
        from mirage_hello.ptx.tensor_map import tensor_map

        return tensor_map(_named(tensors, found[1]), _sizes_any(found[2]), int(found[3] or 128))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        return int(text, 0)
    try:
        return float(text)
    except ValueError:
        return _named(tensors, text)


def _sizes_any(text: str) -> tuple[int, ...]:
    return tuple(int(v) for v in text.split("x"))


def _named(tensors: dict, name: str):
    if name not in tensors:
        raise BadInput(unknown_name("tensor", name, tensors) + "; declare it with --tensor")
    return tensors[name]


def _save(tensors: dict, name: str, path: str) -> None:
    import numpy as np
    import torch

    tensor = _named(tensors, name)
    wide = tensor.float() if tensor.dtype in (torch.bfloat16,) or tensor.itemsize == 1 else tensor
    np.save(path, wide.numpy())


def _print(args: argparse.Namespace, report, seconds: float) -> None:
    if args.json:
        print(json.dumps({**report.as_dict(), "seconds": seconds}, indent=1))
        return
    for finding in report.findings:
        print(finding)
    if args.what == "check":
        print(f"{report.kernel}: {len(report.findings)} finding(s)")
        return
    print(f"{report.kernel}: {len(report.findings)} finding(s), {seconds:.2f} s on the CPU\n")
    for name, value in report.counts.totals().items():
        print(f"  {name.replace('_', ' '):28s} {value:>16,}")
    print("\n  warp instructions by class")
    for name, value in report.counts.by_class().items():
        print(f"  {name:28s} {value:>16,}")
