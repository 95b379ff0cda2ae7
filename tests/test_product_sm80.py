"""The sm_80 product in CUDA C++ (what NVRTC makes of it) and in PTX, emulated and on a GPU."""

import functools
import random

import pytest
import torch

from mirage_hello import reference
from mirage_hello.kernels import parity, product_sm80
from mirage_hello.kernels.product_sm80 import Tile
from mirage_hello.ptx import assembler, emulator, loader

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC compiles the CUDA sources")
SOURCES = [product_sm80.cuda_source, product_sm80.ptx_source]
TILES = product_sm80.TILES
LIMITS = dict(zip(TILES, (168, 240), strict=True))


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """CPU tensors run NVRTC's PTX in the emulator, which finds races in the ring of stages too."""

    def parsed(self):
        return emulator.parse(self.ptx("sm_80"), name=self.name)

    monkeypatch.setattr(loader.Program, "parsed", property(parsed))


WAYS = [(torch.bfloat16, TILES[0]), (torch.float16, TILES[0]), (torch.bfloat16, TILES[1])]


def draw(*shape, dtype, scale=1.0):
    values = (scale * torch.randn(shape)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def judge(run, truth, *args, tile):
    doubled = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    return parity.judge(run(*args, tile=tile), truth(*args), truth(*doubled))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_assembles_without_spills(tile, gated, arch):
    program, _ = product_sm80.ptx_source(torch.bfloat16, gated, tile)
    report = assembler.ptxas(program.text, arch, ("-v",))[1]
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(report.split(" registers")[0].split()[-1])
    assert f"registers <= {LIMITS[tile]}," in program.text and registers <= LIMITS[tile], report


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("dtype", "tile"), WAYS)
@pytest.mark.parametrize(
    ("b", "c", "h", "w", "o", "window", "stride"),
    [(2, 40, 7, 5, 136, 3, 1), (1, 72, 9, 9, 24, 3, 2), (1, 8, 4, 4, 8, 1, 1)],
)
def test_conv2d(b, c, h, w, o, window, stride, dtype, tile, source):
    """C, O and pixels that fill no tile; everything in the epilogue."""
    pad = window // 2
    p, q = ((n + 2 * pad - window) // stride + 1 for n in (h, w))
    x, weight = draw(b, c, h, w, dtype=dtype), draw(o, c, window, window, dtype=dtype, scale=0.06)
    rest = draw(b, o, dtype=dtype), draw(b, o, p, q, dtype=dtype)
    args = (x, weight, draw(o, dtype=dtype), stride, pad, *rest)
    result = judge(product_sm80.conv2d_with(source), reference.conv2d, *args, tile=tile)
    assert result.passed, result


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("dtype", "tile"), WAYS)
@pytest.mark.parametrize(("m", "k", "n"), [(150, 168, 136), (1, 8, 8)])
def test_linear_and_geglu(m, k, n, dtype, tile, source):
    x, weight = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5)
    bias, residual = draw(n, dtype=dtype), draw(m, n, dtype=dtype)
    args = (x, weight, bias, residual)
    result = judge(product_sm80.linear_with(source), reference.linear, *args, tile=tile)
    assert result.passed, result
    gated = draw(2 * n, k, dtype=dtype, scale=k**-0.5), draw(2 * n, dtype=dtype)
    result = judge(product_sm80.geglu_with(source), reference.geglu, x, *gated, tile=tile)
    assert result.passed, result


def test_steps_of_the_ladder():
    """The slow variants that the sweep times compute the same."""
    x, weight = draw(150, 72, dtype=torch.bfloat16), draw(80, 72, dtype=torch.bfloat16, scale=0.1)
    for switches in ({"SWIZZLE": 0, "ASYNC": 0, "RING": 2}, {"ASYNC": 0, "RING": 2}, {"RING": 2}):
        source = functools.partial(product_sm80.cuda_source, switches=switches)
        run = product_sm80.linear_with(source)
        assert judge(run, reference.linear, x, weight, tile=TILES[0]).passed, switches


def test_the_wide_tile_is_for_many_tiles():
    assert product_sm80.choose_tile(128 * 128, 512, 4608, 132) == Tile(128)  # as an H200 timed it
    for pixels, rows, depth in [
        (4096, 320, 2880), (1024, 640, 5760), (256, 1280, 11520), (4096, 2560, 320),
        (1024, 5120, 640), (256, 10240, 1280), (256, 1280, 5120),
    ]:  # fmt: skip
        assert product_sm80.choose_tile(pixels, rows, depth, 132) == Tile(64), (pixels, rows)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_shapes_on_a_gpu(dtype, tile, source, seed):
    dice = random.Random(seed)
    torch.set_default_device("cuda")
    try:
        for _ in range(12):
            b, h, w = dice.randint(1, 5), dice.randint(1, 65), dice.randint(1, 65)
            c, o = 8 * dice.randint(1, 30), 8 * dice.randint(1, 30)
            window, stride = dice.choice([1, 3]), dice.choice([1, 2])
            pad = window // 2
            p, q = ((n + 2 * pad - window) // stride + 1 for n in (h, w))
            weight = draw(o, c, window, window, dtype=dtype, scale=(window**2 * c) ** -0.5)
            rest = draw(b, o, dtype=dtype), draw(b, o, p, q, dtype=dtype)
            args = (draw(b, c, h, w, dtype=dtype), weight, draw(o, dtype=dtype), stride, pad, *rest)
            run = product_sm80.conv2d_with(source)
            parity.poison(rest[1])
            result = judge(run, reference.conv2d, *args, tile=tile)
            assert result.passed, (b, c, h, w, o, window, stride, str(result))
            m, k, n = dice.randint(1, 700), 8 * dice.randint(1, 90), 8 * dice.randint(1, 90)
            x, weight = draw(m, k, dtype=dtype), draw(2 * n, k, dtype=dtype, scale=k**-0.5)
            run = product_sm80.geglu_with(source)
            result = judge(run, reference.geglu, x, weight, draw(2 * n, dtype=dtype), tile=tile)
            assert result.passed, (m, k, n, str(result))
    finally:
        torch.set_default_device(None)


@pytest.mark.gpu
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tile", TILES)
def test_same_bits_in_a_graph_and_on_two_streams(tile, source):
    x = torch.randn(2, 320, 32, 32, device="cuda").bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(320, 320, 3, 3, device="cuda") / 54).bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last)

    def run():
        return product_sm80.conv2d_with(source)(x, weight, None, 1, 1, tile=tile)

    first = run()
    torch.cuda.synchronize()
    outs = []
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(run())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(first, out) for out in [*outs, captured])
