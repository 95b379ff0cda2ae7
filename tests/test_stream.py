"""FrameStream and LatestFrame: sizes, determinism, settings between frames, bounded memory.

The tests with a `device` run on a GPU too, there with the captured graph.
"""

import itertools
import threading

import numpy as np
import pytest
import torch
from stream_calls import clip, run, stream

from mirage_hello.kernels import use
from mirage_hello.model import (
    FrameStream,
    LatestFrame,
    budget,
    build,
    euler,
    few_step,
)


@pytest.mark.parametrize("size", [(32, 40), (33, 47), (8, 8), (1, 1), (7, 65)])
def test_any_size_comes_back_as_it_went_in(device: torch.device, size: tuple[int, int]) -> None:
    outputs = run(stream(device), clip(2, *size))
    assert [(o.shape, o.dtype) for o in outputs] == [((*size, 3), np.uint8)] * 2


def test_padding_repeats_the_edge() -> None:
    """A frame padded by hand gives the same picture where the two overlap."""
    frame = clip(1, 29, 35)[0]
    padded = np.pad(frame, ((0, 3), (0, 5), (0, 0)), mode="edge")
    assert np.array_equal(stream().push(frame), stream().push(padded)[:29, :35])


@pytest.mark.parametrize("parametrisation", ["edm", "eps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_weights_give_a_picture(device: torch.device, parametrisation, dtype) -> None:
    outputs = run(stream(device, parametrisation, dtype=dtype), clip(3))
    for output in outputs:
        assert 2 < output.std() < 127  # neither grey nor saturated


def test_a_seed_decides_the_output(device: torch.device) -> None:
    frames = clip(3)
    of = stream(device, seed=4)
    first = run(of, frames)
    assert np.array_equal(first, run(stream(device, seed=4), frames))
    assert not np.array_equal(first, run(stream(device, seed=5), frames))
    assert not np.array_equal(first, run(of, frames))  # the memory is full now
    of.reset()
    assert np.array_equal(first, run(of, frames))


def test_numpy_and_tensors_give_the_same(device: torch.device) -> None:
    frame = clip(1)[0]
    expected = stream(device).push(frame)
    for place in {"cpu", device.type}:
        output = stream(device).push(torch.from_numpy(frame).to(place))
        assert isinstance(output, torch.Tensor) and output.device.type == place
        assert np.array_equal(output.cpu().numpy(), expected)
    strided = np.asfortranarray(frame)[:, ::-1][:, ::-1]
    strided.flags.writeable = False
    assert np.array_equal(stream(device).push(strided), expected)


def test_an_output_belongs_to_the_caller(device: torch.device) -> None:
    of, frames = stream(device), clip(2)
    first = of.push(frames[0])
    kept = first.copy()
    of.push(frames[1])
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("setting", ["style", "strength", "history_noise"])
def test_settings_take_effect_on_the_next_frame_and_not_before(
    device: torch.device, setting: str
) -> None:
    def change(of: FrameStream) -> None:
        if setting == "style":
            of.set_style(2)
        else:
            setattr(of, setting, 0.4)

    frames = clip(3)
    plain, changed = stream(device), stream(device)
    assert np.array_equal(plain.push(frames[0]), changed.push(frames[0]))
    change(changed)
    assert not np.array_equal(plain.push(frames[1]), changed.push(frames[1]))
    # A stream that starts with the setting agrees: nothing of the old one is left.
    plain.reset()
    changed.reset()
    change(plain)
    assert np.array_equal(run(plain, frames), run(changed, frames))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_start_noise_goes_on_from_the_last_frame(device: torch.device, correlation: float) -> None:
    of, frame = stream(device, noise_correlation=correlation, seed=3), clip(1, 256, 256)[0]
    noises, outputs = [], []
    for _ in range(4):
        of.cut()  # the noise goes on where the memory is forgotten
        of.history_noise = 0.0
        outputs.append(of.push(frame))
        noises.append(of._buffers.noise[0].flatten().cpu().clone())
    for a, b in itertools.pairwise(noises):  # 4096 values: a deviation of 0.016
        assert b.std() == pytest.approx(1, abs=0.06)
        assert (a * b).mean() == pytest.approx(correlation, abs=0.08)
    assert (noises[0] * noises[2]).mean() == pytest.approx(correlation**2, abs=0.08)
    assert np.array_equal(outputs[0], outputs[1]) == (correlation == 1)
    of.reset()
    assert np.array_equal(outputs[0], of.push(frame))


def test_a_context_of_another_length_is_taken(device: torch.device) -> None:
    of = stream(device)
    before = of.push(clip(1)[0])
    of.set_context(torch.randn(7, 24))
    of.cut()
    assert not np.array_equal(of.push(clip(1)[0]), before)


def test_a_cut_forgets_and_a_new_size_starts_afresh() -> None:
    of = stream()
    run(of, clip(3))
    assert of._buffers.memory.count.item() == 3
    of.cut()
    assert of._buffers.memory.count.item() == 0
    run(of, clip(2))
    run(of, clip(1, 16, 16))
    assert of._buffers.memory.count.item() == 1


def test_weights_changed_in_place_are_used_after_refresh(device: torch.device) -> None:
    of, frame = stream(device), clip(1)[0]
    before = of.push(frame)
    with torch.no_grad():
        of.denoiser.unet.time_embedding.linear_2.bias.add_(1.0)
    of.refresh()
    of.reset()
    assert not np.array_equal(of.push(frame), before)


@pytest.mark.parametrize("sampler", [euler, few_step])
def test_several_steps(device: torch.device, sampler) -> None:
    frames = clip(2)
    outputs = run(stream(device, steps=3, sampler=sampler), frames)
    assert not np.array_equal(outputs, run(stream(device), frames))
    assert np.array_equal(outputs, run(stream(device, steps=3, sampler=sampler), frames))


def test_two_hundred_frames_in_constant_memory(device: torch.device) -> None:
    of, frames = stream(device), clip(4, 16, 16)
    run(of, frames)
    addresses = [t.data_ptr() for t in (of._buffers.draws, of._buffers.memory.history)]
    held = of._buffers.nbytes
    tensors = _live_tensors()
    for i in range(200):
        of.push(frames[i % 4])
    assert [t.data_ptr() for t in (of._buffers.draws, of._buffers.memory.history)] == addresses
    assert of._buffers.nbytes == held
    assert _live_tensors() <= tensors + 2


def _live_tensors() -> int:
    import gc

    gc.collect()
    return sum(torch.is_tensor(o) for o in gc.get_objects() if type(o).__module__ == "torch")


def test_policy_of_the_stream_and_of_the_scope(device: torch.device) -> None:
    frame = clip(1)[0]
    expected = stream(device).push(frame).astype(int)
    # On a GPU the backends' float32 differ (TF32): the pictures agree on average.
    assert np.abs(stream(device, policy="torch").push(frame) - expected).mean() < 1
    of = stream(device)
    with use("torch"):
        assert np.abs(of.push(frame) - expected).mean() < 1
    with pytest.raises(ValueError, match="backend"):
        of.policy = "tritn"


@pytest.mark.gpu
def test_the_graph_computes_what_eager_does() -> None:
    frames = clip(4)
    assert np.array_equal(
        run(stream("cuda", graph=True, policy="torch"), frames),
        run(stream("cuda", graph=False, policy="torch"), frames),
    )


@pytest.mark.gpu
def test_a_pinned_frame_is_read_where_it_is() -> None:
    frames, of = clip(4), stream("cuda")
    expected = run(stream("cuda"), frames)
    pinned = [torch.from_numpy(frame).pin_memory() for frame in frames]
    assert all(np.array_equal(of.push(f).numpy(), e) for f, e in zip(pinned, expected, strict=True))
    of.reset()
    assert all(np.array_equal(o, e) for o, e in zip(of.run(pinned), expected, strict=True))


@pytest.mark.gpu
def test_a_changed_policy_is_captured_again() -> None:
    of, frame = stream("cuda"), clip(1)[0]
    of.push(frame)
    plan = of.plan
    of.push(frame)
    assert of.plan is plan
    with use("torch"):
        of.push(frame)
    assert of.plan is not plan
    assert of._buffers.memory.count.item() == 3


def test_untrained_weights_are_flagged() -> None:
    of = stream()
    assert of.trained is False
    of.denoiser.unet.trained = True
    assert of.trained is False  # the autoencoder's are random still
    of.autoencoder.trained = True
    assert of.trained is True


def test_the_tiny_preset_streams() -> None:
    of = FrameStream(*build("tiny"), size=(64, 64))
    outputs = run(of, clip(3, 64, 64))
    assert all(5 < output.std() < 127 for output in outputs)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), TypeError, r"must be uint8 \(got float32\)"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"\[H, W, 3\], RGB \(got \[8, 8, 4\]\)"),
        (np.zeros((8, 8), np.uint8), ValueError, r"got \[8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"got \[0, 8, 3\]"),
        (torch.zeros(8, 8, 3), TypeError, "uint8"),
    ],
)
def test_a_bad_frame_is_refused_and_the_stream_goes_on(frame, error, message: str) -> None:
    of = stream()
    with pytest.raises(error, match=message):
        of.push(frame)
    assert of.push(clip(1)[0]).shape == (32, 40, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream(steps=0), "at least 1"),
        (lambda: stream(strength=1.5), "strength must be above 0 and at most 1"),
        (lambda: stream(history_noise=-1), "history_noise must be from 0"),
        (lambda: stream(noise_correlation=-0.1), "noise_correlation must be from 0 to 1"),
        (lambda: stream(graph=True), "needs a CUDA device"),
        (lambda: stream(context=torch.zeros(3, 25)), r"\[L, 24\].*got \[1, 3, 25\]"),
        (lambda: stream().set_style(3), r"expected 0 to 2 \(got 3\)"),
    ],
)
def test_bad_settings_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bad_setting_changes_nothing() -> None:
    of, frames = stream(), clip(2)
    expected = run(stream(), frames)
    first = of.push(frames[0])
    with pytest.raises(ValueError, match="strength"):
        of.strength = 0
    assert of.strength == 1.0
    assert np.array_equal([first, of.push(frames[1])], expected)


def test_too_large_a_frame_is_refused_before_anything_is_built(monkeypatch) -> None:
    monkeypatch.setattr(budget, "available", lambda device: 64 * 2**20)
    of = stream()
    with pytest.raises(
        ValueError, match=r"4096x2048 needs \d+ MiB .* 64 MiB .*(\d+x\d+) would fit"
    ):
        of.push(np.zeros((2048, 4096, 3), np.uint8))
    assert of.push(clip(1)[0]).shape == (32, 40, 3)


def test_latest_frame_wins() -> None:
    queue: LatestFrame[int] = LatestFrame()
    assert queue.get(timeout=0) is None
    for value in range(5):
        queue.put(value)
    assert (queue.get(), queue.dropped) == (4, 4)
    queue.put(5)
    queue.close()
    assert (queue.get(), queue.get()) == (5, None)
    with pytest.raises(ValueError, match="after close"):
        queue.put(6)


def test_latest_frame_between_threads() -> None:
    queue: LatestFrame[int] = LatestFrame()
    seen: list[int] = []

    def consume() -> None:
        while (value := queue.get()) is not None:
            seen.append(value)

    consumer = threading.Thread(target=consume)
    consumer.start()
    for value in range(1000):
        queue.put(value)
    queue.close()
    consumer.join(10)
    assert seen[-1] == 999 and seen == sorted(seen)
    assert len(seen) + queue.dropped == 1000
