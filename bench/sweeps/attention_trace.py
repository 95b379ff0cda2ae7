"""Where the cycles of attention.sm90a go: the clock at seven points of its loop, on a GPU.

    python bench/sweeps/attention_trace.py      prints, and writes $OUT/attention-trace.json

The leader of every consumer warpgroup stores %clock at the points below; the table has the mean
cycles between them over all blocks and all but the first four key blocks.
"""

import json
import math
import os
import re
import sys

import torch

from mirage_hello.kernels.attention_sm90a import SHORT_NAME, Tile, _heads
from mirage_hello.ptx import loader

POINTS = ("wait K, turn", "issue", "wait S", "exponentials, next K", "wait PV", "pack")
# (B, H, N, M, D), tile
CASES = [
    ((1, 8, 4096, 4096, 40), Tile(4, 80, 3, True, 2, True)),
    ((1, 5, 4096, 4096, 64), Tile(3, 128, 2, True, 1, True, pv_first=True, unroll=True)),
    ((1, 8, 4096, 8192, 64), Tile(4, 64, 3, True, 0, True, unroll=True)),
    ((1, 8, 1024, 1024, 80), Tile(1, 128, 3, False, 0, True, unroll=True)),
    ((1, 16, 4096, 4096, 128), Tile(2, 96, 3, False, 0, True)),
]


def traced(text: str, warpgroups: int) -> str:
    """The rendered source with a parameter p_trace and a stored clock at each point."""
    text = text.replace(
        "    .param .u32 p_keys,", "    .param .u64 p_trace,\n    .param .u32 p_keys,"
    )
    text = text.replace(
        "    .reg .pred ", "    .reg .b64 %p_tr, %tr_at;\n    .reg .b32 %tr;\n    .reg .pred ", 1
    )
    start = """
    ld.param.u64 %p_tr, [p_trace];
    mov.u32 %tr, %nctaid.x;
    mov.u32 %t1, %ctaid.x;
    mad.lo.u32 %t1, %head, %tr, %t1;
    mul.lo.u32 %t1, %t1, WARPGROUPS;
    add.u32 %t1, %t1, %group;
    mul.lo.u32 %t1, %t1, %blocks;
    mul.wide.u32 %tr_at, %t1, 32;
    add.u64 %p_tr, %p_tr, %tr_at;"""
    line = "ld.param.f32 %c, [p_scale_log2];"
    text = text.replace(line, line + start.replace("WARPGROUPS", str(warpgroups)), 1)
    bodies = r"(?m)^LAZY_LOOP(_\d+)?:.*?%is_more bra LAZY_[^\n]*\n"
    text, count = re.subn(bodies, lambda m: stamped(m[0]), text, flags=re.DOTALL)
    if count == 0:
        raise ValueError("no loop with a lazy maximum in the source; adapt the trace to it")
    return text


def stamped(body: str) -> str:
    """One turn of the loop with the clock stored at POINTS."""

    def stamp(point: int) -> str:
        address = f"[%p_tr+{4 * point}]"
        return f"    mov.u32 %tr, %clock;\n    @%is_leader st.global.u32 {address}, %tr;\n"

    lines, out, waits = body.splitlines(keepends=True), [], 0
    for line in lines:
        if "wgmma.wait_group" in line:
            waits += 1
            out += [stamp(2 * waits), line, stamp(2 * waits + 1)]
        elif "%is_more bra" in line and line is lines[-1]:
            if waits == 1:  # one wait for both products: nothing between the last two points
                out += [stamp(4), stamp(5)]
            out += ["    add.u64 %p_tr, %p_tr, 32;\n", line]
        else:
            out.append(line)
            if line.startswith("LAZY_LOOP"):
                out.append(stamp(0))
                if "barrier.sync %my_turn" not in body:
                    out.append(stamp(1))
            elif "barrier.sync %my_turn" in line:
                out.append(stamp(1))
    return "".join(out)


def run(shape: tuple, tile: Tile) -> dict:
    b, h, n, m, d = shape
    q, k, v, out = (torch.randn(b, x, h, d, device="cuda").bfloat16() for x in (n, m, m, n))
    text = traced(tile.program(d, "bf16").ptx("sm_90a"), tile.warpgroups)
    program = loader.Program("attention.trace", text)
    block_m, blocks = 64 * tile.warpgroups, -(-m // tile.block_n)
    grid = (-(-n // block_m), h, b)
    trace = torch.zeros(grid[0] * h, tile.warpgroups, blocks, 8, dtype=torch.int32, device="cuda")
    maps = (_heads(q, block_m), _heads(k, tile.block_n), _heads(v, tile.block_n), _heads(out, 64))
    for _ in range(3):
        program.launch(
            f"attention_{SHORT_NAME[q.dtype]}",
            grid=grid,
            block=(tile.threads,),
            args=(*maps, trace, m, blocks, d**-0.5 * math.log2(math.e)),
            smem_bytes=tile.smem_bytes(d),
        )
    torch.cuda.synchronize()
    t = trace[:, :, 4 : blocks - 2].cpu().long() & 0xFFFFFFFF
    follow = trace[:, :, 5 : blocks - 1].cpu().long() & 0xFFFFFFFF
    marks = torch.cat([t[..., :6], follow[..., :1]], -1)
    steps = (marks[..., 1:] - marks[..., :-1]).double().reshape(-1, 6).remainder(2**32)
    mean = steps.mean(0).tolist()
    cycles = dict(zip(POINTS, mean, strict=True))
    result = {"shape": shape, "tile": str(tile), "cycles": cycles, "total": sum(mean)}
    first = t[0, :, :6, :6] - t[0, :, :1, :1].min()
    result["first_block"] = first.tolist()
    print(shape, tile, "total", round(sum(mean)), flush=True)
    print("   ", {p: round(x) for p, x in cycles.items()}, flush=True)
    return result


def main() -> int:
    results = []
    for shape, tile in CASES:
        results.append(run(shape, tile))
        with open(f"{os.environ.get('OUT', '.')}/attention-trace.json", "w") as f:
            json.dump(results, f)
    return 0


if __name__ == "__main__":
    sys.exit(main())
