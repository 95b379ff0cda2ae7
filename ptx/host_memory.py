"""Page-locked memory of the host, which the device's copy engine reads and writes by itself.

Memory that is dropped serves again, and no call of CUDA is made for it: a free would wait for the
device, and would end the capture of a graph if the garbage collector made it just then.

Write-combined memory is for what the host writes once and the device reads. Stores go past the
caches in whole lines, and the device's reads do not look into them: one thread copies a frame of
0.8 MB into it in 34 us where ordinary page-locked memory takes 56 (a frame just written, an H200's
host; `bench/sweeps/frame_host.py`). Reading it on the host is very slow.
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
_free: dict[tuple[int, int], list[int]] = {}  # (bytes, flags) -> addresses


def page_locked(shape: tuple[int, ...], write_combined: bool = False) -> np.ndarray:
    """An uninitialised uint8 array of this shape, for torch's current device.

    Its memory serves again once the last view of it is dropped, so nothing on the device may still
    be writing it then. Raises: MemoryError: the driver has none.
    """
    key = math.prod(shape), _WRITE_COMBINED if write_combined else 0
    with _lock:
        found = _free.setdefault(key, [])
        address = found.pop() if found else _allocate(*key)
    memory = (ctypes.c_ubyte * key[0]).from_address(address)
    # The array's base, so that it ends with the last view of it.
    weakref.finalize(memory, found.append, address).atexit = False
    return np.asarray(memory).reshape(shape)


def _allocate(nbytes: int, flags: int) -> int:
    torch.cuda.current_stream().query()  # makes the context current in this thread
    pointer = ctypes.c_void_p()
    allocate = ctypes.CDLL("libcuda.so.1").cuMemHostAlloc
    code = allocate(ctypes.byref(pointer), ctypes.c_size_t(nbytes), flags)
    if code or pointer.value is None:
        raise MemoryError(
            f"page_locked: the driver has no {nbytes} bytes of page-locked memory "
            f"(CUresult {code}); free some, or allow the process more"
        )
    return pointer.value
