"""Steps, batches, presets and sizes: every combination is a plan as near to float32 as plain
bfloat16 is, twice at most. The presets themselves are for a GPU (`-m gpu`, about 40 s each)."""

import contextlib
import time

import numpy as np
import pytest
import torch
from stream_calls import clip, planned, run, stream

from mirage_hello.kernels.parity import exact_float32
from mirage_hello.model import FrameStream, budget, build, ways

SIZES = {"512x512": (512, 512), "768x432": (432, 768), "1024x576": (576, 1024)}
CASES = [(name, 1, None) for name in SIZES]
CASES += [("512x512", steps, None) for steps in (2, 3, 4)]
CASES += [("512x512", 1, 3.0), ("768x432", 2, 3.0)]
BUILD_SECONDS = 10.0  # from kernels that are cached


def assert_near(ours: list, plain: list, truth: list) -> None:
    exact = np.array(truth, float)
    error, allowed = (np.linalg.norm(np.array(of, float) - exact) for of in (ours, plain))
    assert error <= 2 * allowed + 0.5 * exact.size**0.5, (error, allowed)


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_count_of_steps_and_both_batches(device: torch.device, steps: int, guidance) -> None:
    options, frames = {"steps": steps, "guidance": guidance}, clip(3)
    truth = run(stream(device, policy="torch", **options), frames)
    plain = run(stream(device, policy="torch", dtype=torch.bfloat16, **options), frames)
    # On a CPU the fused layers by torch's kernels: the same order of operations.
    fused = ways.fusing("torch") if device.type == "cpu" else contextlib.nullcontext()
    with fused:
        of = planned(device, dtype=torch.bfloat16, **options)
        assert_near(run(of, frames), plain, truth)
    assert of.plan is not None


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("preset", ["391m", "880m"])
def test_the_presets_at_every_size(preset: str) -> None:
    frames = {name: clip(2, *size) for name, size in SIZES.items()}

    def pushed(pair, case, **options) -> list:
        name, steps, guidance = case
        of = FrameStream(*pair, size=SIZES[name], steps=steps, guidance=guidance, **options)
        return run(of, frames[name])

    pair = build(preset, 0, torch.float32, "cuda")
    with exact_float32():
        truth = [pushed(pair, case, policy="torch", arena=False) for case in CASES]
    pair = build(preset, 0, torch.bfloat16, "cuda")
    for case, exact in zip(CASES, truth, strict=True):
        plain = pushed(pair, case, policy="torch", arena=False)
        ours = pushed(pair, case)  # builds the kernels, too
        assert_near(ours, plain, exact)
        started = time.perf_counter()
        again = pushed(pair, case)
        assert time.perf_counter() - started < BUILD_SECONDS, case
        assert np.array_equal(ours, again), case


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("preset", ["391m", "880m"])
def test_the_memory_of_a_plan_was_predicted(preset: str) -> None:
    """What is there beside the weights while a plan is built and run, against the prediction."""
    pair = build(preset, 0, torch.bfloat16, "cuda")
    for size in SIZES.values():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        FrameStream(*pair, size=size).push(clip(1, *size)[0])
        taken = torch.cuda.max_memory_allocated() - before
        predicted = budget.predict(preset, size, torch.bfloat16, device="cuda")
        assert taken <= 1.15 * (predicted.total - predicted.weights), (size, taken, str(predicted))
