"""What the host does for one frame, call by call: `python3.12 bench/sweeps/frame_host.py OUT.json`.

Every call is timed in its place: behind a whole frame that has been waited for, so that caches and
sleeping threads are as a stream finds them. 880m, 512x512, one step; about 20 s.
"""

import ctypes
import functools
import itertools
import json
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from mirage_hello.bench import bus
from mirage_hello.model import FrameStream, build
from mirage_hello.model.frame_buffers import check_frame

FRAMES = 120
SIZE = (512, 512)
NBYTES = SIZE[0] * SIZE[1] * 3
WRITE_COMBINED = 4  # CU_MEMHOSTALLOC_WRITECOMBINED


class Pieces:
    """Times calls, each after a frame from `source` through the graph; prints and keeps them."""

    def __init__(self, stream: FrameStream, found: dict[str, Any]) -> None:
        buffers = stream._buffers
        assert buffers is not None and buffers.plan is not None and buffers.plan.graph is not None
        self.found, self.frame_in, self.graph = found, buffers.frame_in[0], buffers.plan.graph
        self.source = buffers.bus._free[0].host_in.tensor

    def time(self, name: str, call: Callable[[], Any], before: Any = lambda: None) -> None:
        spans, cpu = [], time.process_time()
        begun = time.perf_counter()
        for _ in range(FRAMES):
            self.frame_in.copy_(self.source, non_blocking=True)
            self.graph.replay()
            before()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            spans.append((time.perf_counter() - begin) * 1e6)
        cores = (time.process_time() - cpu) / (time.perf_counter() - begun)
        torch.cuda.synchronize()
        p10, p50, p90 = np.percentile(spans, (10, 50, 90))
        self.found[name] = {"p10": p10, "p50": p50, "p90": p90, "cores": cores}
        print(f"{p10:8.1f} {p50:8.1f} {p90:8.1f} us {cores:5.1f} cores  {name}", flush=True)


def copies(pieces: Pieces, frames: np.ndarray) -> None:
    """A frame of the caller's memory into memory that the copy engine reads."""
    pinned, plain = pieces.source, pieces.source.numpy()
    turn = itertools.cycle(range(len(frames)))
    fresh = np.empty_like(frames[0])

    def write_fresh() -> None:  # as a camera or a decoder does just before
        np.copyto(fresh, frames[next(turn)])

    pieces.time("copy: NumPy, cold", lambda: np.copyto(plain, frames[next(turn)]))
    pieces.time("copy: NumPy, just written", lambda: np.copyto(plain, fresh), write_fresh)
    address = fresh.ctypes.data
    into = plain.ctypes.data
    pieces.time("copy: memmove, cold", lambda: _move(into, frames[next(turn)].ctypes.data))
    pieces.time("copy: memmove, just written", lambda: _move(into, address), write_fresh)
    default = torch.get_num_threads()
    source, tensor = [torch.from_numpy(frame) for frame in frames], torch.from_numpy(fresh)
    for threads in sorted({default, 8, 4, 2, 1}, reverse=True):
        torch.set_num_threads(threads)
        name = f"copy: torch, {threads} threads"
        pieces.time(f"{name}, cold", lambda: pinned.copy_(source[next(turn)]))
        pieces.time(f"{name}, just written", lambda: pinned.copy_(tensor), write_fresh)
    torch.set_num_threads(default)
    device_frame = pieces.frame_in
    upload = lambda: device_frame.copy_(source[next(turn)], non_blocking=True)  # noqa: E731
    pieces.time("copy: by the driver from pageable memory, cold", upload)
    splits = [SplitCopy(helpers, plain) for helpers in (1, 3)]
    for split in splits:
        name = f"copy: {len(split.threads)} threads of our own"
        pieces.time(name, functools.partial(_call_with_next, split, itertools.cycle(frames)))
        split.end()
    cold, warm = itertools.cycle(frames), itertools.repeat(fresh)
    for name, memory in (("write-combined", _write_combined()), ("huge pages", _huge_pages())):
        if memory is None:
            print(f"no {name} memory here", flush=True)
            continue
        kept, view = pieces.source, np.frombuffer(memory, np.uint8, NBYTES).reshape(plain.shape)
        pieces.source = torch.from_numpy(view)
        copy = functools.partial(_call_with_next, functools.partial(np.copyto, view))
        pieces.time(f"copy: into {name}, cold", lambda: copy(cold))  # noqa: B023
        pieces.time(f"copy: into {name}, just written", lambda: copy(warm), write_fresh)  # noqa: B023
        pieces.source = kept


def _call_with_next(call: Callable[[np.ndarray], Any], frames: Iterator[np.ndarray]) -> None:
    call(next(frames))


def _move(into: int, source: int) -> None:
    ctypes.memmove(into, source, NBYTES)


class SplitCopy:
    """A copy in equal parts, by this thread and sleeping helpers."""

    def __init__(self, helpers: int, into: np.ndarray) -> None:
        self.into, self.source = into, into
        self.parts = [slice(*part) for part in itertools.pairwise(
            len(into) * i // (helpers + 1) for i in range(helpers + 2))]  # fmt: skip
        self.begin = [threading.Lock() for _ in range(helpers)]
        self.ended = [threading.Lock() for _ in range(helpers)]
        for lock in (*self.begin, *self.ended):
            lock.acquire()
        self.threads = [threading.Thread(target=self._help, args=(i,)) for i in range(helpers)]
        for thread in self.threads:
            thread.start()

    def _help(self, i: int) -> None:
        part = self.parts[i + 1]
        while self.begin[i].acquire() and self.source is not None:
            np.copyto(self.into[part], self.source[part])
            self.ended[i].release()

    def __call__(self, source: np.ndarray) -> None:
        self.source = source
        for lock in self.begin:
            lock.release()
        np.copyto(self.into[self.parts[0]], source[self.parts[0]])
        for lock in self.ended:
            lock.acquire()

    def end(self) -> None:
        self.source = None  # type: ignore[assignment]
        for lock in self.begin:
            lock.release()
        for thread in self.threads:
            thread.join()


def _write_combined() -> Any:
    pointer = ctypes.c_void_p()
    driver = ctypes.CDLL("libcuda.so.1")
    if driver.cuMemHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(NBYTES), WRITE_COMBINED):
        return None
    assert pointer.value is not None
    return (ctypes.c_ubyte * NBYTES).from_address(pointer.value)


def _huge_pages() -> Any:
    size = 2 * 2**20
    memory = mmap.mmap(-1, 3 * size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    at = -start % size
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        print(error, flush=True)
        return None
    part = (ctypes.c_ubyte * size).from_buffer(memory, at)
    ctypes.memset(part, 0, size)
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuMemHostRegister_v2(part, ctypes.c_size_t(size), 0)
    return None if code else part


def calls(pieces: Pieces, stream: FrameStream) -> None:
    """What is queued, by torch and by the driver's own calls."""
    buffers, own = stream._buffers, stream._own.cuda
    assert buffers is not None and own is not None
    frame_in, frame_out, draws = buffers.frame_in[0], buffers.frame_out[0], buffers.draws
    pinned, outputs = pieces.source, buffers.bus._outputs
    event, down = torch.cuda.Event(), torch.empty_like(pinned).pin_memory()
    event.record(own)
    array = pinned.numpy()

    def scope(of: Any) -> None:
        with of:
            pass

    def lend() -> None:
        outputs.lend(outputs.take())

    pieces.time("scope: ours", lambda: scope(stream._own))
    pieces.time("scope: torch", lambda: scope(torch.cuda.stream(own)))
    pieces.time("scope: torch, ordered", lambda: scope(stream._own.ordered()))
    pieces.time("noise: torch", lambda: draws.normal_(generator=stream._generator))
    noise = torch.cuda.CUDAGraph()
    noise.register_generator_state(stream._generator)
    with torch.cuda.graph(noise, capture_error_mode="thread_local"):
        draws.normal_(generator=stream._generator)
    pieces.time("noise: a graph of its own", noise.replay)
    pieces.time("upload: torch", lambda: frame_in.copy_(pinned, non_blocking=True))
    pieces.time("graph: torch", pieces.graph.replay)
    pieces.time("download: torch", lambda: down.copy_(frame_out, non_blocking=True))
    pieces.time("event: torch, record", lambda: event.record(own))
    pieces.time("event: torch, wait for a past one", event.synchronize)
    pieces.time("lend an output and take it back", lend)
    pieces.time("check the frame", lambda: check_frame(array))
    pieces.time("is it pinned", pinned.is_pinned)
    pieces.time("the policy", stream._wanted)
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(own.cuda_stream)
    host, size = ctypes.c_void_p(pinned.data_ptr()), ctypes.c_size_t(NBYTES)
    back = ctypes.c_void_p(down.data_ptr())
    into, out = ctypes.c_void_p(frame_in.data_ptr()), ctypes.c_void_p(frame_out.data_ptr())
    queued: dict[str, tuple[Any, ...]] = {
        "upload": (driver.cuMemcpyHtoDAsync_v2, into, host, size, handle),
        "download": (driver.cuMemcpyDtoHAsync_v2, back, out, size, handle),
        "event, record": (driver.cuEventRecord, ctypes.c_void_p(event.cuda_event), handle),
        "event, wait for a past one": (
            driver.cuEventSynchronize, ctypes.c_void_p(event.cuda_event),
        ),
        "is it pinned": (driver.cuPointerGetAttribute, ctypes.byref(ctypes.c_int()), 2, host),
    }  # fmt: skip
    try:
        executable = ctypes.c_void_p(pieces.graph.raw_cuda_graph_exec())
        queued["graph"] = (driver.cuGraphLaunch, executable, handle)
    except (AttributeError, RuntimeError) as error:
        print("torch does not hand out the executable graph:", error, flush=True)
    for name, (function, *arguments) in queued.items():
        codes: set[int] = set()
        pieces.time(f"{name}: driver", lambda: codes.add(function(*arguments)))  # noqa: B023
        if codes != {0}:
            print(name, "failed", codes, flush=True)


def submit_under_way(stream: FrameStream, frames: list[Any]) -> dict[str, float]:
    """Microseconds of `submit` while another frame is computed."""
    spans = []
    stream.submit(frames[0])
    for frame in frames[1:]:
        begin = time.perf_counter()
        stream.submit(frame)
        spans.append((time.perf_counter() - begin) * 1e6)
        stream.collect()
    stream.collect()
    return {"p50": float(np.percentile(spans, 50)), "p99": float(np.percentile(spans, 99))}


def main(out: str) -> int:
    stream = FrameStream(*build("880m", 0, torch.bfloat16, "cuda"), size=SIZE)
    frames = np.random.default_rng(0).integers(0, 256, (64, *SIZE, 3), dtype=np.uint8)
    for frame in frames[:20]:
        stream.push(frame)
    with open("/proc/cpuinfo") as f:
        cpu = next(line for line in f if line.startswith("model name")).split(":")[1].strip()
    found: dict[str, Any] = {"cpu": cpu, "torch": torch.__version__}
    found["threads"] = torch.get_num_threads()
    print(found, flush=True)
    source = {"numpy": list(frames), "pinned": [torch.from_numpy(f).pin_memory() for f in frames]}
    for name, some in source.items():
        found[f"host_us {name}"] = result = bus.host_us(stream, [*some, *some])
        result["submit_under_way"] = submit_under_way(stream, [*some, *some])
        print(f"host_us {name}", result, flush=True)
    pieces = Pieces(stream, found)
    with torch.no_grad(), stream._own:
        for measure in (lambda: calls(pieces, stream), lambda: copies(pieces, frames)):
            measure()
            with open(out, "w") as f:
                json.dump(found, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
