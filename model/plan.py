"""A plan: a function of fixed shapes, recorded once, its buffers in one arena, then replayed.

    plan = Plan(function, device)       runs the function three times: warm, recorded, placed
    plan.run()                          one CUDA-graph launch; on a CPU the function itself
    print(plan)                         every launch in order, and the arena

The recording notes each launch and, for each buffer that the function allocates, when it comes and
when it goes. Buffers that are never alive together share memory: greedy placement, the largest
first, each at the lowest offset that is free for its whole life. Kernels run in the order of one
stream, so a buffer is free for the next kernel as soon as the last one that reads it is queued.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_hello.ptx import capture_mode, loader

ALIGNMENT = 512  # bytes: what torch's own allocator aligns to
MIB = 2**20
# What one plan does before its capture (it frees torch's cache, it waits for the device) would
# break the capture of another.
_one_at_a_time = threading.RLock()
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Launch:
    """One kernel: where in the model, its name, its dimensions (None: torch's own), its tensors."""

    where: str
    name: str
    grid: tuple[int, ...] | None
    block: tuple[int, ...] | None
    smem_bytes: int
    tensors: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) for shape in self.tensors)
        size = ""
        if self.grid and self.block:
            blocks = "x".join(str(n) for n in self.grid)
            threads = self.block[0] * (self.block[1] if len(self.block) > 1 else 1)
            size = f"{blocks} blocks of {threads}, {self.smem_bytes / 1024:.0f} KiB"
        return f"{self.name:24} {size:34} {shapes:60} {self.where}"


@dataclass
class Buffer:
    """A buffer of the function: alive from moment `begin` to `end`, None if it stays."""

    nbytes: int
    begin: int
    end: int | None = None
    offset: int = -1


@dataclass
class Record:
    """What one run of the function did."""

    launches: list[Launch] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    clock: int = 0  # counts allocations and ends, so that no launch is needed to tell them apart

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once: no placement needs less."""
        ended = [b for b in self.buffers if b.end is not None]
        changes = [(b.begin, b.nbytes) for b in ended] + [(b.end or 0, -b.nbytes) for b in ended]
        return max(itertools.accumulate((n for _, n in sorted(changes)), initial=0))

    def __str__(self) -> str:
        lines = [f"{i:4} {launch}".rstrip() for i, launch in enumerate(self.launches)]
        shared = sum(b.nbytes for b in self.buffers if b.end is not None)
        return "\n".join(lines) + (
            f"\n{len(self.launches)} launches; arena {place(self.buffers) / MIB:.1f} MiB for "
            f"{len(self.buffers)} buffers of {shared / MIB:.1f} MiB, at most "
            f"{self.peak_bytes / MIB:.1f} MiB alive at once"
        )


def place(buffers: Sequence[Buffer]) -> int:
    """Give every buffer that ends its offset; returns the bytes of the arena.

    The greedy-by-size placement of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural
    Net Inference", 2020, section 5.2.
    """
    placed: list[Buffer] = []
    for buffer in sorted((b for b in buffers if b.end is not None), key=lambda b: -b.nbytes):
        offset = 0
        for other in sorted((b for b in placed if _meet(b, buffer)), key=lambda b: b.offset):
            if offset + buffer.nbytes <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.nbytes))
        buffer.offset = offset
        placed.append(buffer)
    return max((_aligned(b.offset + b.nbytes) for b in placed), default=0)


def _meet(a: Buffer, b: Buffer) -> bool:
    assert a.end is not None and b.end is not None
    return a.begin < b.end and b.begin < a.end


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Plan:
    """A function as a static plan.

    Args:
        function: takes and returns nothing; reads and writes tensors that live as long as the
            plan. The same launches and allocations at every call.
        device: where it runs.
        modules: name -> module, for the names of the launches.
        graph: capture a CUDA graph; default: on CUDA.
        arena: False: leave the buffers to torch's allocator, and record nothing. For functions
            that torch.compile made: they do not compile while their operations are watched.
    Attributes: record, launches; arena_bytes; graph.
    Raises:
        RuntimeError: the function does not allocate the same at every call.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        modules: Mapping[str, nn.Module] | None = None,
        graph: bool | None = None,
        arena: bool = True,
    ) -> None:
        self._function: Callable[[], Any] | None = function
        self._device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self._arena: Tensor | None = None
        self.record = Record()
        with _one_at_a_time, torch.no_grad():
            self._build(modules or {}, graph, arena)

    def _build(self, modules: Mapping[str, nn.Module], graph: bool | None, arena: bool) -> None:
        function, device = self._function, self._device
        assert function is not None
        with _side_stream(device):
            function()  # builds kernels, lets libraries choose, fills caches: no part of the plan
            if arena:
                self.record = recorded(function, device, modules)
            else:
                function()
        self.launches = self.record.launches
        self.arena_bytes = place(self.record.buffers)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the runs needed, before the arena takes its place
        if arena:
            self._arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=device)
        if device.type == "cuda" if graph is None else graph:
            self._capture()

    def run(self) -> None:
        """Run the function in the arena, on torch's current stream."""
        if self.graph is not None:
            self.graph.replay()
        else:
            assert self._function is not None
            with torch.no_grad(), self._served():
                self._function()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: another stream's thread may go on allocating meanwhile.
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
        assert self._function is not None
        with torch.no_grad(), capture, _nothing_collected(), self._served():
            self._function()
        self.graph = graph
        # The function holds its stream, which holds this plan: without it a stream that is dropped
        # ends at once and not when the garbage collector finds the ring, maybe in another capture.
        self._function = None
        capture_mode.ends_with(self, graph)

    def _served(self) -> contextlib.AbstractContextManager[Any]:
        if self._arena is None:
            return contextlib.nullcontext()
        return _Served(self.record, self._arena)

    def __str__(self) -> str:
        return str(self.record)


def recorded(
    function: Callable[[], Any], device: torch.device, modules: Mapping[str, nn.Module]
) -> Record:
    """Run the function and note its launches and its buffers."""
    record = Record()
    where = _Path(modules)

    def launched(name: str, entry: str, grid: Any, block: Any, args: Any, smem: int) -> None:
        found = [a if isinstance(a, Tensor) else getattr(a, "tensor", None) for a in args]
        shapes = tuple(tuple(t.shape) for t in found if t is not None)
        record.launches.append(Launch(where.name, entry, tuple(grid), tuple(block), smem, shapes))

    with where.followed(), loader.watched(launched), _Recorded(record, device, where):
        function()
    return record


class _Recorded(TorchDispatchMode):
    """Notes the allocations on a device, and torch's own operations as launches."""

    def __init__(self, record: Record, device: torch.device, where: _Path) -> None:
        super().__init__()
        self.record, self.type, self.where = record, device.type, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _ALLOCATE:
            if out.device.type == self.type:
                self._allocated(out)
        elif isinstance(out, Tensor | list | tuple | None) and not _is_view(func):
            shapes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
            self.record.launches.append(
                Launch(self.where.name, f"torch {name}", None, None, 0, shapes)
            )
        return out

    def _allocated(self, tensor: Tensor) -> None:
        storage, record = tensor.untyped_storage(), self.record
        record.clock += 1
        buffer = Buffer(storage.nbytes(), record.clock)
        record.buffers.append(buffer)

        def ended() -> None:
            record.clock += 1
            buffer.end = record.clock

        weakref.finalize(storage, ended).atexit = False


class _Served(TorchDispatchMode):
    """Answers the recorded allocations, in their order, with their places in the arena."""

    def __init__(self, record: Record, arena: Tensor) -> None:
        super().__init__()
        self.buffers, self.arena = iter(record.buffers), arena

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ not in _ALLOCATE:
            return func(*args, **kwargs)
        like = func(*args, **{**kwargs, "device": "meta", "pin_memory": False})
        wanted = kwargs.get("device") or next(
            (a.device for a in args if isinstance(a, Tensor)), torch.device("cpu")
        )
        if torch.device(wanted).type != self.arena.device.type:
            return func(*args, **kwargs)
        buffer, nbytes = next(self.buffers, None), like.untyped_storage().nbytes()
        if buffer is None or buffer.nbytes != nbytes:
            expected = "no more buffers" if buffer is None else f"{buffer.nbytes} bytes"
            raise RuntimeError(
                f"Plan: the function must allocate the same at every call (got {nbytes} bytes, "
                f"expected {expected}); keep what depends on values out of it"
            )
        if buffer.end is None or not nbytes:
            return func(*args, **kwargs)
        space = self.arena[buffer.offset : buffer.offset + nbytes].view(like.dtype)
        return space.as_strided(like.shape, like.stride())


def _is_view(func: Any) -> bool:
    """Whether an ATen operation returns its input's memory and writes nothing."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


class _Path:
    """Which module of the model is running, on this thread."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._names = {
            module: f"{prefix}.{name}".strip(".")
            for prefix, root in modules.items()
            for name, module in root.named_modules()
        }
        self._stack: list[str] = []
        self._thread = threading.get_ident()

    @property
    def name(self) -> str:
        return self._stack[-1] if self._stack else "frame"

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Within the block, forward calls of the modules are followed."""
        enter = module_hooks.register_module_forward_pre_hook(self._enter)
        leave = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread and module in self._names:
            self._stack.append(self._names[module])

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == self._thread and module in self._names:
            self._stack.pop()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage collection within the block: the end of an old graph or of pinned memory, in the
    thread that captures, would end the capture too."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on CUDA, as a capture wants its warm-up; ordered with the current one."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
    side.synchronize()
