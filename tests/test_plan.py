"""Plans: placement, the arena against plain memory, live controls against fresh plans, swaps.

The tests with a `device` run on a GPU too, there with the captured graph; on a CPU the function
runs in the arena.
"""

import contextlib
import random
import threading
import time

import numpy as np
import pytest
import torch
from test_stream import UNET, clip, run, stream
from torch import nn

from mirage_hello.kernels import ops, use
from mirage_hello.model import FrameStream, budget, layers, ways
from mirage_hello.model import stream as stream_module
from mirage_hello.model.bus import IN_FLIGHT, LENT, Bus
from mirage_hello.model.plan import Buffer, Plan, Record, place
from mirage_hello.ptx import loader
from mirage_hello.tools import cli

CPU = torch.device("cpu")


def planned(device=CPU, **kw) -> FrameStream:
    of = stream(device, **kw)
    of._planned = True
    return of


# Placement


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_together_lie_apart(seed: int) -> None:
    draw = random.Random(seed)
    buffers = []
    for _ in range(draw.randrange(1, 60)):
        begin = draw.randrange(100)
        end = None if draw.random() < 0.1 else begin + draw.randrange(1, 30)
        buffers.append(Buffer(draw.randrange(1, 5000), begin, end))
    arena_bytes = place(buffers)
    record = Record(buffers=buffers)
    ended = [b for b in buffers if b.end is not None]
    assert record.peak_bytes <= arena_bytes <= sum(b.nbytes + 511 for b in ended)
    assert all(b.offset == -1 for b in buffers if b.end is None)
    for i, a in enumerate(ended):
        assert a.offset % 512 == 0 and a.offset + a.nbytes <= arena_bytes
        for b in ended[:i]:
            together = a.begin < b.end and b.begin < a.end
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
            assert apart or not together


def test_a_chain_takes_two_buffers() -> None:
    x = torch.randn(1000)
    out = torch.empty(1000)

    def chain() -> None:
        y = x
        for _ in range(6):
            z = torch.empty_like(y)
            z.copy_(y).mul_(2)
            y = z
        out.copy_(y)

    plan = Plan(chain, CPU)
    assert plan.record.peak_bytes == 8000 and plan.arena_bytes == 8192
    out.zero_()
    plan._arena.fill_(255)
    plan.run()
    assert torch.equal(out, 64 * x)


def test_a_function_that_changes_its_mind_is_refused() -> None:
    calls = []

    def function() -> None:
        calls.append(0)
        torch.empty(len(calls))

    plan = Plan(function, CPU)
    with pytest.raises(RuntimeError, match="allocate the same at every call"):
        plan.run()


def test_what_the_function_keeps_is_not_in_the_arena() -> None:
    kept = []

    def function() -> None:
        kept.append(torch.empty(100).fill_(len(kept)))

    plan = Plan(function, CPU)
    plan.run()
    assert plan.arena_bytes == 0 and [int(t[0]) for t in kept] == [0, 1, 2]


def test_the_list_says_where_and_what() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.SiLU()))
    x, out = torch.randn(4, 8), torch.empty(4, 8)

    def function() -> None:
        h = model(x)
        out.copy_(ops.silu(h))

    with use("ptx-emulated"):
        plan = Plan(function, CPU, {"model": model})
    where = [launch.where for launch in plan.launches]
    assert where == ["model.0", "model.1.0", "frame", "frame"]
    silu = plan.launches[2]
    assert silu.name == "silu_f32" and silu.grid and silu.block and (4, 8) in silu.tensors
    text = str(plan)
    assert "silu_f32" in text and "torch addmm" in text and "4 launches; arena" in text


def test_emulated_kernels_in_the_arena_give_the_same_bits() -> None:
    """A residual block, a transformer's products: hand-written kernels in shared memory."""
    block = stream("cpu", dtype=torch.bfloat16).denoiser.unet.down_blocks[1].resnets[0]
    x = torch.randn(1, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    bias, out = torch.randn(1, 64).bfloat16(), torch.empty(1, 64, 8, 8, dtype=torch.bfloat16)

    def function() -> None:
        out.copy_(block(layers.Image(x), bias).pixels)

    with torch.no_grad(), use("ptx-emulated"):
        function()
        expected = out.clone()
        plan = Plan(function, CPU)
        out.zero_()
        plan._arena.fill_(255)
        plan.run()
    assert torch.equal(out, expected)
    assert plan.arena_bytes and all(launch.grid for launch in plan.launches[:-1])


def test_watching_ends_with_its_block() -> None:
    seen = []
    with use("ptx-emulated"), loader.watched(lambda *launch: seen.append(launch[1])):
        ops.silu(torch.randn(8))
    with use("ptx-emulated"):
        ops.silu(torch.randn(8))
    assert seen == ["silu_f32"]


def test_without_an_arena_nothing_is_watched() -> None:
    out = torch.zeros(4)
    plan = Plan(lambda: out.add_(torch.empty(4).fill_(1)), CPU, arena=False)
    plan.run()
    assert torch.equal(out, torch.full((4,), 3.0)) and plan.launches == []


# Frames


def test_two_plans_have_the_same_bits_as_no_plan(device: torch.device) -> None:
    frames = clip(4)
    expected = run(stream(device, graph=False, policy="torch"), frames)
    for _ in range(2):
        assert np.array_equal(run(planned(device, policy="torch"), frames), expected)


CHANGES = {
    "prompt": lambda of: of.set_context(torch.linspace(-1, 1, 3 * 24).view(3, 24)),
    "longer prompt": lambda of: of.set_context(torch.linspace(-1, 1, 7 * 24).view(7, 24)),
    "style": lambda of: of.set_style(2),
    "strength": lambda of: setattr(of, "strength", 0.4),
    "history noise": lambda of: setattr(of, "history_noise", 0.4),
    "guidance": lambda of: setattr(of, "guidance", 5.0),
    "schedule": lambda of: setattr(of, "schedule", [2.0, 0.7, 0.0]),
    "weights": lambda of: of.set_deltas({WEIGHT: DELTA}, 0.5),
    "low-rank weights": lambda of: of.set_deltas({WEIGHT: (torch.ones(64, 2), torch.ones(2, 64))}),
    "folded weights": lambda of: of.set_deltas(FOLDED, 0.3),
}
MIDDLE = "unet.mid_block.attentions.0"
BLOCK = f"{MIDDLE}.transformer_blocks.0"
WEIGHT = f"{BLOCK}.attn1.to_out.0.weight"
DELTA = torch.linspace(-1, 1, 64 * 64).view(64, 64)
FOLDED = {  # into others: the prompt's matrices, LayerNorm's weights, the merged last products
    f"{BLOCK}.attn2.to_q.weight": DELTA,
    f"{BLOCK}.attn2.to_out.0.weight": DELTA.T,
    f"{BLOCK}.norm3.weight": DELTA[-1],
    f"{BLOCK}.ff.net.2.weight": DELTA.repeat(1, 4),
    f"{MIDDLE}.proj_out.weight": DELTA[:, :, None, None],
    "unet.conv_out.weight": torch.ones(4, 32, 3, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_frames_equals_a_fresh_plan(device, change: str, dtype) -> None:
    def make() -> FrameStream:
        guidance = 2.0 if change == "guidance" else None
        return planned(device, steps=2, guidance=guidance, dtype=dtype)

    frames = clip(3)
    plain, live, fresh = make(), make(), make()
    CHANGES[change](fresh)
    expected = run(fresh, frames)
    assert np.array_equal(plain.push(frames[0]), live.push(frames[0]))
    plan = live.plan
    CHANGES[change](live)
    assert not np.array_equal(plain.push(frames[1]), live.push(frames[1]))
    assert (live.plan is plan) == (change != "longer prompt")  # nothing is captured again
    live.reset()
    assert np.array_equal(run(live, frames), expected)


def test_deltas_leave_without_a_trace(device: torch.device) -> None:
    of, frames = planned(device, dtype=torch.bfloat16), clip(2)
    expected = run(of, frames)
    of.set_deltas({WEIGHT: DELTA}, 0.3)
    of.set_deltas({"unet.conv_in.weight": torch.ones(32, 28, 3, 3)})
    of.reset()
    assert not np.array_equal(run(of, frames), expected)
    of.set_deltas({})
    of.reset()
    assert np.array_equal(run(of, frames), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda of: of.set_deltas({"unet.conv_im.weight": DELTA}), "did you mean unet.conv_in"),
        (lambda of: of.set_deltas({WEIGHT: DELTA[:2]}), r"must be \[64, 64\] \(got \[2, 64\]"),
        (lambda of: setattr(of, "schedule", [1.0, 0.0]), "2 steps is 3 falling noise levels"),
        (lambda of: setattr(of, "schedule", [1.0, 2.0, 0.0]), "falling"),
        (lambda of: of.set_context(torch.zeros(3, 5)), r"\[L, 24\]"),
        (lambda of: setattr(of, "history_noise", 11), "from 0 to 10"),
    ],
)
def test_a_refused_change_changes_nothing(call, message: str) -> None:
    of, frames = planned(steps=2), clip(2)
    expected = run(planned(steps=2), frames)
    first = of.push(frames[0])
    with pytest.raises(ValueError, match=message):
        call(of)
    assert np.array_equal([first, of.push(frames[1])], expected)


def test_guidance_is_the_equation(device: torch.device) -> None:
    """uncond + scale (cond - uncond): scale 1 is the conditional prediction alone."""
    frames = clip(2)
    plain = run(planned(device, dtype=torch.float32, policy="torch"), frames)
    guided = run(planned(device, dtype=torch.float32, policy="torch", guidance=1.0), frames)
    assert np.abs(np.array(plain, int) - np.array(guided, int)).mean() < 0.1


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


def test_the_staged_way_in_and_out(monkeypatch) -> None:
    for name in ("Stream", "Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeCuda)
    frames = clip(5)
    frame_in, frame_out = (torch.zeros(1, 32, 40, 3, dtype=torch.uint8) for _ in range(2))
    bus = Bus(frame_in, frame_out, staged=True)
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
    for name in ("Stream", "Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeCuda)
    frame_in, frame_out = (torch.zeros(1, 8, 8, 3, dtype=torch.uint8) for _ in range(2))
    bus = Bus(frame_in, frame_out, staged=True)
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


def test_tensors_and_sizes_mix_under_way(device: torch.device) -> None:
    small, large = clip(2, 16, 16), clip(2)
    outputs = list(planned(device).run([*small, torch.from_numpy(large[0]), large[1]]))
    assert [o.shape for o in outputs] == [(16, 16, 3)] * 2 + [(32, 40, 3)] * 2
    assert isinstance(outputs[2], torch.Tensor) and isinstance(outputs[3], np.ndarray)


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

    monkeypatch.setattr(stream_module, "Plan", fail)
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


def test_the_plans_unet_is_the_streams(device: torch.device) -> None:
    of = planned(device, policy="torch")
    of.push(clip(1)[0])
    names = {launch.where for launch in of.plan.launches}
    assert "denoiser.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1" in names
    assert "autoencoder.encoder" in names and "frame" in names
    assert UNET.sum_unit == 4


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
