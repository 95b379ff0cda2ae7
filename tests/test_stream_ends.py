"""A stream of frames that is dropped ends at once, also while a CUDA graph is captured."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stream_calls import clip, run, stream

from mirage_hello.ptx import capture_mode


@pytest.fixture
def no_collector(device: torch.device):
    # The first prediction of memory imports torch's compiler, which keeps its callers' frames.
    run(stream(device), clip(1))
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Owner:
    """Of a graph."""


def test_a_threads_capture_mode_is_relaxed_and_restored(monkeypatch) -> None:
    mode = 0  # global

    def exchange(pointer) -> int:
        nonlocal mode
        mode, pointer._obj.value = pointer._obj.value, mode
        return 0

    driver = SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)
    monkeypatch.setattr(capture_mode.ctypes, "CDLL", lambda name: driver)
    with pytest.raises(KeyError), capture_mode.relaxed():
        assert mode == 2
        raise KeyError
    assert mode == 0
    ended = []
    graph, owner = SimpleNamespace(reset=lambda: ended.append(mode)), Owner()
    capture_mode.ends_with(owner, graph)
    assert ended == []
    del owner
    assert ended == [2] and mode == 0


def test_nothing_is_left_to_the_garbage_collector(device: torch.device, no_collector) -> None:
    of, frames = stream(device), clip(3)
    outputs = run(of, frames)
    outputs += of.run(frames)
    of.submit(frames[0])
    ends = [weakref.ref(part) for part in (of, of._buffers, of._buffers.bus, of._own)]
    del of
    assert [end() for end in ends] == [None] * 4
    assert len(outputs) == 6 and outputs[0].shape == frames[0].shape


@pytest.mark.gpu
def test_streams_end_within_a_capture() -> None:
    """As the collector may do it: the graph, its memory, frames under way and outputs."""
    frames = clip(3)
    streams = [stream("cuda"), stream("cuda", dtype=torch.bfloat16)]
    outputs = [run(of, frames) for of in streams]
    kept = outputs[0][2]
    expected = kept.copy()
    streams[0].submit(frames[0])
    streams[0].submit(frames[1])
    number, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    gc.collect()
    with torch.cuda.graph(graph):
        number.add_(1)
        streams.clear()
        outputs.clear()
        gc.collect()
        number.add_(1)
    graph.replay()
    assert number.tolist() == [2.0] * 4
    again = stream("cuda")  # in the memory of those that ended
    assert np.array_equal(run(again, frames)[2], expected)
    assert np.array_equal(kept, expected)


@pytest.mark.gpu
def test_a_graph_ends_within_a_capture() -> None:
    """The collector's way for a graph that somebody still held in a ring."""
    of = stream("cuda")
    of.push(clip(1)[0])
    ring: list[object] = [of.plan]
    ring.append(ring)
    del of
    number, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        number.add_(1)
        del ring
        gc.collect()
        number.add_(1)
    graph.replay()
    assert number.tolist() == [2.0] * 4
