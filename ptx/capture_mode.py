"""What a thread may do while a CUDA graph is captured."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Within the block this thread may free graphs and wait for events while one is captured.

    The driver takes such calls for mistakes, and ends the capture, because they would wait for work
    that has not been submitted. Python's garbage collector makes them at any time; what it frees is
    no part of the capture.
    """
    mode = ctypes.c_int(_RELAXED)
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def ends_with(owner: object, graph: Any) -> None:
    """The graph, a torch.cuda.CUDAGraph, ends when its owner does, whatever is captured then."""
    weakref.finalize(owner, _end, graph).atexit = False


def _end(graph: Any) -> None:
    with relaxed():
        graph.reset()
