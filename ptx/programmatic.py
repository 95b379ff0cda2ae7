"""Programmatic dependent launch: a kernel starts while the one before it in its stream still runs.

A kernel that executes `griddepcontrol.wait` says by it from where on it needs what the kernel
before it wrote (PTX ISA, "griddepcontrol"). It is launched with the attribute that lets it start
early; without the attribute the instruction does nothing. PyCUDA has no launch attributes and
hands out no function handle, so such a kernel is loaded and launched by the driver's own calls, in
torch's primary context and on torch's own stream. While that stream is being captured, the driver
records the attribute as a programmatic edge from the kernel before it (a full edge from anything
else), because both stand on one stream.

Only captured launches overlap. Convolution and linear layers read their weights before they wait,
which is right where no kernel of the graph writes weights; outside a graph a kernel just before may
have written them (a merged LoRA), and there the host, not the device, is what a launch waits for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BUFFER_POINTER, _BUFFER_SIZE, _BUFFER_END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT

_overlap = True


@contextlib.contextmanager
def without_overlap() -> Iterator[None]:
    """Within the block every kernel starts after the one before it has ended, on all threads.

    It measures what overlap brings; a captured graph keeps what held during its capture.
    """
    global _overlap
    before, _overlap = _overlap, False
    try:
        yield
    finally:
        _overlap = before


def waits(text: str, entry: str) -> bool:
    """Whether the kernel `entry` of a PTX text executes griddepcontrol.wait; comments do not."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    for kernel in text.split(".entry")[1:]:
        if re.match(rf"\s+{re.escape(entry)}\b", kernel):
            return re.search(r"\bgriddepcontrol\.wait\b", kernel) is not None
    return False


class LaunchError(RuntimeError):
    """A call of the driver failed; the text is the driver's name of the error."""


class _Attribute(ctypes.Structure):  # CUlaunchAttribute: 8 + 64 bytes
    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "smem_bytes")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


_ATTRIBUTE = _Attribute(_SERIALIZATION, 0, 1)


class Function:
    """A kernel of a cubin, loaded into the current context, which must be torch's.

    Args:
        code: the cubin. entry: the kernel's name. formats: of `signature.launch_format`.
    Raises:
        LaunchError: the driver refuses the cubin or the name.
    """

    def __init__(self, code: bytes, entry: str, formats: Sequence[str]) -> None:
        self._pack = struct.Struct("<" + "".join(formats)).pack
        module, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code))
        _check(driver.cuModuleGetFunction(ctypes.byref(self._handle), module, entry.encode()))

    def allow_smem(self, smem_bytes: int) -> None:
        """Let a block have this much dynamic shared memory."""
        set_attribute = _driver().cuFuncSetAttribute
        _check(set_attribute(self._handle, _MAX_DYNAMIC_SHARED_SIZE, smem_bytes))

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        smem_bytes: int,
        stream: torch.cuda.Stream,
        values: Sequence[Any],
    ) -> None:
        """Queue the kernel. LaunchError: the driver refuses."""
        arguments = self._pack(*values)
        size = ctypes.c_size_t(len(arguments))
        extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER, ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p),
            _BUFFER_SIZE, ctypes.addressof(size), _BUFFER_END,
        )  # fmt: skip
        overlap = _overlap and torch.cuda.is_current_stream_capturing()
        attribute = ctypes.addressof(_ATTRIBUTE)
        config = _Config(*grid, *block, smem_bytes, stream.cuda_stream, attribute, int(overlap))
        launch = _driver().cuLaunchKernelEx
        code = launch(ctypes.byref(config), self._handle, None, extra)
        if code == _INVALID_CONTEXT:  # a thread in which torch has done nothing yet
            stream.query()
            code = launch(ctypes.byref(config), self._handle, None, extra)
        _check(code)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise LaunchError((name.value or b"unknown error").decode() + f" (CUresult {code})")
