"""Frames in and out: order under way, the staged way, outputs that are lent.

The tests with a `device` run on a GPU too, there with the captured graph; on a CPU the function
runs in the arena.
"""

import numpy as np
import pytest
import torch
from stream_calls import clip, planned, run

from mirage_hello.model.bus import IN_FLIGHT, LENT, Bus


class FakeCuda:
    """Streams and events whose work is done at once: the bus's staging, on a CPU."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def record(self, *args) -> None:
        pass

    wait = wait_stream = synchronize = record

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args) -> None:
        pass


def test_frames_under_way_come_back_in_order(device: torch.device) -> None:
    frames = clip(6)
    expected = run(planned(device), frames)
    assert np.array_equal(list(planned(device).run(frames)), expected)
    of = planned(device)
    of.submit(frames[0])
    of.submit(frames[1])
    with pytest.raises(RuntimeError, match="2 frames are under way"):
        of.submit(frames[2])
    with pytest.raises(RuntimeError, match="collect the 2 submitted"):
        of.push(frames[2])
    outputs = [of.collect(), of.collect()]
    with pytest.raises(RuntimeError, match="no frame is under way"):
        of.collect()
    assert np.array_equal([*outputs, *run(of, frames[2:])], expected)


def test_tensors_and_sizes_mix_under_way(device: torch.device) -> None:
    small, large = clip(2, 16, 16), clip(2)
    outputs = list(planned(device).run([*small, torch.from_numpy(large[0]), large[1]]))
    assert [o.shape for o in outputs] == [(16, 16, 3)] * 2 + [(32, 40, 3)] * 2
    assert isinstance(outputs[2], torch.Tensor) and isinstance(outputs[3], np.ndarray)


def test_the_staged_way_in_and_out(monkeypatch) -> None:
    for name in ("Stream", "Event", "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeCuda)
    frames = clip(5)
    frame_in, frame_out = (torch.zeros(1, 32, 40, 3, dtype=torch.uint8) for _ in range(2))
    bus = Bus(frame_in, frame_out, FakeCuda())
    outputs = []
    for frame in frames:
        slot = bus.bring(frame)
        frame_out.copy_(255 - frame_in)
        bus.take(slot, type(frame))
        if bus.under_way == 2:
            outputs.append(bus.collect())
    outputs.append(bus.collect())
    assert np.array_equal(outputs, 255 - frames) and bus.under_way == 0
    assert len(bus._free) == 2


@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_outputs_are_lent_and_stay_the_callers(kind: str, monkeypatch) -> None:
    """What the caller holds is never written again; what he drops, views and all, is reused."""
    for name in ("Stream", "Event", "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeCuda)
    frame_in, frame_out = (torch.zeros(1, 8, 8, 3, dtype=torch.uint8) for _ in range(2))
    bus = Bus(frame_in, frame_out, FakeCuda())
    free = bus._outputs._free

    def push(value: int):
        slot = bus.bring(np.full((8, 8, 3), value, np.uint8))
        frame_out.copy_(frame_in)
        bus.take(slot, np.ndarray if kind == "arrays" else torch.Tensor)
        return bus.collect()

    held = [push(value) for value in range(3 * LENT)]
    assert [int(output[0, 0, 0]) for output in held] == [*range(3 * LENT)]
    assert len(free) == IN_FLIGHT  # the rest are copies
    views = [output[2:, 1] for output in held]
    held.clear()
    assert len(free) == IN_FLIGHT
    push(99)
    assert [int(view[0, 0]) for view in views] == [*range(3 * LENT)]
    views.clear()
    assert len(free) == IN_FLIGHT + LENT
