"""The mma.sync attention kernels, CUDA C++ and PTX: resources, emulated and on a GPU."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_calls import BF16, F16, assert_right, draw, steep

from mirage_hello.kernels import attention_mma
from mirage_hello.kernels.attention_mma import Tile, attention_cuda, attention_sm80, choose_tile
from mirage_hello.ptx import assembler, emulator, loader

# Resources: the Budget line of the PTX, held against ptxas -v


def chosen(head_dim):
    """The tiles of a large and of a small problem."""
    return {choose_tile(head_dim, queries, 8, 132) for queries in (8192, 256)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 112, 128, 160, 256])
def test_sm80_has_no_spills(head_dim, arch):
    for tile in chosen(head_dim):
        assert tile.smem_bytes(head_dim) <= 101376  # of a block on 8.6 and 8.9, the least there is
        text = tile.program(head_dim, "bf16").text
        assert f"shared {tile.smem_bytes(head_dim)} B" in text
        _, said = assembler.ptxas(text, arch, ("-v",))
        assert " 0 bytes spill stores" in said, (tile, said)
        used = int(re.search(r"Used (\d+) registers", said)[1])
        assert used <= 255  # two blocks of 128 threads a multiprocessor


def test_the_tile_that_fills_the_card():
    assert choose_tile(40, 4096, 8, 132).m_tiles == 2  # 256 blocks: two rounds less 8
    assert choose_tile(64, 4096, 5, 132).m_tiles == 1  # 160 would be two rounds less 104
    assert choose_tile(80, 1024, 8, 132).m_tiles == 1
    assert choose_tile(128, 8192, 16, 132) == Tile(2, 32, 2)


# Emulated


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "dtype"),
    [
        (150, 150, 40, BF16),
        (20, 77, 80, F16),
        (7, 70, 160, BF16),
        (1, 1, 256, F16),
        (33, 65, 8, BF16),
    ],
)
def test_sm80_in_the_emulator(queries, keys, head_dim, dtype):
    q, k, v = draw(queries, keys, head_dim, dtype)
    assert_right(attention_sm80(q, k, v), q, k, v)


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "dtype", "switches"),
    [
        (70, 150, 40, BF16, {}),
        (20, 77, 80, F16, {}),
        (3, 40, 160, BF16, {}),
        (70, 100, 64, BF16, {"M_TILES": 1}),
        (20, 200, 40, BF16, {"RESCALE_ABOVE": 0}),
        (20, 100, 40, BF16, {"M_TILES": 1, "ASYNC": 0}),
        (20, 100, 40, BF16, {"M_TILES": 1, "ASYNC": 0, "SWIZZLE": 0}),
    ],
)
def test_cuda_source_in_the_emulator(queries, keys, head_dim, dtype, switches):
    """What NVRTC makes of kernels/cuda/attention.cu and of the steps of its ladder, emulated."""
    q, k, v = draw(queries, keys, head_dim, dtype)
    out = torch.empty_like(q)
    text = attention_mma.cuda_source(head_dim, dtype, **switches).ptx("sm_80")
    tile = attention_mma.cuda_tile(head_dim, **switches)
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    scale_log2 = attention_mma.positive_scale(q, None)[1]
    emulator.launch(
        emulator.parse(text, name="attention.cu"),
        "attention",
        (-(-queries // tile.block_m), 1, 1),
        (128,),
        [q, k, v, out, *strides, queries, keys, scale_log2],
        tile.smem_bytes(head_dim),
    )
    assert_right(out, q, k, v)


TILES = [(40, Tile(2, 32, 2)), (64, Tile(1, 128)), (128, Tile(2, 32, 4)), (160, Tile(1, 48, 5))]


@pytest.mark.parametrize(("head_dim", "tile"), TILES)
def test_other_tiles_of_sm80_in_the_emulator(head_dim, tile):
    q, k, v = draw(140, 150, head_dim)
    for keys in (k, steep(k, 4000.0)):
        assert_right(attention_sm80(q, keys, v, None, tile), q, keys, v)


@pytest.mark.parametrize(("dtype", "largest"), [(BF16, 4000.0), (F16, 300.0)])
def test_scores_beyond_the_lazy_maximum_run_again(dtype, largest):
    q, k, v = draw(20, 200, 64, dtype)
    k = steep(k, largest)
    assert_right(attention_sm80(q, k, v), q, k, v)


@pytest.mark.parametrize("key", [0, 5, 7, 63])
def test_one_dominating_key_walked_last(key):
    """Scores of some 6000: from 1e5 on, c s - c m is rounded by enough to move p off 1."""
    q, k, v = draw(20, 150, 64)
    q = q.abs()
    k[:, key] = 1e3
    assert_right(attention_sm80(q, k, v), q, k, v)


@pytest.mark.parametrize("masked", [slice(0, 64), slice(64, 150)])
def test_masked_keys(masked):
    q, k, v = draw(20, 150, 64)
    q = q.abs()
    k[:, masked] = -float("inf")
    assert_right(attention_sm80(q, k, v), q, k, v)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2])
def test_scales(scale):
    q, k, v = draw(20, 100, 64)
    assert_right(attention_sm80(q, k, v, scale), q, k, v, scale)


def test_slices_of_a_fused_projection():
    q, k, v = torch.randn(2, 70, 3, 2, 64).to(BF16).unbind(2)
    assert_right(attention_sm80(q, k, v), q, k, v)


def test_identical_bits_from_run_to_run():
    q, k, v = draw(40, 130, 64)
    assert torch.equal(attention_sm80(q, k, v), attention_sm80(q, k, v))


# On a GPU


def programs(run, head_dim, dtype):
    if run is attention_cuda:
        return [attention_mma.cuda_source(head_dim, dtype)]
    kind = attention_mma.ELEMENT[dtype][1]
    return [tile.program(head_dim, kind) for tile in chosen(head_dim)]


BOTH = pytest.mark.parametrize("run", [attention_sm80, attention_cuda], ids=["ptx", "cuda"])


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_head_dimension(run, dtype):
    head_dims = range(8, 257, 8)
    with ThreadPoolExecutor() as pool:  # NVRTC takes a second or two for each
        every = [p for d in head_dims for p in programs(run, d, dtype)]
        list(pool.map(lambda p: p.compile(loader.device_arch(0)), every))
    for head_dim in head_dims:
        q, k, v = draw(133, 150, head_dim, dtype, "cuda", heads=2)
        assert_right(run(q, k, v), q, k, v)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
def test_lengths(run, head_dim):
    for queries in (1, 7, 77, 127, 129, 1000):
        for keys in (1, 7, 77, 127, 129, 1000, 4096):
            q, k, v = draw(queries, keys, head_dim, device="cuda", batch=2, heads=3)
            assert_right(run(q, k, v), q, k, v)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_extreme_scores(run, magnitude, dtype):
    q, k, v = draw(500, 700, 64, dtype, "cuda", heads=2)
    q, k = q * (magnitude / 30) ** 0.5, k * (magnitude / 30) ** 0.5
    for keys in (k, steep(k, 3.0)):
        assert_right(run(q, keys, v), q, keys, v)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("key", [0, 7, 500, 699])
def test_a_dominating_key(run, key):
    for head_dim in (40, 128):
        q, k, v = draw(300, 700, head_dim, device="cuda", heads=2)
        q = q.abs()
        k[:, key] = 1e3
        assert_right(run(q, k, v), q, k, v)


@pytest.mark.gpu
@BOTH
def test_strides(run):
    """One fused projection, heads outside tokens, a ring buffer's window, every second token."""
    fused = torch.randn(2, 300, 3, 4, 40, device="cuda").to(BF16).unbind(2)
    heads_first = [x.transpose(1, 2) for x in torch.randn(3, 2, 5, 200, 64, device="cuda").to(BF16)]
    memory = torch.randn(2, 2, 900, 2, 80, device="cuda").to(BF16)
    query = torch.randn(2, 130, 2, 80, device="cuda").to(BF16)
    window = (query, memory[0, :, 300:811], memory[1, :, 300:811])
    sparse = [x[:, ::2] for x in torch.randn(3, 1, 400, 3, 128, device="cuda").to(BF16)]
    for q, k, v in (fused, heads_first, window, sparse):
        assert_right(run(q, k, v), q, k, v)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2])
def test_scales_on_a_gpu(run, scale):
    q, k, v = draw(200, 300, 64, device="cuda", heads=2)
    assert_right(run(q, k, v, scale), q, k, v, scale)


@pytest.mark.gpu
@BOTH
def test_nothing_to_do(run):
    q, k, v = draw(5, 6, 64, device="cuda", batch=0)
    assert run(q, k, v).shape == (0, 5, 1, 64)
    q, k, v = draw(0, 6, 64, device="cuda")
    assert run(q, k, v).shape == (1, 0, 1, 64)
    q, k, v = draw(5, 0, 64, device="cuda")
    assert torch.equal(run(q, k, v), torch.zeros_like(q))


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(run, value):
    q, k, v = draw(200, 300, 64, device="cuda", heads=2)
    expected = run(q, k, v)
    v[:, 150, 0] = value
    out = run(q, k, v)
    assert not out[:, :, 0].isfinite().any()
    assert torch.equal(out[:, :, 1], expected[:, :, 1])


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160, 256])
def test_identical_bits_graphs_and_two_streams_at_once(run, head_dim):
    """Each stream has inputs of its own, so that one that sees the other's shows."""
    inputs = [draw(1000, 1000, head_dim, device="cuda", heads=4) for _ in range(2)]
    expected = [run(*x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = []
    for _ in range(8):
        for stream, x, right in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                outs.append((run(*x), right))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs[0])
    captured.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, right) for out, right in [*outs, (captured, expected[0])])
