"""Plans: placement, the arena against plain memory, and the list of launches."""

import random

import pytest
import torch
from stream_calls import stream
from torch import nn

from mirage_hello.kernels import ops, use
from mirage_hello.model import layers
from mirage_hello.model.plan import Buffer, Plan, Record, place
from mirage_hello.ptx import loader

CPU = torch.device("cpu")


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
