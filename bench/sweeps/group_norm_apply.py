"""Cuts of group_norm_apply on a GPU: parity first, then time beside group_norm_silu and a copy.

    python bench/sweeps/group_norm_apply.py [CASE]       writes $OUT/sweep-group-norm-apply.json

About 12 s a case, each in a process of its own. `in the graph` is what counts: the kernel after an
elementwise kernel, less that kernel alone, so that the overlap of their launches shows.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import group_norm_apply as page
from mirage_hello.kernels import ops, parity
from mirage_hello.kernels.conv2d_fused import Norm, sums_torch
from mirage_hello.kernels.group_norm_apply import Cut, choose_cut, group_norm_apply

LIMIT_S = 60
GROUPS, UNIT = 32, 10
# name: channels of x and of the skip, edge, parts of the sums
CASES = {
    "320 @64": (320, 0, 64, 64),
    "640+320 @64": (640, 320, 64, 64),
    "640 @32": (640, 0, 32, 16),
    "1280+640 @32": (1280, 640, 32, 16),
    "1280 @16": (1280, 0, 16, 4),
    "1280 @8": (1280, 0, 8, 1),
}


def sums(x: torch.Tensor, parts: int) -> torch.Tensor:
    """As a convolution leaves them: `parts` bands of rows."""
    bands = x.chunk(parts, 2)
    return torch.cat([sums_torch(band, UNIT) for band in bands], 1).contiguous()


def cuts(chosen: Cut, group_bytes: int) -> list[Cut]:
    slabs = [g for g in (1, 2, 4, 8, 16, 32) if g * group_bytes % 16 == 0]
    found = [
        Cut(slab, threads, vecs)
        for slab in slabs
        for threads in (128, 256, 512)
        for vecs in (1, 2, 4, 8)
        if slab * group_bytes >= 32 and threads >= slab * group_bytes // 16
    ]
    near = [c for c in found if c.slab_groups in (chosen.slab_groups, 2 * chosen.slab_groups)]
    return [chosen, *(c for c in near if c != chosen)]


def run_case(name: str) -> dict:
    channels, extra, edge, parts = CASES[name]
    torch.manual_seed(0)

    def draw(c: int) -> torch.Tensor:
        x = torch.randn(1, c, edge, edge, device="cuda").bfloat16() + 1
        return x.to(memory_format=torch.channels_last)

    x, skip = draw(channels), draw(extra) if extra else None
    total = channels + extra
    weight, bias = (torch.randn(total, device="cuda").bfloat16() for _ in range(2))
    skip_sums = None if skip is None else sums(skip, parts)
    norm = Norm(sums(x, parts), GROUPS, weight, bias, skip_sums)
    group_bytes = total // GROUPS * 2
    chosen = choose_cut(1, edge * edge, GROUPS, group_bytes)
    found = cuts(chosen, group_bytes)

    def compile_one(cut: Cut) -> None:
        columns = cut.slab_groups * group_bytes // 16
        page._program(x, norm, skip, cut, columns).compile("sm_90a")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_one, found))
    wide = replace(norm, weight=weight.double(), bias=bias.double())
    truth = page.torch_form(x.double(), wide, None if skip is None else skip.double())
    joined = x if skip is None else torch.cat([x, skip], 1)
    plain = ops.group_norm_silu.torch_kernel.run(joined, GROUPS, weight, bias)
    good: dict[str, harness.Function] = {}
    for cut in found:
        result = parity.judge(group_norm_apply(x, norm, skip, cut), plain, truth)
        if result.passed:
            good[str(cut)] = partial(group_norm_apply, x, norm, skip, cut)
        else:
            print(f"{name} {cut} WRONG {result}", flush=True)
    others: dict[str, harness.Function] = {
        "copy": lambda: joined.clone(),
        "group_norm_silu": lambda: ops.group_norm_silu(x, GROUPS, weight, bias, skip=skip),
        "of the concatenation": lambda: ops.group_norm_silu(
            x if skip is None else torch.cat([x, skip], 1), GROUPS, weight, bias
        ),
    }
    small = torch.randn(4096, device="cuda").bfloat16()
    best = str(chosen)

    def after_silu(run: harness.Function) -> torch.Tensor:
        ops.silu(small)
        return run()

    followers = {**others, best: good[best]}
    after: dict[str, harness.Function] = {
        f"{key} in the graph": partial(after_silu, run) for key, run in followers.items()
    }
    after["silu alone"] = lambda: ops.silu(small)
    effort = harness.Effort(rounds=6, sample_us=400.0)
    timed = harness.measure({**others, **after, **good}, "cuda", effort=effort)
    medians = {key: t.median_us for key, t in timed.items()}
    print(f"{name}: chosen {chosen}", flush=True)
    named = [key for key in medians if key in others or key in after]
    best_cuts = sorted(good, key=lambda key: medians[key])[:5]
    for key in (*named, *best_cuts, best):
        print(f"   {medians[key]:7.2f} us  {key}", flush=True)
    return {"case": name, "time_us": medians, "chosen": best}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "group-norm-apply", CASES, run_case, LIMIT_S))
