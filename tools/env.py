"""`mirage env`: what this machine has, and why each backend works or does not."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

from mirage_hello.tools import arguments, terminal

PACKAGES = (
    "mirage-hello", "torch", "triton", "numba", "numba-cuda", "pycuda", "cupy-cuda13x",
    "cuda-core", "cuda-bindings", "av", "numpy",
)  # fmt: skip
EXAMPLES = """\
  mirage env                    a table for people
  mirage env --json             the same for scripts and bug reports
"""


def add_parser(subparsers: Any) -> None:
    arguments.add_parser(subparsers, "env", "this machine, and which backends work on it", EXAMPLES)


def run(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        terminal.print_json(found)
    else:
        _show(found)
    return 0


def environment() -> dict[str, Any]:
    """{"machine", "packages", "gpus", "driver", "toolkit", "backends"} of this machine."""
    import torch

    return {
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(_memory_bytes() / 2**30, 1),
            "python": platform.python_version(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": _driver(),
        "toolkit": _toolkit(),
        "backends": _backends(),
    }


def _backends() -> list[dict[str, Any]]:
    from mirage_hello.kernels import backends

    rows = []
    for backend in backends.BACKENDS:
        for device_type in ("cuda", "cpu"):
            reason = backends.unavailable(backend, device_type)
            rows.append(
                {"backend": backend, "device": device_type, "works": not reason, "reason": reason}
            )
    return rows


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _driver() -> dict[str, Any]:
    """The CUDA driver: its version and the newest CUDA that it supports, or why there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"found": False, "reason": f"libcuda.so.1 cannot be loaded ({error})"}
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    release = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
        release = answer.stdout.split("\n")[0].strip() or None
    return {
        "found": True,
        "release": release,
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def _toolkit() -> dict[str, str | None]:
    """The compilers that are found: of the toolkit, of Triton's wheel, and the host's."""
    found = {name: shutil.which(name) for name in ("nvcc", "ptxas", "g++")}
    try:
        from triton.backends.nvidia import __file__ as nvidia
    except ImportError:
        return found
    wheel = os.path.join(os.path.dirname(nvidia), "bin", "ptxas")
    found["ptxas (triton)"] = wheel if os.path.exists(wheel) else None
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    if hasattr(os, "sysconf") and sys.platform != "win32":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = terminal.console()
    machine = found["machine"]
    console.print(f"[bold]Machine[/]   {machine['system']}, Python {machine['python']}")
    console.print(
        f"          {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    )
    driver = found["driver"]
    if driver["found"]:
        console.print(f"[bold]Driver[/]    {driver['release']} (CUDA {driver['cuda']})")
    else:
        console.print(f"[bold]Driver[/]    none: {escape(driver['reason'])}")
    for gpu in found["gpus"]:
        console.print(
            f"[bold]GPU[/]       {gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        )
    versions = [f"{name} {version or '-'}" for name, version in found["packages"].items()]
    console.print("[bold]Packages[/]  " + ", ".join(versions))
    tools = [f"{name} {path or '-'}" for name, path in found["toolkit"].items()]
    console.print("[bold]Compilers[/] " + ", ".join(tools))
    table = Table("backend", "on", "works", "why not", box=None, pad_edge=False)
    for row in found["backends"]:
        works = "[green]yes[/]" if row["works"] else "[red]no[/]"
        table.add_row(row["backend"], row["device"], works, escape(row["reason"] or ""))
    console.print()
    console.print(table)
