"""Page-locked memory of the host, which the device's copy engine reads and writes by itself.

Memory that is dropped serves again, and no call of CUDA is made for it: a free would wait for the
device, and would end the capture of a graph if the garbage collector made it just then.

Write-combined memory was tried for what the host writes and the device reads: one thread copies a
frame faster into it, but torch's threads, several at once, do not (`docs/plan.md`).
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref

import numpy as np
import torch

_lock = threading.Lock()
_free: dict[int, list[int]] = {}  # bytes -> addresses


def page_locked(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array of this shape, for torch's current device.

    Its memory serves again once the last view of it is dropped, so nothing on the device may still
    be writing it then. Raises: MemoryError: the driver has none.
    """
    nbytes = math.prod(shape)
    with _lock:
        found = _free.setdefault(nbytes, [])
        address = found.pop() if found else _allocate(nbytes)
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    # The array's base, so that it ends with the last view of it.
    weakref.finalize(memory, found.append, address).atexit = False
    return np.asarray(memory).reshape(shape)


def _allocate(nbytes: int) -> int:
    torch.cuda.current_stream().query()  # makes the context current in this thread
    pointer = ctypes.c_void_p()
    allocate = ctypes.CDLL("libcuda.so.1").cuMemHostAlloc
    code = allocate(ctypes.byref(pointer), ctypes.c_size_t(nbytes), 0)
    if code or pointer.value is None:
        raise MemoryError(
            f"page_locked: the driver has no {nbytes} bytes of page-locked memory "
            f"(CUresult {code}); free some, or allow the process more"
        )
    return pointer.value
