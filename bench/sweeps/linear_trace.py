"""Where the time of linear.sm90a goes: the clock at nine points of every block, on a GPU.

    python bench/sweeps/linear_trace.py [SUBSTRING]    prints, and writes $OUT/linear-trace.json

The same kernel runs six times in one CUDA graph, each run starting under the one before it; medians
over the blocks of the last three, in clocks of the multiprocessor that ran them.
"""

import json
import os
import re
import statistics
import sys
from typing import Any

import torch

from mirage_hello.kernels import linear_launch
from mirage_hello.kernels import linear_sm90a as gemm
from mirage_hello.kernels.linear_sm90a import Tile
from mirage_hello.ptx import loader

CASES = {  # M, K, N, tile
    "4096x320x320": (4096, 320, 320, Tile(1, 80, 2)),
    "4096x320x320 two": (4096, 320, 320, Tile(2, 80)),
    "1024x640x640": (1024, 640, 640, Tile(1, 80)),
    "256x1280x1280": (256, 1280, 1280, Tile(1, 64, shared="weight")),
    "4096x1280x320": (4096, 1280, 320, Tile(2, 80, 2, True, shared="x")),
    "1024x2560x640": (1024, 2560, 640, Tile(1, 80, shared="x")),
    "256x5120x1280": (256, 5120, 1280, Tile(1, 48)),
    "4096x320x960": (4096, 320, 960, Tile(2, 128, 2, True)),
    "4096x320x2560": (4096, 320, 2560, Tile(2, 128, 2, True)),
}
SLOTS = 16  # of 8 bytes a block: 0..3 loader, 8..12 first warpgroup, 13 its multiprocessor
RUNS = 6
STEPS = (
    "since this multiprocessor's last end", "entry to weights asked for", "wait for the grid",
    "x asked for to first stage", "products", "epilogue", "last end to the grid's last end, ns",
)  # fmt: skip


def traced(text: str) -> str:
    """The rendered source with a parameter p_trace and clocks kept in registers till the end."""

    def insert(pattern: str, code: str, before: bool = False, nth: int = 0) -> None:
        nonlocal text
        found = list(re.finditer(pattern, text))[nth]
        at = found.start() if before else found.end()
        text = text[:at] + "\n" + code + "\n" + text[at:]

    def clock(slot: int) -> str:
        return f"    mov.u64 %tr{slot}, %clock64;"

    text = text.replace(
        "    .param .u64 p_reciprocal", "    .param .u64 p_trace,\n    .param .u64 p_reciprocal"
    )
    registers = "    .reg .b64 %tr<8>, %p_tr;\n    .reg .b32 %tr_at;\n    .reg .pred %is_tr;\n"
    text = text.replace("    .reg .pred ", registers + "    .reg .pred ", 1)
    insert(r"// 1\. Indices[^\n]*", clock(0) + "\n    mov.u64 %tr2, 0;")
    first = r"    griddepcontrol\.wait;[^\n]*"
    insert(first, clock(1), before=True)
    insert(first, clock(2))
    insert(r"TILE_LOADED:", clock(3))
    at = """    ld.param.u64 %p_tr, [p_trace];
    mov.u32 %tr_at, %ctaid.x;
    mad.wide.u32 %p_tr, %tr_at, 128, %p_tr;
"""
    stores = "".join(f"    @%is_tr st.global.u64 [%p_tr+{8 * i}], %tr{i};\n" for i in range(4))
    (block,) = re.findall(r"\.reqntid (\d+),", text)
    loads = f"    setp.eq.u32 %is_tr, %thread, {int(block) - 128};\n"
    insert(r"PRODUCER_DONE:", at + loads + stores)
    insert(first, "    mov.u64 %tr2, 0;\n" + clock(1), nth=1)
    full = "    setp.eq.u64 %is_tr, %tr2, 0;\n    @%is_tr mov.u64 %tr2, %clock64;"
    insert(r"@!%is bra   WAIT_FULL;", full)
    insert(r"wgmma\.wait_group\.sync\.aligned 0;", clock(3))
    stores = "".join(f"    @%is_tr st.global.u64 [%p_tr+{64 + 8 * i}], %tr{i};\n" for i in range(6))
    last = clock(4) + "\n    mov.u64 %tr6, %globaltimer;\n    mov.u32 %tr_at, %smid;\n"
    last += (
        "    cvt.u64.u32 %tr5, %tr_at;\n" + at + "    setp.eq.u32 %is_tr, %thread, 0;\n" + stores
    )
    last += "    @%is_tr st.global.u64 [%p_tr+112], %tr6;\n"
    insert(r"\nDONE:", last, before=True)
    return text


class Traced:
    """Stands in for the program that linear_launch launches, with one more argument."""

    def __init__(self, program: loader.Program) -> None:
        self.program = loader.Program("linear.sm90a traced", traced(program.text or ""))
        self.buffers: list[torch.Tensor] = []

    def launch(self, entry: str, args: tuple, **rest: Any) -> None:
        made = torch.zeros(rest["grid"][0], SLOTS, dtype=torch.int64, device=args[0].tensor.device)
        self.buffers.append(made)
        at = next(i for i, a in enumerate(args) if isinstance(a, int))
        self.program.launch(entry, args=(*args[:at], made, *args[at:]), **rest)


def measure(m: int, k: int, n: int, tile: Tile, device: str = "cuda") -> dict[str, float]:
    x, weight = (torch.randn(s, k, device=device, dtype=torch.bfloat16) for s in (m, n))
    made: list[Traced] = []
    original = linear_launch.program

    def program(*args: Any, **options: Any) -> Any:
        made[:] = made or [Traced(original(*args, **options))]
        return made[0]

    linear_launch.program = program  # type: ignore[assignment]
    try:
        gemm.linear_sm90a(x, weight, tile=tile)
        made[0].buffers.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(RUNS):
                gemm.linear_sm90a(x, weight, tile=tile)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    finally:
        linear_launch.program = original
    return steps([b.cpu().tolist() for b in made[0].buffers])


def steps(runs: list[list[list[int]]]) -> dict[str, float]:
    """Median of each step over the blocks of the last runs."""
    ends: dict[int, int] = {}
    found: dict[str, list[float]] = {name: [] for name in STEPS}
    for number, run in enumerate(runs):
        last = max(block[14] for block in run)
        previous = dict(ends)
        for block in run:
            end, place = block[12], block[13]
            ends[place] = max(end, ends.get(place, 0))
            if number < RUNS - 3 or place not in previous:
                continue
            values = (
                block[0] - previous[place], block[1] - block[0], block[2] - block[1],
                block[10] - block[2], block[11] - block[10], end - block[11], last - block[14],
            )  # fmt: skip
            for name, value in zip(STEPS, values, strict=True):
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items() if values}


def main() -> None:
    results = {}
    for name, (m, k, n, tile) in CASES.items():
        if not any(part in name for part in sys.argv[1:] or [""]):
            continue
        results[name] = measure(m, k, n, tile)
        print(name, tile, flush=True)
        for step, clocks in results[name].items():
            print(f"  {clocks:8.0f}  {step}", flush=True)
    with open(f"{os.environ.get('OUT', '.')}/linear-trace.json", "w") as f:
        json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
