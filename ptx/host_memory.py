"""Write-combined memory of the host, for what the host writes once and the copy engine reads.

Stores go past the caches in whole lines, and the device's reads do not look into them: one thread
copies a frame of 0.8 MB into it in 34 us where ordinary pinned memory takes 56 (a frame just
written, an H200's host; `bench/sweeps/frame_host.py`). Reading it on the host is very slow.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref

import numpy as np
import torch

_WRITE_COMBINED = 4  # CU_MEMHOSTALLOC_WRITECOMBINED
_lock = threading.Lock()
_free: dict[int, list[int]] = {}  # addresses by size: to free one would wait for the device


def write_combined(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array of this shape, for torch's current device.

    Its memory serves again once the last view of it is dropped; it never goes back to the system.
    Raises: MemoryError: the driver has none.
    """
    nbytes = math.prod(shape)
    with _lock:
        found = _free.get(nbytes)
        address = found.pop() if found else _allocate(nbytes)
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    # The array's base, so that it ends with the last view of it.
    weakref.finalize(memory, _give_back, nbytes, address).atexit = False
    return np.asarray(memory).reshape(shape)


def _allocate(nbytes: int) -> int:
    torch.cuda.current_stream().query()  # makes the context current in this thread
    pointer = ctypes.c_void_p()
    allocate = ctypes.CDLL("libcuda.so.1").cuMemHostAlloc
    code = allocate(ctypes.byref(pointer), ctypes.c_size_t(nbytes), _WRITE_COMBINED)
    if code or pointer.value is None:
        raise MemoryError(
            f"write_combined: the driver has no {nbytes} bytes of page-locked memory "
            f"(CUresult {code}); free some, or allow the process more"
        )
    return pointer.value


def _give_back(nbytes: int, address: int) -> None:
    _free.setdefault(nbytes, []).append(address)
