"""Tile sweep of conv2d.sm90a on a GPU: parity first, then time beside cuDNN.

python bench/sweeps/conv2d.py [CASE-SUBSTRING]      writes $OUT/sweep-conv2d.json
"""

import random
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from mirage_hello.bench.sweeps import product, runner
from mirage_hello.kernels import conv2d_sm90a as conv
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_tiles import RESIDENT, Tile
from mirage_hello.reference import conv2d as reference

# name: (B, C, O, image, stride)
CASES = {
    "320->320 @64": (1, 320, 320, 64, 1),
    "640->640 @32": (1, 640, 640, 32, 1),
    "1280->1280 @16": (1, 1280, 1280, 16, 1),
    "1280->1280 @8": (1, 1280, 1280, 8, 1),
    "960->320 @64": (1, 960, 320, 64, 1),
    "1920->640 @32": (1, 1920, 640, 32, 1),
    "2560->1280 @16": (1, 2560, 1280, 16, 1),
    "128->128 @512": (1, 128, 128, 512, 1),
    "512->512 @128": (1, 512, 512, 128, 1),
    "n8 320->320 @64": (8, 320, 320, 64, 1),
    "320->320 @64 stride 2": (1, 320, 320, 64, 2),
}
TILES = 14


def tiles(b: int, p: int, o: int, blocks: int, stride: int) -> list[Tile]:
    """The tiles with the least estimated time, at most 3 of one shape of output tile."""

    def clocks(tile: Tile) -> float:
        count = -(-p // 8) * -(-p // (8 * tile.warpgroups)) * b * -(-o // tile.block_n)
        loaded = tile.pixel_bytes(3, 3) / (9 if tile.patch else 1)
        return tile.clocks(count, blocks, loaded)

    ranked = sorted(conv.candidates(blocks, 3, 3, stride), key=clocks)
    found: list[Tile] = []
    for tile in ranked:
        alike = [t for t in found if (t.block_m, t.block_n) == (tile.block_m, tile.block_n)]
        if len(alike) < 3 and len(found) < TILES:
            found.append(tile)
    if stride == 1:  # what the patch gains
        found += [replace(t, patch=False) for t in found[:3] if not t.patch or t.block_n <= 160]
    return found


def image(*shape: int, scale: float = 1.0) -> torch.Tensor:
    drawn = scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return drawn.contiguous(memory_format=torch.channels_last)


def run_case(name: str) -> dict:
    if name == "odd shapes":
        return odd_shapes()
    if name == "clusters":
        return clusters()
    b, c, o, size, stride = CASES[name]
    x, weight = image(b, c, size, size), image(o, c, 3, 3, scale=(9 * c) ** -0.5)
    bias = torch.randn(o, device="cuda", dtype=torch.bfloat16)
    blocks, p = 9 * -(-c // 64), (size - 1) // stride + 1
    few = slice(0, 16), slice(o - 48, o)  # the float64 truth of 64 channels finds a wrong tile

    def pick(t: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([t.narrow(dim, s.start, s.stop - s.start) for s in few], dim)

    truth = reference(x[:1].double(), pick(weight, 0).double(), pick(bias, 0).double(), stride, 1)
    plain = pick(F.conv2d(x[:1], weight, bias, stride, 1), 1)
    chosen = conv.choose_tile(b, p, p, o, blocks, 3, 3, stride)

    def compile_tile(tile: Tile) -> bytes:
        fitted = tile.fitted(tile.share(blocks), 3, 3)
        return conv.program(fitted, 3, 3, stride, "bf16").compile("sm_90a")

    case = product.Candidates(
        peers={"cudnn": lambda: F.conv2d(x, weight, bias, stride, 1)},
        run=lambda t: conv.conv2d_sm90a(x, weight, bias, stride, 1, None, None, tile=t),
        judge=lambda out: parity.judge(pick(out[:1], 1), plain, truth),
        tiles=tiles(b, p, o, blocks, stride),
        chosen=chosen,
        compile=compile_tile,
        flops=2.0 * b * p * p * o * c * 9,
    )
    return product.measure(name, case)


def odd_shapes() -> dict:
    """Random shapes with everything in the epilogue, the chosen tile and a random one."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    wrong, count = [], 0
    for _ in range(36):
        b, h, w = draw.randint(1, 4), draw.randint(1, 40), draw.randint(1, 40)
        c, o = 8 * draw.randint(1, 40), 8 * draw.randint(1, 40)
        r, stride = draw.choice([1, 3, 3, 3]), draw.choice([1, 1, 1, 2])
        pad = r // 2
        x, weight = image(b, c, h, w), image(o, c, r, r, scale=(r * r * c) ** -0.5)
        bias, shift = image(1, o, 1, 1).flatten(), image(b, o, 1, 1).flatten(1)
        residual = image(b, o, (h + 2 * pad - r) // stride + 1, (w + 2 * pad - r) // stride + 1)
        args = (x, weight, bias, stride, pad, shift, residual)
        plain = reference(*args)
        x64, weight64, bias64 = x.double(), weight.double(), bias.double()
        truth = reference(x64, weight64, bias64, stride, pad, shift.double(), residual.double())
        fits = conv.candidates(r * r * -(-c // 64), r, r, stride)
        for tile in (None, draw.choice(fits)):
            result = parity.judge(conv.conv2d_sm90a(*args, tile=tile), plain, truth)
            count += 1
            if not result.passed:
                wrong.append(f"{b}x{c}x{h}x{w} -> {o}, {r}x{r} stride {stride}, {tile}: {result}")
    print(f"odd shapes, seed {seed}: {count - len(wrong)} of {count} right", flush=True)
    print("\n".join(wrong[:10]), flush=True)
    return {"case": "odd shapes", "seed": seed, "count": count, "wrong": wrong}


def clusters() -> dict:
    """cuOccupancyMaxActiveClusters of each split: what RESIDENT should hold on this card."""
    from cuda.bindings import driver

    def ok(answer: tuple) -> object:
        assert answer[0] == driver.CUresult.CUDA_SUCCESS, answer
        return answer[1] if len(answer) > 1 else None

    torch.zeros(1, device="cuda")
    found = {}
    for split in range(2, 9):
        tile = Tile(2, 80, split, patch=True).fitted(16, 3, 3)
        code = conv.program(tile, 3, 3, 1, "bf16").compile("sm_90a")
        function = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(code)), b"conv2d_bf16"))
        smem = tile.layout(3, 3)[1]
        which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        ok(driver.cuFuncSetAttribute(function, which, smem))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = split * 132, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 384, 1, 1
        config.sharedMemBytes = smem
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = split
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        config.attrs, config.numAttrs = [attribute], 1
        found[split] = ok(driver.cuOccupancyMaxActiveClusters(function, config))
    print(f"resident clusters: {found}, assumed {RESIDENT}", flush=True)
    return {"case": "clusters", "resident": found}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "conv2d", ["odd shapes", *CASES, "clusters"], run_case))
