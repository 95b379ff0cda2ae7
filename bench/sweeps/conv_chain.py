"""Tiles of conv2d.sm90a where a network runs them: behind a GroupNorm, weights from device memory.

    python bench/sweeps/conv_chain.py [CASE-SUBSTRING ...]      writes $OUT/sweep-conv-chain.json

A call is group_norm_apply of the sums of its input, then the convolution with a residual and sums
of its output; every call of a graph has weights of its own, more than the L2 holds in all. So
blocks of a convolution may start, and load weights, while the kernels before it still run: what a
tile leaves of a multiprocessor counts. Tried: the cheapest by the model, of more widths than
`choose_tile` knows, the best of them with fewer stages, and how many blocks of the GroupNorm a
multiprocessor may hold: those that start early crowd where one is free. About 6 s a case.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mirage_hello.bench import composed, harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.bench.sweeps.conv2d import image
from mirage_hello.kernels import conv2d_sm90a as conv
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_norm import Norm
from mirage_hello.kernels.conv2d_tiles import RESIDENT, Tile
from mirage_hello.kernels.group_norm_apply import Cut, choose_cut, group_norm_apply

LIMIT_S = 60
COLD_BYTES = 128 * 2**20  # of weights in turn: twice the L2
TILES, STAGES = 6, (8, 12, 16)
WIDTHS = range(32, 168, 8)
# name: channels of x and of the skip, outputs, edge, window
CASES = {
    "1280 @16": (1280, 0, 1280, 16, 3),
    "2560 @16": (1280, 1280, 1280, 16, 3),
    "1920 @16": (1280, 640, 1280, 16, 3),
    "640->1280 @16": (640, 0, 1280, 16, 3),
    "1280 @8": (1280, 0, 1280, 8, 3),
    "2560 @8": (1280, 1280, 1280, 8, 3),
    "640 @32": (640, 0, 640, 32, 3),
    "1280->640 @32": (640, 640, 640, 32, 3),
    "320 @64": (320, 0, 320, 64, 3),
    "1x1 1280 @16": (1280, 0, 1280, 16, 1),
    "1x1 640 @32": (640, 0, 640, 32, 1),
    "1x1 320 @64": (320, 0, 320, 64, 1),
}
UNIT = 10


def clocks(tile: Tile, edge: int, outputs: int, blocks: int, window: int) -> float:
    count = -(-edge // 8) * -(-edge // (8 * tile.warpgroups)) * -(-outputs // tile.block_n)
    loaded = tile.pixel_bytes(window, window) / (window**2 if tile.patch else 1)
    return tile.clocks(count, blocks, loaded)


def tiles(edge: int, outputs: int, blocks: int, window: int) -> list[Tile]:
    """The cheapest by the model, at most two of one shape of output tile."""
    found = []
    for groups, width, split in product((1, 2), WIDTHS, RESIDENT):
        if split > blocks:
            continue
        tile = Tile(groups, width, split, patch=window > 1)
        if tile.sum_slots(UNIT) and tile.most_stages(tile.share(blocks), window, window) >= 3:
            found.append(tile)
    found.sort(key=lambda t: clocks(t, edge, outputs, blocks, window))
    taken: list[Tile] = []
    for tile in found:
        alike = [t for t in taken if (t.block_m, t.block_n) == (tile.block_m, tile.block_n)]
        if len(alike) < 2 and len(taken) < TILES:
            taken.append(tile)
    return taken


def run_case(name: str) -> dict:
    c, extra, o, edge, window = CASES[name]
    torch.manual_seed(0)
    x, skip = image(1, c, edge, edge), image(1, extra, edge, edge) if extra else None
    total, blocks = c + extra, window**2 * ((c + extra) // 64)
    gamma, beta, bias = (torch.randn(n, device="cuda").bfloat16() for n in (total, total, o))
    skip_sums = None if skip is None else composed.sums_of(skip).contiguous()
    norm = Norm(composed.sums_of(x).contiguous(), 32, gamma, beta, skip_sums)
    residual = image(1, o, edge, edge)
    scale = (window**2 * total) ** -0.5
    copies = -(-COLD_BYTES // (window**2 * total * o * 2))
    weights = [image(o, total, window, window, scale=scale) for _ in range(copies)]

    def call(weight: Tensor, tile: Tile | None, cut: Cut | None = None) -> Tensor:
        h = group_norm_apply(x, norm, skip, cut)
        args = (h, weight, bias, 1, window // 2, None, residual)
        return conv.conv2d_fused_sm90a(*args, unit=UNIT, tile=tile)[0]

    def compiled(tile: Tile) -> None:
        fitted = tile.fitted(tile.share(blocks), window, window)
        conv.program(fitted, window, window, 1, "bf16", unit=UNIT).compile("sm_90a")

    chosen = conv.choose_tile(1, edge, edge, o, blocks, window, window, 1, UNIT)
    tried = list(dict.fromkeys([chosen, *tiles(edge, o, blocks, window)]))
    most = chosen.most_stages(chosen.share(blocks), window, window)
    tried += [replace(chosen, stages=s) for s in STAGES if s < most]
    with ThreadPoolExecutor(16) as pool:  # ptxas is a process of its own
        list(pool.map(compiled, tried))
    plain = call(weights[0], chosen)
    good = {}
    for tile in dict.fromkeys(tried):
        result = parity.judge(call(weights[0], tile), plain, plain.double())
        if result.passed:
            good[tile] = [partial(call, w, tile) for w in weights]
        else:
            print(f"{name} {tile} WRONG {result}", flush=True)
    named = {str(tile): runs for tile, runs in good.items()}
    own = choose_cut(1, edge * edge, 32, total // 32 * 2)
    cuts = [replace(own, together=t) for t in (0, 1, 2, 3, 4)]
    cuts += [replace(c, vecs=max(1, own.vecs // 2)) for c in cuts if own.vecs > 1]
    cuts += [replace(c, threads=128) for c in cuts[:5] if own.threads > 128 >= total // 8]
    alone = {f"apply alone {c}": [partial(group_norm_apply, x, norm, skip, c)] for c in cuts}
    alone |= {f"chosen, apply {c}": [partial(call, w, chosen, c) for w in weights] for c in cuts}
    effort = harness.Effort(rounds=6, sample_us=500.0)
    timed = harness.measure({**alone, **named}, "cuda", effort=effort)
    medians = {key: t.median_us for key, t in timed.items()}
    print(f"{name}: chosen {medians[str(chosen)]:.2f} us {chosen}", flush=True)
    for key in sorted(alone, key=lambda key: medians[key]):
        print(f"   {medians[key]:7.2f} us  {key}", flush=True)
    for tile in sorted(good, key=lambda t: medians[str(t)])[:8]:
        estimate = clocks(tile, edge, o, blocks, window) / 1830
        stages = f" stages {tile.stages}" if tile.stages else ""
        shape = f"{tile.block_m}x{tile.block_n} split {tile.split}{stages}"
        print(f"   {medians[str(tile)]:7.2f} us  (model {estimate:5.1f})  {shape}", flush=True)
    return {"case": name, "time_us": medians, "chosen": str(chosen)}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "conv-chain", CASES, run_case, LIMIT_S))
