"""conv2d_fp8 beside conv2d in bfloat16 on a GPU: time, and error of the sums and of e4m3 itself.

python bench/sweeps/conv2d_fp8.py [CASE-SUBSTRING]      writes $OUT/sweep-conv2d_fp8.json

For each layer the chosen tile at every `promote`, and the three tiles next by the estimate.
    sums     ||out - exact|| / ||exact|| on the dequantised inputs: wgmma's short sums
    e4m3     the same against the inputs as they were before they were quantised
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mirage_hello.bench.sweeps import product, runner
from mirage_hello.bench.sweeps.conv2d import CASES, image
from mirage_hello.kernels import conv2d_fp8 as page
from mirage_hello.kernels import conv2d_fused as fused
from mirage_hello.kernels import conv2d_sm90a as conv
from mirage_hello.kernels import tuning
from mirage_hello.kernels.conv2d_tiles import Tile

PROMOTES = (0, 1, 2, 4, 9)


def nearest_tiles(b: int, p: int, o: int, c: int, stride: int) -> list[Tile]:
    """The four tiles of the least estimated time, by the listener that `mirage tune` uses."""
    ranked: list[Tile] = []

    def listen(request: tuning.Request) -> Tile:
        ranked.extend(request.ranked()[:4])
        return ranked[0]

    with tuning.listening(listen):
        conv.choose_tile(b, p, p, o, 9 * -(-c // 128), 3, 3, stride, fp8=True)
    return ranked


def run_case(name: str) -> dict:
    b, c, o, size, stride = CASES[name]
    x, weight = image(b, c, size, size), image(o, c, 3, 3, scale=(9 * c) ** -0.5)
    bias = torch.randn(o, device="cuda", dtype=torch.bfloat16)
    x_scale, packed = page.calibrate([x]), page.quantise_weight(weight)
    x8, p = page.quantise(x, x_scale), (size - 1) // stride + 1
    rest = (bias, stride, 1)
    few = slice(0, 32)
    part = page.Weight(packed.values[few], packed.scales[few])
    exact = page.conv2d_fp8_torch(x8[:1], part, x_scale, bias[few], stride, 1)
    before = torch.nn.functional.conv2d(
        x[:1].double(), weight[few].double(), bias[few].double(), stride, 1
    )
    first, *others = nearest_tiles(b, p, o, c, stride)
    tiles = [replace(first, promote=n) for n in PROMOTES] + others
    contenders: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: conv.conv2d_sm90a(x, weight, *rest)
    }
    errors = {}

    def run(tile: Tile) -> Tensor:
        return page.conv2d_fp8(x8, packed, x_scale, *rest, tile=tile)[0]

    for tile in tiles:
        key = f"{product.label(tile)} promote{tile.promote}"
        contenders[key] = functools.partial(run, tile)
    product.compile_all(contenders.values())
    for key in list(contenders)[1:]:
        out = contenders[key]()[:1, few].double()
        errors[key] = [((out - t).norm() / t.norm()).item() for t in (exact, before)]
    if stride == 1:  # GroupNorm+SiLU on load, to bfloat16 and to e4m3
        unit = {128: 4, 512: 16}.get(c, 10)
        norm = fused.Norm(
            fused.sums_torch(x, unit), 32, *torch.randn(2, c, device="cuda").bfloat16()
        )
        contenders["norm bf16"] = lambda: conv.conv2d_fused_sm90a(x, weight, *rest, norm=norm)[0]
        contenders["norm e4m3"] = lambda: page.conv2d_fp8(x, packed, 0.02, *rest, norm=norm)[0]
    hot, cold = (product.medians(contenders, cold=cold) for cold in (False, True))
    print(f"{name}: bf16 {hot['bf16']:.2f} {cold['bf16']:.2f} us hot/cold", flush=True)
    for key in [key for key in contenders if key.startswith("norm")]:
        print(f"  {hot[key]:7.2f} {cold[key]:7.2f} us {key}", flush=True)
    for key, (sums, e4m3) in errors.items():
        ratios = f"{hot['bf16'] / hot[key]:.2f}x {cold['bf16'] / cold[key]:.2f}x"
        numbers = f"sums {sums:.1e} e4m3 {e4m3:.1e}"
        print(f"  {hot[key]:7.2f} {cold[key]:7.2f} us {ratios}  {numbers}  {key}", flush=True)
    return {"case": name, "hot_us": hot, "cold_us": cold, "errors": errors}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "conv2d_fp8", CASES, run_case, limit_s=60))
