"""Page-locked memory: what is written arrives on the device, what is dropped is used again."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mirage_hello.ptx import host_memory


def test_memory_is_reused_once_its_last_view_is_gone(monkeypatch) -> None:
    made = []

    def allocate(nbytes: int) -> int:
        made.append(ctypes.create_string_buffer(nbytes))
        return ctypes.addressof(made[-1])

    monkeypatch.setattr(host_memory, "_allocate", allocate)
    monkeypatch.setattr(host_memory, "_free", {})
    first = host_memory.page_locked((4, 15, 3))
    second = host_memory.page_locked((4, 15, 3))
    addresses = [array.ctypes.data for array in (first, second)]
    assert first.shape == (4, 15, 3) and first.dtype == np.uint8 and first.flags.writeable
    assert len(set(addresses)) == 2
    views = [torch.from_numpy(first)[1:], first[2]]
    del first
    views.pop()
    assert host_memory.page_locked((180,)).ctypes.data not in addresses  # a view is left
    views.clear()
    again = host_memory.page_locked((60, 3))
    assert again.ctypes.data == addresses[0] and len(made) == 3


def test_a_refusal_of_the_driver_is_one_sentence(monkeypatch) -> None:
    driver = SimpleNamespace(cuMemHostAlloc=lambda pointer, nbytes, flags: 2)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: driver)
    stream = SimpleNamespace(query=lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with pytest.raises(MemoryError, match=r"no 35 bytes .* \(CUresult 2\); free some"):
        host_memory.page_locked((5, 7))


@pytest.mark.gpu
def test_what_the_host_writes_arrives_on_the_device() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 65, 33, 3), dtype=np.uint8)
    memory, uploaded = host_memory.page_locked(frames.shape[1:]), []
    source = torch.from_numpy(memory)
    for frame in frames:  # by NumPy and by torch, in order and byte by byte
        np.copyto(memory, frame[:, :, ::-1])
        uploaded.append(source.to("cuda"))
        source.copy_(torch.from_numpy(frame))
        uploaded.append(torch.empty(frame.shape, dtype=torch.uint8, device="cuda"))
        uploaded[-1].copy_(source, non_blocking=True)
        torch.cuda.synchronize()
    found = torch.stack(uploaded).cpu().numpy()
    assert np.array_equal(found[::2], frames[..., ::-1]) and np.array_equal(found[1::2], frames)
