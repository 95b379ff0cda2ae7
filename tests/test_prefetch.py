"""Chunks of weights, and the launches at which they are asked for."""

import torch
from torch import nn

from mirage_hello.kernels import ops, use
from mirage_hello.model import derived, layers, prefetch
from mirage_hello.model.plan import recorded
from mirage_hello.model.prefetch import Prefetch, Weight, chunked
from mirage_hello.ptx import assembler, loader

MIB = 2**20


def test_each_chunk_is_asked_for_when_the_one_before_begins() -> None:
    weights = [Weight(i, 2 * MIB) for i in range(6)]
    launches = [[weights[0]], [], [weights[1]], [weights[2]], [weights[3]], [], [weights[4]],
                [weights[5]]]  # fmt: skip
    asked = chunked(launches, 4 * MIB)
    # chunks: launches 0..2, 3..5 and 6..7
    assert asked == [(0, weights[2:4]), (3, weights[4:6])]


def test_of_a_weight_larger_than_a_chunk_the_first_part_is_asked_for() -> None:
    asked = chunked([[Weight(1, MIB)], [Weight(2, 50 * MIB)], [Weight(3, MIB)]], 4 * MIB)
    assert asked == [(0, [Weight(2, 4 * MIB)]), (1, [Weight(3, MIB)])]
    assert chunked([[], [Weight(1, MIB)]], 4 * MIB) == []


def test_the_prefetches_go_along_with_the_launches(monkeypatch) -> None:
    monkeypatch.setattr(prefetch, "SMALLEST_BYTES", 1)
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).bfloat16()
    x = torch.randn(16, 64).bfloat16()

    def function() -> None:
        h = x
        for linear in model:
            h = ops.linear(h, linear.weight, linear.bias)

    with torch.no_grad(), use("ptx-emulated"):
        record = recorded(function, torch.device("cpu"), {"model": model})
        known = prefetch.weights_of([model])
        read = [[known[a] for a in each if a in known] for each in record.addresses]
        assert [len(each) for each in read] == [2, 2, 2]
        asked = Prefetch(read, torch.device("cpu"), chunk_bytes=64 * 64 * 2 + 128)
        assert len(asked) == 2
        seen: list[tuple[str, int]] = []
        monkeypatch.setattr(prefetch, "ask", lambda ranges: seen.append(("ask", len(ranges))))
        with asked.asked():
            function()
    assert seen == [("ask", 2), ("ask", 2)]


def test_the_kernel_reads_inside_its_ranges() -> None:
    """In the emulator, where a prefetch checks nothing, it ends for any number of lines."""
    ranges = torch.tensor([[1 << 40, 16], [1 << 40, 5000], [1 << 40, 4096 * 132]])
    loader.program("prefetch").launch("prefetch", (132,), (32,), (ranges, 3))


def test_derived_weights_are_known() -> None:
    conv = nn.Conv2d(12, 4, 3)
    wide, _ = layers.padded(conv)
    assert wide.data_ptr() in {t.data_ptr() for t in derived.derived_tensors(nn.Sequential(conv))}


def test_budget() -> None:
    _, report = assembler.ptxas(assembler.render("prefetch"), "sm_90a", ("-v",), "prefetch")
    registers = int(report.split("Used ")[1].split()[0])
    assert registers <= 32 and "0 bytes spill stores" in report
