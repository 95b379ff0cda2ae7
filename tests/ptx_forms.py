"""Instruction forms: small PTX kernels, each executing one instruction, with inputs and oracles.

A form runs in the emulator and on a GPU through the same call (`run`).  The GPU's answers are the
fixture tests/fixtures/ptx/forms.npz, written by make_ptx_fixtures.py; test_ptx_forms.py compares.
Where the manual defines a result exactly, a form also carries an independent oracle.

Forms are grouped; one group is one PTX module with one entry per form.
"""

import functools
import hashlib
import importlib
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from exact_rounding import random_bits

from mirage_hello.ptx import loader

N = 512  # elements of a scalar form: 2 blocks of 256 threads
TABLES = (
    *("float", "compare", "integer", "cvt", "warp", "memory", "atomic"),
    *("matrix", "wgmma", "async", "tensor", "cluster", "order"),
)
TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# PTX type of an operand -> (bytes in memory, register declaration, load and store suffix)
STORAGE = {
    **{f"{s}{w}": (w // 8, f".b{w}", f"b{w}") for s in "bsu" for w in (16, 32, 64)},
    "f32": (4, ".f32", "f32"),
    "f64": (8, ".f64", "f64"),
    "f16": (2, ".b16", "b16"),
    "bf16": (2, ".b16", "b16"),
    "tf32": (4, ".b32", "b32"),
    "f16x2": (4, ".b32", "b32"),
    "bf16x2": (4, ".b32", "b32"),
    "e4m3x2": (2, ".b16", "b16"),
    "e5m2x2": (2, ".b16", "b16"),
    "u8": (1, ".b16", "u8"),
    "s8": (1, ".b16", "s8"),
}


@dataclass(frozen=True)
class Tolerance:
    """How far the emulator may be from the hardware: bits, or an error of values of a type."""

    kind: str = "bits"  # "bits", or the type of the values: "f32", "f16", "bf16"
    relative: float = 0.0
    absolute: float = 0.0
    reason: str = ""


BITS = Tolerance()


@dataclass(frozen=True)
class Map:
    """A tensor map of one argument: index of the argument, and loader.tensor_map's parameters."""

    argument: int
    shape: tuple
    dtype: torch.dtype
    box: tuple = ()
    swizzle: int = 0
    element_strides: tuple | None = None
    im2col: tuple = ()  # lower, upper, channels, pixels

    def make(self, tensor):
        values = tensor.view(self.dtype).reshape(self.shape)
        if self.im2col:
            return loader.im2col_map(
                values.permute(0, 3, 1, 2), *self.im2col, self.swizzle, self.element_strides
            )
        return loader.tensor_map(values, self.box, self.swizzle, self.element_strides)


@dataclass(frozen=True)
class Form:
    """One kernel: `arguments` are arrays; those at `outputs` are compared after the launch.

    Parameters in order: `maps`, a pointer per array, `scalars`.
    """

    name: str
    body: str  # the entry function, with {entry} for its name
    arguments: Callable[[], list]
    outputs: tuple
    grid: tuple = (1, 1, 1)
    block: tuple = (32, 1, 1)
    smem_bytes: int = 0
    maps: tuple = ()
    scalars: tuple = ()
    tolerance: Tolerance = BITS
    oracle: Callable | None = field(default=None, compare=False)
    group: str = ""
    target: str = "sm_80"
    version: str = "8.0"

    @property
    def entry(self):
        return re.sub(r"[^a-zA-Z0-9]+", "_", self.name).strip("_") + "_form"

    @property
    def text(self):
        return self.body.replace("{entry}", self.entry)

    def digest(self):
        """Changes when the kernel or its inputs change, so that a stale fixture is noticed."""
        inputs = b"".join(np.ascontiguousarray(a).tobytes() for a in self.arguments())
        text = " ".join(self.text.split())
        return hashlib.sha256(text.encode() + inputs).hexdigest()[:16]


def header(target, version):
    return f".version {version}\n.target {target}\n.address_size 64\n"


def module_text(forms, target=None):
    """One PTX module with an entry for each of `forms` (of one group)."""
    target = target or max((f.target for f in forms), key=lambda t: (len(t), t))
    version = max((f.version for f in forms), key=float)
    shared = ".extern .shared .align 1024 .b8 smem[];\n" if any(f.smem_bytes for f in forms) else ""
    return header(target, version) + shared + "\n".join(f.text for f in forms)


def kernel(text, **names):
    """PTX text with every $name replaced; {entry} stays for `Form.text`."""
    return string.Template(text.strip("\n")).substitute(names)


def seed_of(name):
    return zlib.crc32(name.encode())


def special_integers(width):
    top = 1 << (width - 1)
    return [0, 1, 2, 3, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 0x55 % (2 * top), 127, 128]


def operand(kind, rng, n=N):
    """`n` register values of a PTX type: specials, ties, short and long values."""
    if kind in ("f32", "f64", "f16"):
        return random_bits(rng, {"f32": np.uint32, "f64": np.uint64, "f16": np.uint16}[kind], n)
    if kind == "tf32":
        return random_bits(rng, np.uint32, n)
    if kind == "bf16":
        return (random_bits(rng, np.uint32, n) >> np.uint32(16)).astype(np.uint16)
    if kind in ("e4m3x2", "e5m2x2"):
        return rng.integers(0, 1 << 16, n, dtype=np.uint64).astype(np.uint16)
    if kind.endswith("x2"):
        low, high = operand(kind[:-2], rng, n), operand(kind[:-2], rng, n)
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
    width = int(kind[1:])
    raw = rng.integers(0, 1 << width, n, dtype=np.uint64)
    raw = raw >> rng.integers(0, width, n).astype(np.uint64)
    special = np.array(special_integers(width), dtype=np.uint64)
    raw = np.where(rng.random(n) < 0.2, special[rng.integers(0, len(special), n)], raw)
    return raw.astype(f"u{width // 8}")


def cross_specials(arrays, kinds):
    """The first elements of the first two operands pair every special value with every other."""
    if len(arrays) < 2 or kinds[0] != kinds[1]:
        return arrays
    a, b = arrays[0].copy(), arrays[1].copy()
    special = np.unique(a[:400])[:: max(1, len(np.unique(a[:400])) // 16)][:16]
    grid = np.stack(np.meshgrid(special, special), -1).reshape(-1, 2)
    a[: len(grid)], b[: len(grid)] = grid[:, 0], grid[:, 1]
    return [a, b, *arrays[2:]]


def parameters(count):
    return ", ".join(f".param .u64 p_{i}" for i in range(count))


def _registers(kinds, letter):
    lines = []
    for i, kind in enumerate(kinds):
        declaration = ".pred" if kind == "pred" else STORAGE[kind][1]
        lines.append(f"    .reg {declaration} %{letter}{i};")
    return lines


def scalar_body(sources, results, instructions):
    """An entry that loads one element of each source per thread, executes, stores the results."""
    lines = [f".visible .entry {{entry}}({parameters(len(sources) + len(results))})", "{"]
    lines += [
        "    .reg .b32 %i, %n, %t<8>;",
        "    .reg .b64 %g, %w, %v<4>;",
        "    .reg .pred %p<4>;",
    ]
    lines += _registers(sources, "a") + _registers(results, "d")
    lines += ["    mov.u32 %i, %ctaid.x;", "    mov.u32 %n, %ntid.x;", "    mov.u32 %t0, %tid.x;"]
    lines += ["    mad.lo.u32 %i, %i, %n, %t0;"]
    for i, kind in enumerate(sources):
        size, _, suffix = STORAGE[kind]
        lines += [f"    ld.param.u64 %g, [p_{i}];", f"    mul.wide.u32 %w, %i, {size};"]
        lines += ["    add.u64 %g, %g, %w;", f"    ld.global.{suffix} %a{i}, [%g];"]
    lines += [f"    {line.strip()}" for line in instructions.strip().splitlines()]
    for i, kind in enumerate(results):
        size, _, suffix = (4, "", "b32") if kind == "pred" else STORAGE[kind]
        value = f"%d{i}"
        if kind == "pred":
            lines += [f"    selp.b32 %t7, 1, 0, %d{i};"]
            value = "%t7"
        lines += [
            f"    ld.param.u64 %g, [p_{len(sources) + i}];",
            f"    mul.wide.u32 %w, %i, {size};",
        ]
        lines += ["    add.u64 %g, %g, %w;", f"    st.global.{suffix} [%g], {value};"]
    return "\n".join([*lines, "    ret;", "}"])


def scalar(name, results, sources, instructions=None, *, adjust=None, n=N, **options):
    """A form that applies an instruction to `n` elements, one per thread.

    Args: results, sources lists of PTX types ("pred" as a result is stored as 0 or 1); the default
    instruction is `name` on %d0 and %a0, %a1, ...; adjust(arrays, rng) edits the inputs.
    """
    if instructions is None:
        registers = [f"%d{i}" for i in range(len(results))] + [
            f"%a{i}" for i in range(len(sources))
        ]
        instructions = f"{name} {', '.join(registers)};"

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        arrays = cross_specials([operand(k, rng, n) for k in sources], sources)
        if adjust:
            arrays = adjust(arrays, rng)
        widths = [4 if k == "pred" else STORAGE[k][0] for k in results]
        return [*arrays, *(np.zeros(n, f"u{w}") for w in widths)]

    outputs = tuple(range(len(sources), len(sources) + len(results)))
    body = scalar_body(sources, results, instructions)
    shape = {"grid": (n // 256, 1, 1), "block": (256, 1, 1)}
    return Form(name, body, arguments, outputs, **{**shape, **options})


def run(form, program, device):
    """Launch a form on `device` and return its output arrays."""
    tensors = []
    for array in form.arguments():
        flat = np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}")
        kind = TORCH[array.dtype.itemsize]
        if kind == torch.uint8:
            flat = flat.view(np.uint8)
        tensors.append(torch.from_numpy(flat.copy()).to(device))
    maps = [m.make(tensors[m.argument]) for m in form.maps]
    program.launch(
        form.entry, form.grid, form.block, [*maps, *tensors, *form.scalars], form.smem_bytes
    )
    out = []
    for i in form.outputs:
        host = tensors[i].cpu().numpy()
        out.append(host.view(f"u{host.dtype.itemsize}"))
    return out


@functools.cache
def program_of(group):
    """The loader's program of a group."""
    return loader.Program(f"forms_{group}", module_text(groups()[group]))


@functools.cache
def groups():
    """{group name: forms}, everything that the tables define."""
    out = {}
    for name in TABLES:
        table = importlib.import_module(f"ptx_forms_{name}")
        for form in table.forms():
            out.setdefault(form.group, []).append(form)
    names = [f.name for forms in out.values() for f in forms]
    entries = [f.entry for forms in out.values() for f in forms]
    twice = {n for n in names if names.count(n) > 1} | {e for e in entries if entries.count(e) > 1}
    if twice:
        raise ValueError(f"ptx_forms: names and entries must be unique (twice: {sorted(twice)})")
    return out
