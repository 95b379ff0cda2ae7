"""Installs the extra `mirage-hello[cuda]` where it can work; says in one line why not elsewhere.

`make` runs this with the environment's own Python before anything of mirage_hello is imported, so
it uses the standard library alone. Arguments are passed on to pip.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

HEADERS = ("cuda.h", "curand.h")  # what PyCUDA's sources include


def main(pip_flags: Sequence[str]) -> int:
    reason = missing_driver()
    if reason:
        print(f"without the GPU packages: {reason}")
        return 0
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    extra = pyproject["project"]["optional-dependencies"]["cuda"]
    wheels = [need for need in extra if not need.startswith("pycuda")]
    sources = [need for need in extra if need.startswith("pycuda")]
    print("installing the GPU packages: " + ", ".join(wheels))
    failure = install(wheels, pip_flags, {})
    if failure:
        print(f"without {', '.join(wheels)}: {failure}")
    root = toolkit()
    reason = missing_for_build(root)
    if reason is None and root is not None:
        print(f"building PyCUDA with {root} (once, about two minutes)")
        reason = install(sources, pip_flags, build_environment(root))
    if reason:
        print(f"without PyCUDA (so without the ptx and cuda backends on the GPU): {reason}")
    return 0


def missing_driver() -> str | None:
    """Why there is no CUDA driver, or None."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver here (libcuda.so.1 is not found)"
    return None


def toolkit() -> Path | None:
    """The root of a CUDA toolkit that has the headers, or None."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT")]
    roots = [*named, str(Path(nvcc).resolve().parent.parent) if nvcc else None]
    for root in [*roots, "/usr/local/cuda", "/opt/cuda", "/usr"]:
        if root and all((Path(root) / "include" / header).exists() for header in HEADERS):
            return Path(root)
    return None


def missing_for_build(root: Path | None) -> str | None:
    """Why PyCUDA cannot be built, or None."""
    if root is None:
        return (
            f"{' and '.join(HEADERS)} are not found; install the CUDA toolkit or set CUDA_HOME, "
            "then run make again after `make clean`"
        )
    if not shutil.which("g++"):
        return "no C++ compiler (g++) is found; install one, then run make again after `make clean`"
    return None


def build_environment(root: Path) -> dict[str, str]:
    """Lets PyCUDA's set-up find this toolkit, whatever else is on the path."""
    libraries = [str(root / "lib64"), str(root / "lib64" / "stubs"), str(root / "lib")]
    return {
        "CUDA_ROOT": str(root),
        "PATH": os.pathsep.join([str(root / "bin"), os.environ.get("PATH", "")]),
        "CPATH": str(root / "include"),
        "LIBRARY_PATH": os.pathsep.join(libraries),
    }


def install(
    needs: Sequence[str], pip_flags: Sequence[str], environment: dict[str, str]
) -> str | None:
    """pip install; None when it worked, else its last line of error."""
    command = [sys.executable, "-P", "-m", "pip", "install", "-q", *pip_flags, *needs]
    # pip is started from an empty folder: in the repository `kernels/` would be importable.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
        )
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return (errors or done.stderr.splitlines() or ["pip failed without a word"])[-1].strip()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
