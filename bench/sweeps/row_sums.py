"""What a layer_norm between two linears costs on a GPU, by where its statistics come from.

    python bench/sweeps/row_sums.py [CASE-SUBSTRING ...]      writes $OUT/sweep-row-sums.json

h = x W1^T + b + residual, then linear or geglu of layer_norm(h), as in a transformer block:

    product, product      without the norm: what the rest is held against
    layer_norm            our kernel between the two
    statistics            folded; row_statistics reads h once more
    sums                  folded; the first product leaves sums, the second merges them
    sums TILE             the same with another tile of the second product
    torch                 eager: cuBLAS, add, layer_norm, cuBLAS

Hot, and with the weights in turn from device memory. About 10 s a case.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import layer_norm_linear as folding
from mirage_hello.kernels import linear_sm90a as gemm
from mirage_hello.kernels import ops, parity
from mirage_hello.kernels.linear_sm90a import Tile

LIMIT_S = 60
COLD_BYTES = 128 * 2**20  # of weights in turn: twice the L2
TILES = 10
# name: op, M, C, N of the second product
CASES = {
    "qkv @64": ("linear", 4096, 320, 960),
    "q @64": ("linear", 4096, 320, 320),
    "geglu @64": ("geglu", 4096, 320, 1280),
    "qkv @32": ("linear", 1024, 640, 1920),
    "q @32": ("linear", 1024, 640, 640),
    "geglu @32": ("geglu", 1024, 640, 2560),
    "qkv @16": ("linear", 256, 1280, 3840),
    "q @16": ("linear", 256, 1280, 1280),
    "geglu @16": ("geglu", 256, 1280, 5120),
}
Weights = tuple[Tensor, Tensor, folding.FoldedLinear]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def tiles(op: str, m: int, n: int, c: int) -> list[Tile]:
    """The cheapest of each kind, by the model."""
    gated, blocks = op == "geglu", -(-c // 64)
    ranked = sorted(
        gemm.candidates(blocks, gated, norm=True), key=lambda t: t.clocks(m, n, blocks, gated)
    )
    kinds: dict[tuple, Tile] = {}
    for tile in ranked:
        kinds.setdefault((tile.block_m, tile.block_n, tile.pingpong, tile.shared), tile)
    return list(kinds.values())[:TILES]


def run_case(name: str) -> dict:
    op, m, c, n = CASES[name]
    torch.manual_seed(0)
    rows = 2 * n if op == "geglu" else n
    x, residual = draw(m, c), draw(m, c)
    bias, gamma, beta, bias2 = draw(c), draw(c), draw(c), draw(rows)
    copies = -(-COLD_BYTES // ((c + rows) * c * 2))

    def weights() -> Weights:
        w1, w2 = draw(c, c, scale=c**-0.5), draw(rows, c, scale=c**-0.5)
        return w1, w2, folding.fold(gamma, beta, w2, bias2)

    sets = [weights() for _ in range(copies)]
    product = getattr(ops, op)
    folded_op = getattr(folding, f"layer_norm_{op}")

    def plain(w1: Tensor, w2: Tensor, _: folding.FoldedLinear) -> Tensor:
        return product(ops.linear(x, w1, bias, residual), w2, bias2)

    def normed(w1: Tensor, w2: Tensor, _: folding.FoldedLinear) -> Tensor:
        h = ops.linear(x, w1, bias, residual)
        return product(ops.layer_norm(h, gamma, beta), w2, bias2)

    def by_statistics(w1: Tensor, w2: Tensor, folded: folding.FoldedLinear) -> Tensor:
        return folded_op(ops.linear(x, w1, bias, residual), folded)

    def by_sums(
        w1: Tensor, w2: Tensor, folded: folding.FoldedLinear, tile: Tile | None = None
    ) -> Tensor:
        h, sums = gemm.linear_summed(x, w1, bias, residual)
        return folded_op(h, folded, tile=tile, sums=sums)

    def eager(w1: Tensor, w2: Tensor, _: folding.FoldedLinear) -> Tensor:
        h = F.layer_norm(F.linear(x, w1, bias) + residual, (c,), gamma, beta)
        return getattr(reference, op)(h, w2, bias2)

    ways: dict[str, Callable[..., Tensor]] = {
        "product, product": plain,
        "layer_norm": normed,
        "statistics": by_statistics,
        "sums": by_sums,
        "torch": eager,
    }
    tried = tiles(op, m, n, c)
    ways |= {f"sums {t}": partial(by_sums, tile=t) for t in tried}
    with ThreadPoolExecutor(16) as pool:  # ptxas is a process of its own; the launches come after
        list(pool.map(lambda t: compiled(op, t, m, n, c), tried))
    truth = eager_in_double(op, x, residual, bias, gamma, beta, bias2, *sets[0][:2])
    for key, way in list(ways.items())[1:]:
        result = parity.judge(way(*sets[0]), eager(*sets[0]), truth)
        if not result.passed:
            print(f"{name} {key} WRONG {result}", flush=True)
            del ways[key]
    effort = harness.Effort(rounds=6, sample_us=400.0)
    hot = {key: partial(way, *sets[0]) for key, way in ways.items()}
    cold = {key: [partial(way, *s) for s in sets] for key, way in ways.items()}
    us = [
        {key: t.median_us for key, t in harness.measure(c, "cuda", effort=effort).items()}
        for c in (hot, cold)
    ]
    chosen = gemm.choose_tile(op, m, n, -(-c // 64), True)
    print(f"{name}: chosen {chosen}", flush=True)
    for key in sorted(us[0], key=lambda key: us[1][key]):
        print(f"   {us[0][key]:7.2f} {us[1][key]:7.2f} us  {key}", flush=True)
    return {"case": name, "hot_us": us[0], "cold_us": us[1], "chosen": str(chosen)}


def compiled(op: str, tile: Tile, m: int, n: int, c: int) -> None:
    """The program of a tile behind sums of the chosen first product."""
    width = gemm.choose_tile("linear", m, c, -(-c // 64)).width(False)
    sums = gemm.RowSums(torch.empty(m, -(-c // width), 2), width)
    count, _ = tile.tiles(m, n, op == "geglu")
    fitted = tile.fitted(tile.loads(count, -(-c // 64)), op == "geglu", True)
    gemm.program(op, fitted, "bf16", True, **sums.variables(c)).compile("sm_90a")


def eager_in_double(op: str, *given: Tensor) -> Tensor:
    x, residual, bias, gamma, beta, bias2, w1, w2 = (t.double() for t in given)
    h = (F.linear(x, w1, bias) + residual).bfloat16().double()  # what every way rounds to
    return getattr(reference, op)(F.layer_norm(h, h.shape[-1:], gamma, beta), w2, bias2)


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "row-sums", CASES, run_case, LIMIT_S))
