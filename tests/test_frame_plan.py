"""A stream's plans: bits, error, failures that leave them working, swaps, two streams at once.

The tests with a `device` run on a GPU too, there with the captured graph; on a CPU the function
runs in the arena.
"""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from stream_calls import UNET, clip, planned, run, stream

from mirage_hello.model import budget, plans, ways
from mirage_hello.tools import cli


def test_two_plans_have_the_same_bits_as_no_plan(device: torch.device) -> None:
    frames = clip(4)
    expected = run(stream(device, graph=False, policy="torch"), frames)
    for _ in range(2):
        assert np.array_equal(run(planned(device, policy="torch"), frames), expected)


def test_a_frame_of_emulated_kernels_is_the_plain_one() -> None:
    """Every hand-written kernel of a guided frame of two steps, in the arena."""
    options = {"dtype": torch.bfloat16, "steps": 2, "guidance": 2.0}
    frames = clip(2, 13, 16)
    truth = np.array(run(stream(steps=2, guidance=2.0), frames), float)
    plain = np.array(run(stream(**options, policy="torch"), frames), float)
    of = planned(**options, policy=("ptx-emulated", "torch"))
    ours = np.array(run(of, frames), float)
    assert np.linalg.norm(ours - truth) <= 2 * np.linalg.norm(plain - truth) + 1
    names = [launch.name for launch in of.plan.launches]
    torchs = [name for name in names if name.startswith("torch")]
    assert "frame_patches_bf16" in names and "patches_frame_bf16" in names
    # What is left to torch: the memory's count, and an Euler step's coefficients, a number each.
    assert set(torchs) <= {"torch add_", "torch div", "torch rsub"}, set(torchs)


def test_a_plan_stays_as_close_as_plain_bfloat16(device: torch.device) -> None:
    """Pictures against the plain float32 model's, after 1 frame and after 100 in closed loop: at
    most twice the error of the plain bfloat16 model."""
    frames = clip(100)
    half = {"dtype": torch.bfloat16}
    truth = np.array(run(stream(device, policy="torch"), frames), float)
    plain = np.array(run(stream(device, policy="torch", **half), frames), float)
    # On a CPU the fused layers by torch's kernels: the same order of operations.
    fused = ways.fusing("torch") if device.type == "cpu" else contextlib.nullcontext()
    with fused:
        ours = np.array(run(planned(device, **half), frames), float)
    for first, last in ((0, 1), (95, 100)):
        error = [np.linalg.norm((out - truth)[first:last]) for out in (ours, plain)]
        assert 0 < error[0] <= 2 * error[1] + 0.5 * truth[first:last].size ** 0.5, error


def test_the_plans_unet_is_the_streams(device: torch.device) -> None:
    of = planned(device, policy="torch")
    of.push(clip(1)[0])
    names = {launch.where for launch in of.plan.launches}
    assert "denoiser.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1" in names
    assert "autoencoder.encoder" in names and "frame" in names
    assert UNET.sum_unit == 4


def test_an_exception_in_the_caller_leaves_the_plan_working(device: torch.device) -> None:
    of, frames = planned(device), clip(5)
    expected = run(planned(device), frames)
    outputs = []
    with pytest.raises(KeyError):
        for output in of.run(frames):
            outputs.append(output)
            raise KeyError
    assert of.under_way == 0
    of.reset()
    assert np.array_equal(run(of, frames), expected)
    assert np.array_equal(outputs[0], expected[0])


def test_a_failed_build_leaves_the_old_plan_working(device, monkeypatch) -> None:
    of, frames = planned(device), clip(3)
    expected = run(planned(device), frames)
    first = of.push(frames[0])

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(plans, "Plan", fail)
    with pytest.raises(torch.OutOfMemoryError):
        of.push(clip(1, 48, 48)[0])
    monkeypatch.setattr(budget, "available", lambda device: 2**20)
    with pytest.raises(ValueError, match="would fit"):
        of.push(clip(1, 480, 480)[0])
    assert np.array_equal([first, *run(of, frames[1:])], expected)


@pytest.mark.gpu
def test_out_of_memory_while_building_leaves_the_old_plan_working(monkeypatch) -> None:
    """This process may take no more memory, and the prediction does not know it. (The whole card
    is filled by bench/sweeps/frame_growth.py: other processes test on it here.)"""
    of, frames = planned("cuda"), clip(4)
    expected = run(planned("cuda"), frames)
    first = of.push(frames[0])
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(budget, "available", lambda device: 2**50)
    torch.cuda.set_per_process_memory_fraction(taken)
    try:
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                of.push(clip(1, 1024, 1024)[0])
        second = of.push(frames[1])  # a frame allocates nothing
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.array_equal([first, second, *run(of, frames[2:])], expected)
    assert of.push(clip(1, 1024, 1024)[0]).shape == (1024, 1024, 3)


def test_a_prepared_size_is_swapped_in_between_two_frames(device: torch.device) -> None:
    of, frames, large = planned(device), clip(2, 16, 16), clip(2, 40, 48)
    expected = run(planned(device), large)
    of.push(frames[0])
    thread = threading.Thread(target=of.prepare, args=(40, 48))
    thread.start()
    while thread.is_alive():
        of.push(frames[1])
    plan = of._sizes[(40, 48)].plan
    of._generator.manual_seed(0)
    started = time.perf_counter()
    swapped = of.push(large[0])
    seconds = time.perf_counter() - started
    assert of.plan is plan
    if device.type == "cuda":
        assert seconds < 0.05
    assert np.array_equal([swapped, of.push(large[1])], expected)
    assert set(of._sizes) == {(16, 16), (40, 48)}
    of.push(clip(1, 24, 24)[0])
    assert set(of._sizes) == {(40, 48), (24, 24)}  # two plans are kept


def test_two_streams_at_once(device: torch.device) -> None:
    """Bit for bit what each draws alone, on this thread and on another."""
    frames = clip(8)
    keys = [(seed, how) for how in ("here", "alone", "together") for seed in (1, 2)]
    streams = {key: planned(device, seed=key[0]) for key in keys}  # weights: a global generator
    found: dict[tuple[int, str], list] = {}

    def work(key: tuple[int, str]) -> None:
        found[key] = list(streams[key].run(frames))

    for key in keys[:2]:
        work(key)
    threads = {key: threading.Thread(target=work, args=(key,)) for key in keys[2:]}
    for key, thread in threads.items():
        thread.start()
        if key[1] == "alone":
            thread.join()
    for seed in (1, 2):
        threads[seed, "together"].join()
        weights = [streams[seed, how].denoiser.state_dict().values() for how in ("here", "alone")]
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
        assert np.array_equal(found[seed, "alone"], found[seed, "here"])
        assert np.array_equal(found[seed, "together"], found[seed, "here"])


def test_mirage_explain_frame(capsys) -> None:
    import json

    arguments = ["explain", "frame", "--device", "cpu", "--size", "32x24"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "denoiser.unet.mid_block.resnets.0" in text
    assert "launches; arena" in text
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["launches"]) > 100 and found["peak_bytes"] <= found["arena_bytes"]
    assert cli.main([*arguments, "--shape", "1,2"]) == 2
    assert "takes --preset" in capsys.readouterr().err
