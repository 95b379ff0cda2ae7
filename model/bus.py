"""Frames in and out of the device: at most two under way, and nothing that a host waits for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirage_hello.ptx import capture_mode
from mirage_hello.ptx.host_memory import page_locked

IN_FLIGHT = 2  # frames: one is computed while its neighbours are on the bus
LENT = 6  # outputs that a caller may hold without a copy; 0.8 MB of pinned memory each at 512x512


class Pinned(NamedTuple):
    """One frame [H, W, 3] in pinned memory, as torch and as NumPy see it."""

    tensor: Tensor
    array: np.ndarray
    interface: dict[str, Any]  # the array's, as NumPy's protocol wants it

    @staticmethod
    def like(frame: Tensor) -> Pinned:
        """Memory for a frame of this shape; not pinned for a frame on the host."""
        shape = tuple(frame.shape)
        on_host = not frame.is_cuda
        array = np.empty(shape, np.uint8) if on_host else page_locked(shape)
        return Pinned(torch.from_numpy(array), array, array.__array_interface__)


@dataclass(eq=False)
class _Slot:
    """One frame on its way: pinned memory, staging copies on the device, stations it passed."""

    host_in: Pinned
    staged_in: Tensor
    staged_out: Tensor
    uploaded: Any  # torch.cuda.Event
    computed: Any
    downloaded: Any
    host_out: Pinned | None = None  # of `Outputs`, while the frame is under way
    lent_in: Tensor | None = None  # the caller's pinned frame, likewise


class Outputs:
    """Pinned memory for outputs: lent to the caller as it is, taken back when he drops it.

    A copy of 0.8 MB into fresh memory costs the host 0.1 ms and more, most of it page faults.
    """

    def __init__(self, like: Tensor) -> None:
        self._free = deque(Pinned.like(like) for _ in range(IN_FLIGHT + LENT))

    def take(self) -> Pinned:
        """Memory to download into; until it is lent it is the taker's."""
        return self._free.popleft()

    def lend(self, memory: Pinned) -> np.ndarray:
        """The caller's: an array over the same memory, or a copy if he holds too many already."""
        if len(self._free) < IN_FLIGHT:
            self._free.append(memory)
            return memory.array.copy()
        return np.asarray(_Loan(memory, self._free))


class _Loan:
    """What NumPy's and torch's views of lent memory hold; it ends with the last of them."""

    __slots__ = ("__array_interface__", "_free", "_memory")

    def __init__(self, memory: Pinned, free: deque[Pinned]) -> None:
        self._memory, self._free = memory, free
        self.__array_interface__ = memory.interface

    def __del__(self) -> None:
        self._free.append(self._memory)


class Bus:
    """Frames in and out: at most two under way, each direction on a copy stream of its own.

    The graph reads and writes `frame_in` and `frame_out`. With another frame under way, staging
    copies on the device (about 1 us each) free them at once, so that a frame can come while the one
    before it is computed, and leave while the next one is. With none there is nothing to overlap:
    the frame takes the short way, in order on the stream of the graph. On a CPU nothing is staged.

    Args:
        frame_in, frame_out: uint8 [1, H, W, 3].
        stream: of the graph, torch's current one in `bring` and `take`; None: on a CPU.
    """

    def __init__(self, frame_in: Tensor, frame_out: Tensor, stream: Any = None) -> None:
        self._frame_in, self._frame_out, self._stream = frame_in[0], frame_out[0], stream
        self._free: list[_Slot] = []
        self._under_way: deque[tuple[_Slot | None, type, Tensor | None]] = deque()
        if stream is not None:
            self._up, self._down = (torch.cuda.Stream(frame_in.device) for _ in range(2))
            self._free = [_slot(frame_in[0]) for _ in range(IN_FLIGHT)]
            self._outputs = Outputs(frame_out[0])
            for copies in (self._up, self._down):  # after whatever the memory was used for before
                copies.wait_stream(torch.cuda.current_stream())

    @property
    def under_way(self) -> int:
        """Frames taken and not collected."""
        return len(self._under_way)

    def __del__(self) -> None:
        for slot, *_ in self._under_way:  # nobody else may have the memory while it is written
            if slot is not None:
                with capture_mode.relaxed():
                    slot.downloaded.synchronize()

    def bring(self, frame: np.ndarray | Tensor) -> _Slot | None:
        """Queue the way of a frame into `frame_in`; the slot goes to `take`.

        A tensor in pinned memory is read where it is, so it must stay as it is until its output is
        collected; anything else is copied at once.
        """
        if isinstance(frame, Tensor) and frame.device == self._frame_in.device:
            self._frame_in.copy_(frame)
            return None
        if self._stream is None:
            _copy(self._frame_in, frame)
            return None
        slot, source = self._free[-1], self._free[-1].host_in.tensor
        if isinstance(frame, Tensor) and frame.is_pinned() and frame.is_contiguous():
            slot.lent_in = source = frame
        else:
            _copy(source, frame)
        if not self._under_way:
            self._frame_in.copy_(source, non_blocking=True)
            return slot
        torch.cuda.set_stream(self._up)
        try:
            slot.staged_in.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(self._stream)
        slot.uploaded.record(self._up)
        slot.uploaded.wait(self._stream)
        self._frame_in.copy_(slot.staged_in)
        return slot

    def take(self, slot: _Slot | None, kind: type) -> None:
        """Queue the way of `frame_out` to the caller, as `kind`: np.ndarray or Tensor."""
        if slot is None:
            self._under_way.append((None, kind, self._frame_out.clone()))
            return
        self._free.remove(slot)
        slot.host_out = self._outputs.take()
        if not self._under_way:
            slot.host_out.tensor.copy_(self._frame_out, non_blocking=True)
            slot.downloaded.record(self._stream)
        else:
            slot.staged_out.copy_(self._frame_out)
            slot.computed.record(self._stream)
            slot.computed.wait(self._down)
            torch.cuda.set_stream(self._down)
            try:
                slot.host_out.tensor.copy_(slot.staged_out, non_blocking=True)
            finally:
                torch.cuda.set_stream(self._stream)
            slot.downloaded.record(self._down)
        self._under_way.append((slot, kind, None))

    def collect(self) -> Any:
        """The oldest frame under way, once it is here; owned by the caller."""
        slot, kind, result = self._under_way.popleft()
        as_tensor = issubclass(kind, Tensor)
        if slot is not None:
            assert slot.host_out is not None
            slot.downloaded.synchronize()
            array = self._outputs.lend(slot.host_out)
            slot.host_out = slot.lent_in = None
            self._free.append(slot)
            return torch.from_numpy(array) if as_tensor else array
        assert result is not None
        if result.is_cuda:  # made on the stream's own CUDA stream, used on the caller's
            result.record_stream(torch.cuda.current_stream(result.device))
        return result if as_tensor else result.numpy()


def _copy(memory: Tensor, frame: np.ndarray | Tensor) -> None:
    """By torch's threads where it can see the array: on an H200's host 20 us with four of them
    instead of NumPy's 67 for 0.8 MB (`bench/sweeps/frame_host.py`)."""
    if isinstance(frame, Tensor):
        memory.copy_(frame)
    elif frame.flags.writeable and min(frame.strides) >= 0:
        memory.copy_(torch.from_numpy(frame))
    else:  # read-only and mirrored arrays
        np.copyto(memory.numpy(), frame)


def _slot(frame: Tensor) -> _Slot:
    # Empty: nothing that a copy stream would have to wait for is queued for this memory.
    host_in = Pinned.like(frame)
    staged = [torch.empty_like(frame) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(3)]
    return _Slot(host_in, staged[0], staged[1], events[0], events[1], events[2])
