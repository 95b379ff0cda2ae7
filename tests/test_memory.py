"""ContextMemory: ring, sink, reset, and that it neither grows nor moves."""

import pytest
import torch

from mirage_hello.model import ContextMemory


def output(value: float, batch: int = 2) -> torch.Tensor:
    return torch.full((batch, 4, 3, 5), value)


def values(buffer: torch.Tensor, sample: int = 0) -> list[float]:
    return buffer[sample, ::4, 0, 0].tolist()


def test_newest_first_oldest_forgotten_first_kept_as_sink() -> None:
    memory = ContextMemory(2, 4, 3, 5, history=3)
    assert values(memory.history) == [0, 0, 0] and values(memory.sink) == [0]
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        memory.push(output(value))
        seen.append(values(memory.history))
    assert seen == [[1, 0, 0], [2, 1, 0], [3, 2, 1], [4, 3, 2], [5, 4, 3]]
    assert values(memory.sink) == [1]
    assert memory.count.tolist() == [5, 5]


def test_channels_of_one_output_stay_together() -> None:
    memory = ContextMemory(1, 4, 3, 5, history=2)
    first, second = torch.randn(2, 1, 4, 3, 5)
    memory.push(first)
    memory.push(second)
    assert torch.equal(memory.history, torch.cat([second, first], 1))


def test_a_cut_forgets_only_the_samples_that_it_names() -> None:
    memory = ContextMemory(2, 4, 3, 5, history=2)
    for value in (1.0, 2.0):
        memory.push(output(value))
    memory.reset(torch.tensor([True, False]))
    memory.push(output(3.0))
    assert values(memory.history, 0) == [3, 0] and values(memory.history, 1) == [3, 2]
    assert values(memory.sink, 0) == [3] and values(memory.sink, 1) == [1]
    memory.reset()
    assert not memory.history.any() and not memory.sink.any() and not memory.count.any()


def test_reading_adds_noise_of_the_level() -> None:
    memory = ContextMemory(2, 4, 3, 5, history=2)
    memory.push(output(1.0))
    noise = torch.randn(2, 12, 3, 5)
    clean = torch.cat([memory.history, memory.sink], 1)
    assert torch.equal(memory.read(noise, 0.0), clean)
    level = torch.tensor([0.0, 0.5])
    expected = clean + level[:, None, None, None] * noise
    torch.testing.assert_close(memory.read(noise, level), expected)


def test_constant_memory_and_addresses_over_many_frames() -> None:
    memory = ContextMemory(1, 4, 3, 5, dtype=torch.bfloat16)
    before = [(b.data_ptr(), b.shape) for b in (memory.history, memory.sink, memory.count)]
    for value in range(300):
        memory.push(output(float(value), 1))
    memory.reset()
    after = [(b.data_ptr(), b.shape) for b in (memory.history, memory.sink, memory.count)]
    assert before == after
    assert memory.nbytes == (16 + 4) * 3 * 5 * 2 + 8
    assert memory.history.is_contiguous(memory_format=torch.channels_last)


def test_a_runaway_output_is_limited() -> None:
    memory = ContextMemory(1, 4, 3, 5)
    memory.push(output(1e9, 1))
    assert memory.history.max() == 6.0


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[2, 4, 3, 5\] \(got \[2, 4, 3, 6\]\)"):
        ContextMemory(2, 4, 3, 5).push(torch.zeros(2, 4, 3, 6))
    with pytest.raises(ValueError, match="at least 1"):
        ContextMemory(1, 4, 0, 5)
