"""Tile sweep of linear.sm90a (linear and geglu) on a GPU: parity, then time beside cuBLAS.

python bench/sweeps/linear.py [CASE-SUBSTRING]      writes $OUT/sweep-linear.json
"""

import random
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mirage_hello import reference
from mirage_hello.bench.sweeps import product, runner
from mirage_hello.kernels import linear_sm90a as gemm
from mirage_hello.kernels import parity
from mirage_hello.kernels.product_sm90a import Tile

# name: (op, M, K, N)
SHAPES = (
    (4096, 320, 2560), (4096, 1280, 320), (1024, 640, 5120), (1024, 2560, 640),
    (256, 1280, 10240), (256, 5120, 1280), (4096, 320, 320), (1024, 640, 640), (256, 1280, 1280),
)  # fmt: skip
CASES = {f"linear {m}x{k}x{n}": ("linear", m, k, n) for m, k, n in SHAPES}
CASES |= {f"geglu {m}x{k}x{n}": ("geglu", m, k, n) for m, k, n in (SHAPES[0], SHAPES[2], SHAPES[4])}
TILES = 16


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def tiles(op: str, m: int, k: int, columns: int) -> list[Tile]:
    """The tiles with the least estimated time, at most 3 of one shape of output tile."""
    blocks, gated = -(-k // 64), op == "geglu"

    def clocks(tile: Tile) -> float:
        width = tile.block_n // 2 if gated else tile.block_n
        count = -(-m // tile.block_m) * -(-columns // width)
        return tile.clocks(count, blocks, tile.block_m * 128)

    found: list[Tile] = []
    for tile in sorted(gemm.candidates(blocks, gated), key=clocks):
        alike = [t for t in found if (t.block_m, t.block_n) == (tile.block_m, tile.block_n)]
        if len(alike) < 3 and len(found) < TILES:
            found.append(tile)
    return found


def run_case(name: str) -> dict:
    if name == "odd shapes":
        return odd_shapes()
    op, m, k, n = CASES[name]
    x, weight, bias = draw(m, k), draw(n, k, scale=k**-0.5), draw(n)
    columns = n // 2 if op == "geglu" else n
    run = gemm.geglu_sm90a if op == "geglu" else gemm.linear_sm90a
    truth = getattr(reference, op)(x.double(), weight.double(), bias.double())

    def unfused() -> torch.Tensor:
        out = F.linear(x, weight, bias)
        if op == "linear":
            return out
        h, gate = out.chunk(2, dim=-1)
        return h * F.gelu(gate)

    def compile_tile(tile: Tile) -> bytes:
        fitted = tile.fitted(tile.share(-(-k // 64)))
        return gemm.program(op, fitted, "bf16").compile("sm_90a")

    plain = unfused()
    case = product.Candidates(
        peers={"cublas" if op == "linear" else "cublas, gelu, product": unfused},
        run=lambda t: run(x, weight, bias, tile=t),
        judge=lambda out: parity.judge(out, plain, truth),
        tiles=tiles(op, m, k, columns),
        chosen=gemm.choose_tile(m, columns, k, op == "geglu"),
        compile=compile_tile,
        flops=2.0 * m * k * n,
    )
    return product.measure(name, case)


def odd_shapes() -> dict:
    """Random shapes, the chosen tile and a random one."""
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    torch.manual_seed(seed)
    wrong, count = [], 0
    for _ in range(36):
        op = dice.choice(["linear", "geglu"])
        m, k, n = dice.randint(1, 700), 8 * dice.randint(1, 90), 8 * dice.randint(1, 90)
        weight = draw(2 * n if op == "geglu" else n, k, scale=k**-0.5)
        args: tuple[torch.Tensor, ...] = (draw(m, k), weight, draw(weight.shape[0]))
        args += (draw(m, n),) if op == "linear" else ()
        truth = getattr(reference, op)(*(t.double() for t in args))
        plain = getattr(reference, op)(*args)
        kernels: dict[str, Callable[..., torch.Tensor]]
        kernels = {"geglu": gemm.geglu_sm90a, "linear": gemm.linear_sm90a}
        fits = gemm.candidates(-(-k // 64), op == "geglu")
        for tile in (None, dice.choice(fits)):
            result = parity.judge(kernels[op](*args, tile=tile), plain, truth)
            count += 1
            if not result.passed:
                wrong.append(f"{op} {m}x{k}x{n}, {tile}: {result}")
    print(f"odd shapes, seed {seed}: {count - len(wrong)} of {count} right", flush=True)
    print("\n".join(wrong[:10]), flush=True)
    return {"case": "odd shapes", "seed": seed, "count": count, "wrong": wrong}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "linear", ["odd shapes", *CASES], run_case))
