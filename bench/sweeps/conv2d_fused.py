"""What each fusion of conv2d.sm90a costs and saves on a GPU, beside cuDNN, hot and cold.

python bench/sweeps/conv2d_fused.py [CASE-SUBSTRING]      writes $OUT/sweep-conv2d_fused.json

    conv            the chosen tile, weights loading under the kernel before (griddepcontrol)
    alone           the same text without griddepcontrol: starts when the kernel before has ended
    conv+sums       with the statistics of its output
    norm N +sums    GroupNorm+SiLU of the input while it is read, N patches in flight
    norm, conv      ops.group_norm_silu, statistics and all, then conv
    cudnn norm...   torch's GroupNorm and SiLU, then cuDNN
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.bench.sweeps import product, runner
from mirage_hello.bench.sweeps.conv2d import CASES, image
from mirage_hello.kernels import conv2d_fused as page
from mirage_hello.kernels import conv2d_sm90a as conv
from mirage_hello.kernels import ops, parity
from mirage_hello.kernels.conv2d_tiles import Tile
from mirage_hello.ptx import loader

UNITS = {128: 4, 512: 16}  # C / 32; 10 for the widths of a U-Net
with_overlap = conv.program


def alone(*args, **kwargs) -> loader.Program:
    """conv2d's program as an ordinary launch."""
    return without_waits(with_overlap(*args, **kwargs))


@functools.cache
def without_waits(program: loader.Program) -> loader.Program:
    assert program.text is not None
    lines = [line for line in program.text.splitlines() if "griddepcontrol" not in line]
    return loader.Program(program.name, "\n".join(lines))


def producer_sums(x: Tensor, size: int) -> Tensor:
    """Sums of x in as many parts as the convolution that made it would leave."""
    b, c = x.shape[:2]
    unit = UNITS.get(c, 10)
    blocks = 9 * -(-c // 64)
    tile = conv.choose_tile(b, size, size, c, blocks, 3, 3, 1, unit)
    tiles = -(-size // 8) * -(-size // (8 * tile.warpgroups))
    parts = tiles * tile.row_parts * tile.sum_slots(unit)
    scale = torch.tensor([1 / parts, 1.0, 1 / parts, 0.0], device=x.device)
    return (page.sums_torch(x, unit) * scale).expand(-1, parts, -1, -1).contiguous()


def expect(name: str, contenders: dict[str, Callable[[], Tensor]], args: tuple) -> None:
    """Parity of every contender; cuDNN's own output, the first, sets what is allowed."""
    exact: Any = [a.float() if isinstance(a, Tensor) else a for a in args]
    truth, plain = F.conv2d(*exact), next(iter(contenders.values()))()
    for key, run in contenders.items():
        result = parity.judge(run(), plain, truth)
        if not result.passed:
            print(f"{name} WRONG {key}: {result}", flush=True)


def run_case(name: str) -> dict:
    b, c, o, size, stride = CASES[name]
    x, weight = image(b, c, size, size), image(o, c, 3, 3, scale=(9 * c) ** -0.5)
    bias = torch.randn(o, device="cuda", dtype=torch.bfloat16)
    unit = UNITS.get(o, 10)
    args = (x, weight, bias, stride, 1)

    @mock.patch.object(conv, "program", alone)
    def without_overlap() -> Tensor:
        return conv.conv2d_sm90a(*args)

    def normalised_on_load(tile: Tile) -> Tensor:
        return conv.conv2d_fused_sm90a(*args, norm=norm, unit=unit, tile=tile)[0]

    def tile_of(patches: int) -> Tile:
        blocks, p = 9 * -(-c // 64), (size - 1) // stride + 1
        chosen = conv.choose_tile(b, p, p, o, blocks, 3, 3, stride, unit, groups)
        return replace(chosen, patches=patches)

    groups = 32
    norm_weight, norm_bias = (torch.randn(c, device="cuda", dtype=x.dtype) for _ in range(2))
    norm = page.Norm(producer_sums(x, size), groups, norm_weight, norm_bias)

    def normalised(run: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: run(ops.group_norm_silu(x, groups, norm_weight, norm_bias))

    contenders: dict[str, Callable[[], Tensor]] = {
        "cudnn": lambda: F.conv2d(*args),
        "conv": lambda: conv.conv2d_sm90a(*args),
        "alone": without_overlap,
        "conv+sums": lambda: conv.conv2d_fused_sm90a(*args, unit=unit)[0],
    }
    after_norm: dict[str, Callable[[], Tensor]] = {
        "cudnn norm": lambda: F.conv2d(
            F.silu(F.group_norm(x, groups, norm_weight, norm_bias)), *args[1:]
        ),
        "norm, conv": normalised(lambda t: conv.conv2d_sm90a(t, *args[1:])),
    }
    if stride == 1:
        for patches in (2, 3):
            tile = tile_of(patches)
            after_norm[f"norm {patches} +sums"] = functools.partial(normalised_on_load, tile)
    product.compile_all([*contenders.values(), *after_norm.values()])
    expect(name, contenders, args)
    normed = F.silu(F.group_norm(x.float(), groups, norm_weight.float(), norm_bias.float()))
    expect(name, after_norm, (normed, *args[1:]))
    contenders |= after_norm
    out, sums = conv.conv2d_fused_sm90a(*args, unit=unit)
    assert sums is not None
    found, expected = (page.merged(s.double()) for s in (sums, page.sums_torch(out, unit)))
    print(f"{name}: sums {(found / expected - 1).abs().amax((0, 1)).tolist()}", flush=True)
    hot, cold = (product.medians(contenders, cold=cold) for cold in (False, True))
    for key in contenders:
        ratios = f"{hot['cudnn'] / hot[key]:.2f} {cold['cudnn'] / cold[key]:.2f}"
        print(f"  {key:14} {hot[key]:7.2f} {cold[key]:7.2f} us  x cudnn {ratios}", flush=True)
    return {"case": name, "hot_us": hot, "cold_us": cold}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "conv2d_fused", CASES, run_case, limit_s=60))
