"""From source to cubin: PTX through ptxas, CUDA C++ through NVRTC, both through the disk cache."""

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mirage_hello.ptx import cache

# PTX vector operands such as {%r0, %r1} contain Jinja2's own block opener, hence <% %>.
templates = jinja2.Environment(
    loader=jinja2.PackageLoader("mirage_hello.ptx", "."),
    undefined=jinja2.StrictUndefined,
    block_start_string="<%",
    block_end_string="%>",
    comment_start_string="<#",
    comment_end_string="#>",
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


def registers(prefix: str, count: int, start: int = 0) -> str:
    """`{%s_0, %s_1, ...}`: a vector operand, eight registers a line."""
    names = [f"{prefix}{i}" for i in range(start, start + count)]
    lines = [", ".join(names[i : i + 8]) for i in range(0, count, 8)]
    return "{" + (",\n       ").join(lines) + "}"


def descriptor(leading_bytes: int, stride_bytes: int, swizzle: int) -> str:
    """A wgmma matrix descriptor without its address (PTX ISA, "Matrix descriptor"), as a constant.

    Bits 16..29 and 32..45 hold the leading and stride byte offsets in units of 16 B, bits 62..63
    the swizzle.
    """
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    value = leading_bytes >> 4 << 16 | stride_bytes >> 4 << 32 | mode << 62
    return f"0x{value:016x}"


templates.globals.update(registers=registers, descriptor=descriptor)


class CompileError(RuntimeError):
    """A source does not compile; the text has the compiler's own words."""


def render(name: str, **variables: Any) -> str:
    """The PTX text of `ptx/<name>.ptx`, or of `ptx/<name>.ptx.j2` with these variables.

    Raises:
        FileNotFoundError: neither file exists.
    """
    folder = resources.files("mirage_hello.ptx")
    plain = folder / f"{name}.ptx"
    if plain.is_file():
        return plain.read_text()
    if not (folder / f"{name}.ptx.j2").is_file():
        known = sorted(p.name for p in folder.iterdir() if ".ptx" in p.name)
        raise FileNotFoundError(f"no PTX source named {name} (there are: {', '.join(known)})")
    return templates.get_template(f"{name}.ptx.j2").render(**variables)


def assemble(text: str, arch: str, name: str = "kernel") -> bytes:
    """The cubin of a PTX text for `arch` ("sm_80", "sm_90a", ...), from the cache or ptxas.

    Raises:
        CompileError: ptxas refuses the text, or there is no ptxas.
    """
    return cache.get_or_build(
        (text, arch, ptxas_version()), lambda: ptxas(text, arch, name=name)[0]
    )


def ptxas(
    text: str, arch: str, flags: tuple[str, ...] = (), name: str = "kernel"
) -> tuple[bytes, str]:
    """Run ptxas: (cubin, what it printed). Not cached: tests read the resource report of -v."""
    with tempfile.TemporaryDirectory() as work:
        source, out = Path(work, f"{Path(name).stem}.ptx"), Path(work, "out.cubin")
        source.write_text(text)
        command = [find_ptxas(), f"-arch={arch}", *flags, str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"ptxas refuses {name} for {arch}: {done.stderr.strip()[:4000]}")
        return out.read_bytes(), done.stdout + done.stderr


@functools.cache
def find_ptxas() -> str:
    """ptxas of the CUDA toolkit ($CUDA_HOME, PATH, /usr/local/cuda), else of Triton's wheel."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [
        str(Path(p, "bin", "ptxas")) for p in places if p and Path(p, "bin", "ptxas").is_file()
    ]
    on_path = shutil.which("ptxas")
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        wheel = Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin", "ptxas")
        found += [str(wheel)] if wheel.is_file() else []
    for candidate in filter(None, [on_path, *found]):
        return candidate
    raise CompileError(
        "no ptxas: looked in $CUDA_HOME, PATH, /usr/local/cuda and Triton's wheel; "
        "pip install triton, or install the CUDA toolkit"
    )


@functools.cache
def ptxas_version() -> str:
    done = subprocess.run([find_ptxas(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def cuda_source(name: str) -> str:
    """Text of `kernels/cuda/<name>.cu`. FileNotFoundError lists what there is."""
    folder = resources.files("mirage_hello.kernels") / "cuda"
    path = folder / f"{name}.cu"
    if not path.is_file():
        known = sorted(p.name for p in folder.iterdir() if p.name.endswith(".cu"))
        raise FileNotFoundError(f"no CUDA source named {name} (there are: {', '.join(known)})")
    return path.read_text()


def compile_cuda(
    name: str, arch: str, defines: tuple[tuple[str, str], ...] = (), target: str = "cubin"
) -> bytes:
    """`kernels/cuda/<name>.cu` for `arch` as "cubin" or "ptx", from the cache or NVRTC.

    Raises:
        CompileError: NVRTC is missing or refuses the source.
    """
    source = cuda_source(name)
    key = (source, arch, repr(defines), target, nvrtc_version())
    return cache.get_or_build(key, lambda: nvrtc(source, arch, defines, target, name))


def nvrtc(
    source: str, arch: str, defines: tuple[tuple[str, str], ...], target: str, name: str
) -> bytes:
    """Compile CUDA C++ with NVRTC, which needs neither a toolkit nor a GPU.

    Through cuda-bindings: cuda-core asks for a driver before it hands out PTX.
    """
    from cuda.bindings import nvrtc as lib

    own = str(resources.files("mirage_hello.kernels") / "cuda")
    folders = [f"--include-path={folder}" for folder in (*cuda_include_folders(), own)]
    macros = [f"--define-macro={key}={value}" for key, value in defines]
    options = [f"--gpu-architecture={arch}", "--std=c++17", *folders, *macros]
    unit = _checked(lib.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (code,) = lib.nvrtcCompileProgram(unit, len(options), [o.encode() for o in options])
        if code != lib.nvrtcResult.NVRTC_SUCCESS:
            said = bytearray(_checked(lib.nvrtcGetProgramLogSize(unit)))
            _checked(lib.nvrtcGetProgramLog(unit, said))
            text = said.decode(errors="replace").strip("\0\n ")[:4000]
            raise CompileError(f"NVRTC refuses {name}.cu for {arch}: {text}")
        get_size, get = {
            "cubin": (lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN),
            "ptx": (lib.nvrtcGetPTXSize, lib.nvrtcGetPTX),
        }[target]
        out = bytearray(_checked(get_size(unit)))
        _checked(get(unit, out))
        return bytes(out).rstrip(b"\0") if target == "ptx" else bytes(out)
    finally:
        lib.nvrtcDestroyProgram(unit)


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call. CompileError with NVRTC's name of the error."""
    code, *value = answer
    if int(code):
        raise CompileError(f"NVRTC fails with {code.name}")
    return value[0] if value else None


@functools.cache
def nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc as binding
    except ImportError as error:
        raise CompileError(
            f"no NVRTC: {error}; pip install 'mirage-hello[cuda]' brings it"
        ) from error
    return "nvrtc {}.{}".format(*binding.nvrtcVersion()[1:])


@functools.cache
def cuda_include_folders() -> tuple[str, ...]:
    """Folders with cuda_fp16.h: the toolkit's, else the nvidia wheels'."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvidia = importlib.util.find_spec("nvidia")
    for site in nvidia.submodule_search_locations or [] if nvidia else []:
        roots += [str(p) for p in Path(site).glob("cu*")] + [str(Path(site, "cuda_runtime"))]
    folders = [Path(root, "include") for root in roots if root]
    usable = tuple(str(f) for f in folders if (f / "cuda_fp16.h").is_file())
    if not usable:
        raise CompileError(
            "no cuda_fp16.h: looked in $CUDA_HOME/include, /usr/local/cuda/include and the nvidia "
            "wheels; pip install nvidia-cuda-runtime nvidia-cuda-crt"
        )
    return usable[:1]
