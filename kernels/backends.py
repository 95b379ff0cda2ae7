"""Which backends this machine can use, and the reason for each that it cannot."""

import ctypes
import functools
import importlib
import os

import torch

BACKENDS = ("torch", "triton", "cuda", "ptx", "cupy", "numba", "ptx-emulated")


@functools.cache
def unavailable(backend: str, device_type: str) -> str | None:
    """None when `backend` works on a device of this type here, else the reason, one sentence.

    Args:
        backend: one of BACKENDS.
        device_type: "cuda" or "cpu".
    """
    return _CHECKS[backend](device_type)


def import_error(module: str) -> str | None:
    """The reason why `module` cannot be imported here, or None."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"import {module} fails ({error})"
    return None


def _torch(device_type: str) -> str | None:
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _triton(device_type: str) -> str | None:
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton runs on CUDA tensors only (or with TRITON_INTERPRET=1, slowly, on a CPU)"
    return _torch(device_type) or import_error("triton")


def _driver(device_type: str) -> str | None:
    if device_type != "cuda":
        return "needs CUDA tensors (got CPU tensors)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver: libcuda.so.1 is not found; install the NVIDIA driver"
    return _torch(device_type)


def _ptx(device_type: str) -> str | None:
    if device_type != "cuda":
        return "needs CUDA tensors (got CPU tensors); on a CPU choose ptx-emulated"
    reason = _driver(device_type) or import_error("pycuda.driver")
    if reason and "pycuda" in reason:
        return f"{reason}; pip install 'mirage-hello[cuda]'"
    return reason


def _cuda(device_type: str) -> str | None:
    if device_type != "cuda":
        return _driver(device_type)
    reason = _ptx(device_type) or import_error("cuda.bindings.nvrtc")
    if reason and "cuda.bindings" in reason:
        return f"{reason}; pip install 'mirage-hello[cuda]'"
    return reason


def _cupy(device_type: str) -> str | None:
    return _driver(device_type) or import_error("cupy")


def _numba(device_type: str) -> str | None:
    if device_type == "cuda":
        return _driver(device_type) or import_error("numba.cuda") or _numba_cuda_fails()
    return import_error("numba")


def _numba_cuda_fails() -> str | None:
    """Compile an empty kernel: numba-cuda imports beside a NumPy that it cannot work with."""
    from numba import cuda

    try:
        cuda.compile_ptx(lambda: None, (), cc=(8, 0))
    except AttributeError as error:
        return f"numba-cuda does not work with this NumPy ({error}); install an older NumPy"
    return None


def _ptx_emulated(device_type: str) -> str | None:
    if device_type != "cpu":
        return "the emulator runs on CPU tensors only; on this device choose ptx"
    return import_error("mirage_hello.ptx.emulator")


_CHECKS = {
    "torch": _torch,
    "triton": _triton,
    "cuda": _cuda,
    "ptx": _ptx,
    "cupy": _cupy,
    "numba": _numba,
    "ptx-emulated": _ptx_emulated,
}
