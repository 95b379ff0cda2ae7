"""The CUDA stream of a stream of frames leaves the caller's as it was."""

import threading

import numpy as np
import pytest
import torch
from stream_calls import clip, run, stream

from mirage_hello.model.own_stream import OwnStream


def test_on_a_cpu_there_is_none() -> None:
    own = OwnStream(torch.device("cpu"))
    with own, own, own.ordered():
        assert own.cuda is None and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.gpu
def test_the_callers_stream_is_current_again() -> None:
    own, side = OwnStream(torch.device("cuda", 0)), torch.cuda.Stream()
    with torch.cuda.stream(side):
        with own:
            assert torch.cuda.current_stream() == own.cuda
            with own.ordered(), own:
                assert torch.cuda.current_stream() == own.cuda
            assert torch.cuda.current_stream() == own.cuda
        assert torch.cuda.current_stream() == side
        with pytest.raises(KeyError), own:
            raise KeyError
        assert torch.cuda.current_stream() == side


@pytest.mark.gpu
def test_frames_in_a_thread_and_on_a_side_stream_are_the_same() -> None:
    frames, outputs = clip(3), []
    expected = run(stream("cuda"), frames)
    of, side = stream("cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        outputs.append(of.push(frames[0]))
        assert torch.cuda.current_stream() == side
    thread = threading.Thread(target=lambda: outputs.append(of.push(frames[1])))
    thread.start()
    thread.join()
    outputs.append(of.push(frames[2]))
    assert np.array_equal(outputs, expected)


@pytest.mark.gpu
def test_the_callers_device_stays_current() -> None:
    of, frames = stream("cuda:0"), clip(2)
    expected = run(stream("cuda:0"), frames)
    for device in range(torch.cuda.device_count()):
        of.reset()
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side), torch.cuda.device(device):
            outputs = run(of, frames)
            assert torch.cuda.current_device() == device
            assert torch.cuda.current_stream() == side
        assert torch.cuda.current_stream(0) == torch.cuda.default_stream(0)
        assert np.array_equal(outputs, expected)
