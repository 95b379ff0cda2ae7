"""attention.sm90a: resources, instruction order, emulated and on a GPU."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
from attention_calls import BF16, F16, assert_right, draw, steep

from mirage_hello.kernels import attention_sm90a as attention_sm90a_module
from mirage_hello.kernels import tuning
from mirage_hello.kernels.attention_sm90a import Tile, attention_sm90a, candidates, choose_tile
from mirage_hello.ptx import assembler

# heads, queries, keys, head dimension: the rows of the benchmark, and odd head dimensions
SHAPES = [
    (8, 4096, 4096, 40),
    (8, 4096, 77, 40),
    (8, 1024, 77, 80),
    (8, 256, 77, 160),
    (10, 4096, 4096, 64),
    (16, 8192, 8192, 64),
    (8, 1024, 1024, 80),
    (16, 8192, 8192, 128),
    (8, 256, 256, 160),
    (2, 300, 300, 8),
    (2, 300, 300, 256),
]
TILES = sorted({(shape[-1], choose_tile(*shape, BF16)) for shape in SHAPES}, key=str)
# Small, one of each kind of loop: turns or not, either order of the products, unrolled or not.
LAZY = [
    Tile(3, 48, 3, True, 2, True),
    Tile(2, 48, 2, True, 1, True, pv_first=True, unroll=True),
    Tile(2, 32, 3, False, 3, True, pv_first=True),
    Tile(1, 64, 3, False, 2, True, unroll=True),
    Tile(1, 64, 2, False, 2, True, unroll=True),
]


# Resources: the Budget lines of the sources, held against ptxas -v


@pytest.mark.parametrize(("heads", "queries", "keys", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sm90a_has_no_spills_and_no_serialised_products(heads, queries, keys, head_dim, dtype):
    tile = choose_tile(heads, queries, keys, head_dim, dtype)
    text = tile.program(head_dim, "bf16" if dtype == BF16 else "f16").text
    assert tile.smem_bytes(head_dim) <= 232448
    assert f"shared {tile.smem_bytes(head_dim)} B" in text
    _, said = assembler.ptxas(text, "sm_90a", ("-v",))
    assert " 0 bytes spill stores" in said
    assert "C75" not in said, said  # setmaxnreg ignored, products serialised, waits moved


@pytest.mark.parametrize(
    ("head_dim", "tile", "loops", "least"),
    [
        (40, Tile(4, 80, 3, True, 2, True), 1, 35),  # 40 less 5 polynomials
        (160, Tile(1, 64, 3, False, 0, True, unroll=True), 3, 24),
    ],
)
def test_exponentials_run_under_the_second_product(head_dim, tile, loops, least, tmp_path):
    """In SASS: wait for S, exponentials, wait for P V. ptxas once moved the second wait up."""
    wheel = importlib.util.find_spec("triton")
    assert wheel, "pip install triton: its wheel has nvdisasm"
    nvdisasm = Path(wheel.submodule_search_locations[0], "backends/nvidia/bin/nvdisasm")
    cubin = tmp_path / "attention.cubin"
    cubin.write_bytes(tile.program(head_dim, "bf16").compile("sm_90a"))
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    events = re.findall(r"DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2", done.stdout)
    pieces = "".join({"MUFU.EX2": "e"}.get(x, x[-1]) for x in events).split("1")[1:]
    assert len(pieces) == loops + 1, "the lazy loop, unrolled or not, and the exact one"
    for piece in pieces:
        assert piece.index("0") >= least, "exponentials before the wait for P V"


@pytest.mark.parametrize(
    ("shape", "warpgroups"),
    [
        ((8, 4096, 4096, 40), 4),  # 128 tiles of 256 rows
        ((16, 4096, 4096, 40), 4),
        ((10, 4096, 4096, 64), 3),  # 220 of 192 in 2 rounds, 160 of 256 too
        ((16, 8192, 8192, 64), 4),  # 512 in 4 rounds, where 688 of 192 take 6
        ((8, 1024, 1024, 80), 1),  # 128 tiles of 64 rows
        ((16, 8192, 8192, 128), 2),
        ((8, 256, 256, 160), 1),
        ((8, 4096, 77, 40), 4),
    ],
)
def test_what_the_estimate_chooses(shape, warpgroups):
    assert choose_tile(*shape, BF16).warpgroups == warpgroups


def test_the_tile_is_asked_of_the_tuning_tables():
    """What `mirage tune` and `mirage explain` hear, with nothing launched."""
    q, k, v = (torch.empty(1, 4096, 10, 64, dtype=BF16, device="meta") for _ in range(3))
    request = tuning.request_of(attention_sm90a, (q, k, v))
    assert (request.op, request.key) == ("attention", "heads=10 n=4096 m=4096 d=64 dtype=bf16")
    choice = tuning.choose(request, card="none")
    assert choice.tile == choose_tile(10, 4096, 4096, 64, BF16)
    assert choice.runner_up in candidates(4096, 64, BF16)
    assert choice.cost_ratio > 1


# Emulated


@pytest.mark.parametrize("head_dim", [40, 72])
@pytest.mark.parametrize("keys", [150, 330])
@pytest.mark.parametrize("tile", LAZY)
def test_lazy_tiles_in_the_emulator(tile, keys, head_dim):
    q, k, v = draw(150, keys, head_dim)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.parametrize(
    ("tile", "queries", "keys", "head_dim"),
    [
        (Tile(1, 80, 1, False, 0), 60, 77, 40),
        (Tile(2, 32, 2, False, 0, pv_first=True), 100, 100, 160),
        (Tile(3, 64, 2, True, 0), 130, 200, 72),
        (Tile(2, 48, 2, True, 0, pv_first=True), 130, 200, 256),
    ],
)
def test_exact_tiles_in_the_emulator(tile, queries, keys, head_dim):
    q, k, v = draw(queries, keys, head_dim)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.parametrize(
    ("tile", "queries", "head_dim", "rounds"),
    [
        (Tile(3, 48, 2, True, 1, True, pv_first=True, unroll=True, short=2), 600, 64, (3, 1)),
        (Tile(3, 48, 3, True, 2, True, short=2), 100, 40, (0, 1)),
        (Tile(2, 48, 2, False, 0, short=1), 450, 72, (3, 2)),
        (Tile(3, 48, 2, False, 0, True, short=1), 650, 64, (3, 2)),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_of_two_heights(tile, queries, head_dim, rounds, batch, monkeypatch):
    """On 3 multiprocessors; also where the lazy maximum does not do."""
    monkeypatch.setattr(attention_sm90a_module, "MULTIPROCESSORS", 3)
    assert tile.rounds(2, queries) == rounds
    q, k, v = draw(queries, 150, head_dim, batch=batch, heads=2 // batch)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)
    k = steep(k, 4000.0)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.parametrize(("warpgroups", "ping_pong", "short"), [(3, True, 1), (2, False, 2)])
def test_a_tile_without_a_neighbour_for_its_turns_is_refused(warpgroups, ping_pong, short):
    with pytest.raises(ValueError, match=rf"short must be 0 or from .* \(got {short}\)"):
        Tile(warpgroups, 48, 2, ping_pong, 0, short=short)


def run(q, k, v, scale=None):
    return attention_sm90a(q, k, v, scale, Tile(1, 64, 2, False, 2, True, unroll=True))


@pytest.mark.parametrize(("dtype", "largest"), [(BF16, 4000.0), (F16, 300.0)])
@pytest.mark.parametrize("tile", LAZY)
def test_scores_beyond_the_lazy_maximum_run_again(tile, dtype, largest):
    q, k, v = draw(70, 330, 64, dtype)
    k = steep(k, largest)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.parametrize("tile", [*LAZY, Tile(1, 80, 1, False, 0)])
def test_one_key_gives_its_value_exactly(tile):
    q, k, v = draw(70, 1, 64)
    assert torch.equal(attention_sm90a(q, k, v, None, tile), v.expand(1, 70, 1, 64))


@pytest.mark.parametrize("key", [0, 9, 15, 63])
def test_one_dominating_key_walked_last(key):
    """Where its column is a polynomial's (9, 15, 63) an overflow must show in l as anywhere.

    Scores of some 6000: from 1e5 on, c s - c m is rounded by enough to move p off 1.
    """
    q, k, v = draw(20, 150, 64)
    q = q.abs()
    k[:, key] = 1e3
    assert_right(run(q, k, v), q, k, v)


def test_scores_beyond_the_polynomials_arithmetic():
    """Scores of some 1e8: 1.5 x 2^23 - c m is inexact, so the exact pass takes over."""
    q, k, v = draw(20, 150, 64)
    q, k = q.sign() * 3e3, k.sign() * 3e3
    assert_right(run(q, k, v), q, k, v)


@pytest.mark.parametrize("masked", [slice(0, 64), slice(64, 150)])
def test_masked_keys(masked):
    q, k, v = draw(20, 150, 64)
    q = q.abs()
    k[:, masked] = -float("inf")
    assert_right(run(q, k, v), q, k, v)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2])
def test_scales(scale):
    q, k, v = draw(20, 100, 64)
    assert_right(run(q, k, v, scale), q, k, v, scale)


def test_slices_of_a_fused_projection():
    q, k, v = torch.randn(2, 70, 3, 2, 64).to(BF16).unbind(2)
    assert_right(run(q, k, v), q, k, v)


def test_identical_bits_from_run_to_run():
    q, k, v = draw(40, 130, 64)
    assert torch.equal(run(q, k, v), run(q, k, v))


# On a GPU of compute capability 9.0


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 7, 77, 127, 129, 1000, 4096])
@pytest.mark.parametrize("queries", [1, 129, 1000])
@pytest.mark.parametrize(("head_dim", "tile"), TILES)
def test_lengths_on_a_gpu(head_dim, tile, queries, keys):
    q, k, v = draw(queries, keys, head_dim, device="cuda", batch=2, heads=3)
    assert_right(attention_sm90a(q, k, v), q, k, v)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "tile"), TILES)
def test_scores_beyond_the_lazy_maximum_on_a_gpu(head_dim, tile):
    q, k, v = draw(300, 1000, head_dim, device="cuda", heads=2)
    k = steep(k, 4000.0)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_extreme_scores_on_a_gpu(magnitude, dtype):
    q, k, v = draw(500, 700, 64, dtype, "cuda", heads=2)
    q, k = q * (magnitude / 30) ** 0.5, k * (magnitude / 30) ** 0.5
    for keys in (k, steep(k, 3.0)):
        assert_right(attention_sm90a(q, keys, v), q, keys, v)


@pytest.mark.gpu
@pytest.mark.parametrize("key", [0, 7, 500])
def test_a_dominating_key_on_a_gpu(key):
    q, k, v = draw(300, 700, 40, device="cuda", heads=2)
    q = q.abs()
    k[:, key] = 1e3
    assert_right(attention_sm90a(q, k, v), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("steepness", [None, 4000.0])
@pytest.mark.parametrize("queries", [4096, 4000, 3000])
def test_tiles_of_two_heights_on_a_gpu(queries, steepness):
    tile = Tile(3, 128, 2, True, 1, True, pv_first=True, unroll=True, short=2)
    q, k, v = draw(queries, 700, 64, device="cuda", batch=2, heads=5)
    assert tile.rounds(10, queries)[1] > 0
    k = steep(k, steepness) if steepness else k
    out = attention_sm90a(q, k, v, None, tile)
    assert_right(out, q, k, v)
    assert torch.equal(out, attention_sm90a(q, k, v, None, tile))


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 16, 77, 128, 129])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160, 256])
def test_every_candidate_on_a_gpu(head_dim, keys):
    q, k, v = draw(300, keys, head_dim, device="cuda", batch=2, heads=3)
    for tile in candidates(keys, head_dim, BF16):
        assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 77, 129, 1000])
@pytest.mark.parametrize(("head_dim", "tile"), TILES)
def test_half_precision_on_a_gpu(head_dim, tile, keys):
    q, k, v = draw(200, keys, head_dim, F16, "cuda", heads=2)
    assert_right(attention_sm90a(q, k, v), q, k, v)
    assert_right(attention_sm90a(q, k, v, None, tile), q, k, v)


@pytest.mark.gpu
def test_strides_on_a_gpu():
    """One fused projection, heads outside tokens, a ring buffer's window, every second token."""
    fused = torch.randn(2, 300, 3, 4, 40, device="cuda").to(BF16).unbind(2)
    heads_first = [x.transpose(1, 2) for x in torch.randn(3, 2, 5, 200, 64, device="cuda").to(BF16)]
    memory = torch.randn(2, 2, 900, 2, 80, device="cuda").to(BF16)
    query = torch.randn(2, 130, 2, 80, device="cuda").to(BF16)
    window = (query, memory[0, :, 300:811], memory[1, :, 300:811])
    sparse = [x[:, ::2] for x in torch.randn(3, 1, 400, 3, 128, device="cuda").to(BF16)]
    for q, k, v in (fused, heads_first, window, sparse):
        assert_right(attention_sm90a(q, k, v), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2])
def test_scales_on_a_gpu(scale):
    q, k, v = draw(200, 300, 64, device="cuda", heads=2)
    assert_right(attention_sm90a(q, k, v, scale), q, k, v, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(value):
    q, k, v = draw(200, 300, 64, device="cuda", heads=2)
    expected = attention_sm90a(q, k, v)
    v[:, 150, 0] = value
    out = attention_sm90a(q, k, v)
    assert not out[:, :, 0].isfinite().any()
    assert torch.equal(out[:, :, 1], expected[:, :, 1])


def test_nothing_to_do(device):
    """Neither batches, queries, heads nor keys: nothing is launched."""
    for batch, queries, heads in [(0, 5, 2), (2, 0, 2), (2, 5, 0)]:
        q, k, v = draw(queries, 6, 64, device=device, batch=batch, heads=heads)
        assert attention_sm90a(q, k, v).shape == (batch, queries, heads, 64)
    q, k, v = draw(5, 0, 64, device=device)
    assert torch.equal(attention_sm90a(q, k, v), torch.zeros_like(q))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "tile"), TILES)
def test_identical_bits_graphs_and_two_streams_at_once(head_dim, tile):
    """Each stream has inputs of its own, so that one that sees the other's shows."""
    inputs = [draw(1000, 1000, head_dim, device="cuda", heads=4) for _ in range(2)]
    expected = [attention_sm90a(*x, tile=tile) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = []
    for _ in range(8):
        for stream, x, right in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                outs.append((attention_sm90a(*x, tile=tile), right))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_sm90a(*inputs[0], tile=tile)
    captured.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, right) for out, right in [*outs, (captured, expected[0])])
