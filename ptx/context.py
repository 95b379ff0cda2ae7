"""PyCUDA inside torch's CUDA context, on torch's current stream. Only this module imports PyCUDA.

Facts of PyCUDA (2026.1) that shape it:
- Modules and streams belong to the context on top of PyCUDA's own stack, which is per thread. We
  retain the device's primary context, the one torch uses, and push it only while we create or
  destroy; a context left on the stack would abort the process when the thread ends.
- It launches on the legacy default stream or on a stream it created itself, never on a foreign
  one. torch's default stream is the legacy one. For any other (side streams, a stream that is
  being captured into a CUDA graph) we keep one PyCUDA stream per torch stream and join the two
  with events: fork, launch, join. Captured into a graph this leaves a plain chain of kernels.
"""

import atexit
import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock = threading.RLock()
_contexts: dict[int, Any] = {}
_streams: dict[tuple[int, int], tuple[Any, torch.cuda.ExternalStream]] = {}
_spare_streams: dict[int, list[tuple[Any, torch.cuda.ExternalStream]]] = {}
_keep: list[Any] = []
# Made with the context, so that a capture, which has a stream of its own, need not create one.
SPARE_STREAMS = 8
_SET_CAPTURE_DEPENDENCIES = 1  # CU_STREAM_SET_CAPTURE_DEPENDENCIES


class DriverError(RuntimeError):
    """There is no way to run a hand-written kernel here; the text says what is missing."""


def pycuda_driver() -> Any:
    """The module pycuda.driver, initialised. DriverError says what is missing."""
    try:
        import pycuda.driver as driver
    except ImportError as error:
        missing = "the NVIDIA driver" if "libcuda" in str(error) else "PyCUDA"
        remedy = "" if "libcuda" in str(error) else "; pip install 'mirage-hello[cuda]'"
        raise DriverError(f"hand-written kernels need {missing}: {error}{remedy}") from error
    driver.init()
    return driver


@contextlib.contextmanager
def active(device: int) -> Iterator[Any]:
    """Within the block, torch's primary context of `device` is PyCUDA's current context."""
    driver = pycuda_driver()
    with _lock, torch.cuda.device(device):
        if device not in _contexts:
            torch.cuda.current_stream(device).query()  # torch makes its context first
            _contexts[device] = driver.Device(device).retain_primary_context()
        _contexts[device].push()
        try:
            if device not in _spare_streams:
                spare = [_make_stream(driver, device) for _ in range(SPARE_STREAMS)]
                _spare_streams[device] = spare
            yield driver
        finally:
            driver.Context.pop()


def keep(resource: Any) -> None:
    """Hold a module until exit, where it is released in an order that PyCUDA survives."""
    _keep.append(resource)


@contextlib.contextmanager
def launch_stream(device: int) -> Iterator[Any]:
    """The PyCUDA stream (None: the legacy default) whose work is ordered as torch's current one's.

    Whatever torch queued before comes before it; whatever torch queues afterwards comes after.
    """
    current = torch.cuda.current_stream(device)
    if current.cuda_stream == 0:
        yield None
        return
    stream, external = _streams.get((device, current.cuda_stream)) or _new_stream(device, current)
    external.wait_stream(current)
    capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        _depend_like(external, current)
    yield stream
    current.wait_stream(external)
    if capturing:
        _depend_like(current, external)


def _depend_like(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    """Captured work that follows on `stream` shall depend on what `other`'s does, no more.

    A wait adds to a capturing stream's dependencies and takes none away: after n launches, the
    next would have an edge from each of them, and a graph of small kernels would run at half its
    speed (measured on an H200: 2.3 us a node against 1.4).
    """
    driver = ctypes.CDLL("libcuda.so.1")
    status, serial, count = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_size_t()
    graph, nodes = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_void_p)()
    code = driver.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(other.cuda_stream), ctypes.byref(status), ctypes.byref(serial),
        ctypes.byref(graph), ctypes.byref(nodes), ctypes.byref(count),
    )  # fmt: skip
    code = code or driver.cuStreamUpdateCaptureDependencies(
        ctypes.c_void_p(stream.cuda_stream), nodes, count, _SET_CAPTURE_DEPENDENCIES
    )
    if code:
        raise DriverError(f"the dependencies of a capture cannot be set (CUresult {code})")


def _new_stream(device: int, current: torch.cuda.Stream) -> tuple[Any, torch.cuda.ExternalStream]:
    with active(device) as driver:
        key = (device, current.cuda_stream)
        if key not in _streams:
            spare = _spare_streams.setdefault(device, [])
            _streams[key] = spare.pop() if spare else _make_stream(driver, device)
    return _streams[key]


def _make_stream(driver: Any, device: int) -> tuple[Any, torch.cuda.ExternalStream]:
    # Flag 1, CU_STREAM_NON_BLOCKING: no hidden order against the legacy default stream, which a
    # capture forbids; the joins above are the only order there is.
    stream = driver.Stream(1)
    return stream, torch.cuda.ExternalStream(stream.handle, device=device)


@atexit.register
def _release() -> None:
    """Unload modules and streams with their context current, then let the contexts go."""
    for device in list(_contexts):
        with active(device):
            _streams.clear()
            _spare_streams[device].clear()
            _keep.clear()
    _contexts.clear()
