"""Tile sweep of linear.sm90a and its variants on a GPU: parity, then time beside cuBLAS.

python bench/sweeps/linear.py [GROUP-SUBSTRING ...]      writes $OUT/sweep-linear.json

A group of cases runs in one process: odd, plain, fused, normed, fp8. The peers are torch's own
sequences (cuBLAS, then elementwise kernels), eager and compiled.
"""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello import reference
from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import layer_norm_linear, linear_fp8, parity, tuning
from mirage_hello.kernels import linear_sm90a as gemm
from mirage_hello.kernels.linear_sm90a import Tile
from mirage_hello.ptx import loader, programmatic

# M, K, N (geglu: both halves)
PLAIN = (
    (4096, 320, 2560), (4096, 1280, 320), (1024, 640, 5120), (1024, 2560, 640),
    (256, 1280, 10240), (256, 5120, 1280), (4096, 320, 320), (1024, 640, 640), (256, 1280, 1280),
)  # fmt: skip
RESIDUAL = (*PLAIN[1:6:2], *PLAIN[6:])
QKV = ((4096, 320, 960), (1024, 640, 1920), (256, 1280, 3840))
GEGLU = PLAIN[0:6:2]
FP8 = PLAIN[:6]
EFFORT = harness.Effort(rounds=6, sample_us=400.0)
TILES = 18

COLD_BYTES = 128 * 2**20  # of weights in turn: twice the L2

Run = Callable[..., Tensor]


@dataclass
class Case:
    """One row: what runs on its weight, what it is measured against on its own, the judge."""

    name: str
    run: Run  # (weight, tile=)
    weight: Tensor
    peers: dict[str, Callable[[Tensor], Tensor]]
    peer_weight: Tensor
    judge: Callable[[Tensor], str]  # "" or what is wrong
    program: Callable[[Tile], loader.Program]
    candidates: list[Tile] = field(default_factory=list)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def programs(
    op: str,
    shape: tuple[int, int, int],
    residual: bool = False,
    norm: bool = False,
    dtype: str = "bf16",
) -> Callable[[Tile], loader.Program]:
    """Tile -> its program for [M, K, N], which ptxas may compile before the first launch."""
    fp8, gated, (m, k, n) = dtype == "e4m3", op == "geglu", shape
    blocks = -(-k // (128 if fp8 else 64))

    def made(tile: Tile) -> loader.Program:
        tiles, _ = tile.tiles(m, n // 2 if gated else n, gated)
        fitted = tile.fitted(tile.loads(tiles, blocks), gated, norm or fp8, residual)
        return gemm.program(op, fitted, dtype, norm, residual)

    return made


def compile_all(pairs: list[tuple[Case, Tile]]) -> None:
    with ThreadPoolExecutor(16) as pool:  # ptxas is a process of its own
        list(pool.map(lambda pair: pair[0].program(pair[1]).compile("sm_90a"), pairs))


def tiles(case: Case) -> list[Tile]:
    """Of what it asks to choose among: the cheapest two of each kind, at most TILES."""
    asked: list[tuning.Request] = []

    def listen(request: tuning.Request) -> Tile:
        asked.append(request)
        raise tuning.Asked(request)

    with tuning.listening(listen), contextlib.suppress(tuning.Asked):
        case.run(case.weight, tile=None)
    ranked, found = asked[0].ranked(), list[Tile]()
    kinds: dict[tuple, int] = {}
    for tile in ranked:
        kind = tile.groups, tile.m_tiles, tile.pingpong, tile.split > 1, tile.shared
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= 2 and len(found) < TILES:
            found.append(tile)
    return found


def judged(plain: Tensor, truth: Tensor) -> Callable[[Tensor], str]:
    def judge(out: Tensor) -> str:
        result = parity.judge(out, plain, truth)
        return "" if result.passed else str(result)

    return judge


def linear_case(m: int, k: int, n: int, residual: bool = False) -> Case:
    x, weight, bias = draw(m, k), draw(n, k, scale=k**-0.5), draw(n)
    added = draw(m, n) if residual else None
    truth = reference.linear(x.double(), weight.double(), bias.double())
    truth = truth if added is None else truth + added.double()

    def eager(w: Tensor) -> Tensor:
        out = F.linear(x, w, bias)
        return out if added is None else out + added

    return Case(
        f"linear {m}x{k}x{n}" + (" + residual" if residual else ""),
        lambda w, tile: gemm.linear_sm90a(x, w, bias, added, tile=tile),
        weight,
        {"cublas, add" if residual else "cublas": eager},
        weight,
        judged(eager(weight), truth),
        programs("linear", (m, k, n), residual),
    )


def gated_case(m: int, k: int, n: int) -> Case:
    x, weight, bias = draw(m, k), draw(n, k, scale=k**-0.5), draw(n)

    def eager(w: Tensor) -> Tensor:
        return reference.geglu(x, w, bias)

    return Case(
        f"geglu {m}x{k}x{n}",
        lambda w, tile: gemm.geglu_sm90a(x, w, bias, tile=tile),
        weight,
        {"cublas, gelu, product": eager, "compiled": torch.compile(eager)},
        weight,
        judged(eager(weight), reference.geglu(x.double(), weight.double(), bias.double())),
        programs("geglu", (m, k, n)),
    )


def normed_case(op: str, m: int, k: int, n: int) -> Case:
    x, weight, bias = draw(m, k) + 0.5, draw(n, k, scale=k**-0.5), draw(n)
    gamma, beta = 1 + draw(k, scale=0.1), draw(k, scale=0.1)
    folded = layer_norm_linear.fold(gamma, beta, weight, bias)
    of, fused = getattr(reference, op), getattr(layer_norm_linear, f"layer_norm_{op}")

    def eager(w: Tensor) -> Tensor:
        return of(F.layer_norm(x, (k,), gamma, beta), w, bias)

    normal = reference.layer_norm(x.double(), gamma.double(), beta.double())
    return Case(
        f"layer_norm, {op} {m}x{k}x{n}",
        lambda w, tile: fused(x, replace(folded, weight=w), tile=tile),
        folded.weight,
        {"layer_norm, cublas": eager, "compiled": torch.compile(eager)},
        weight,
        judged(eager(weight), of(normal, weight.double(), bias.double())),
        programs(op, (m, k, n), norm=True),
    )


def fp8_case(m: int, k: int, n: int) -> Case:
    x, weight, bias = draw(m, k), draw(n, k, scale=k**-0.5), draw(n)
    packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
    q = linear_fp8.quantize(x, packed.x_scale)
    quantised = linear_fp8.linear_fp8_torch(x.double(), packed)
    exact = F.linear(x.double(), weight.double(), bias.double())

    def error(out: Tensor, truth: Tensor) -> float:
        return ((out.double() - truth).norm() / truth.norm()).item()

    def judge(out: Tensor) -> str:
        short = error(out, quantised)
        return "" if short < 4e-3 else f"error {short:.1e} against the quantised values"

    out = linear_fp8.linear_fp8(q, packed)
    errors = f"error {error(out, quantised):.2e} of the sums, {error(out, exact):.2e} in all"
    print(f"fp8 {m}x{k}x{n}: {errors}", flush=True)
    return Case(
        f"fp8 {m}x{k}x{n}",
        lambda w, tile: linear_fp8.linear_fp8(q, replace(packed, weight=w), tile=tile),
        packed.weight,
        {
            "cublas bf16": lambda w: F.linear(x, w, bias),
            "ours bf16": lambda w: gemm.linear_sm90a(x, w, bias),
        },
        weight,
        judge,
        programs("linear", (m, k, n), dtype="e4m3"),
    )


GROUPS: dict[str, Callable[[], list[Case]]] = {
    "plain": lambda: [linear_case(*s) for s in (*PLAIN, *QKV)],
    "fused": lambda: (
        [linear_case(*s, residual=True) for s in RESIDUAL] + [gated_case(*s) for s in GEGLU]
    ),
    "normed": lambda: (
        [normed_case("linear", *s) for s in QKV] + [normed_case("geglu", *s) for s in GEGLU]
    ),
    "fp8": lambda: [fp8_case(*s) for s in FP8],
}


def run_group(name: str) -> dict:
    if name == "odd":
        return odd_shapes()
    torch.manual_seed(0)
    cases = GROUPS[name]()
    for case in cases:
        case.candidates = tiles(case)
    compile_all([(case, tile) for case in cases for tile in case.candidates])
    return {"case": name, "rows": [measured(case) for case in cases]}


def measured(case: Case) -> dict:
    """Parity and determinism of every tile, then hot times of all and those of the best with
    weights that come from device memory, as in a model: copies of the weight in turn."""
    good: dict[str, Run] = {}
    wrong = []
    for tile in case.candidates:
        out = case.run(case.weight, tile=tile)
        fault = case.judge(out)
        if not torch.equal(out, case.run(case.weight, tile=tile)):
            fault += " not the same bits twice"
        if fault:
            wrong.append(f"{label(tile)}: {fault}")
            print(f"{case.name} WRONG {wrong[-1]}", flush=True)
        else:
            good[label(tile)] = functools.partial(case.run, tile=tile)
    hot = medians(case, good, [case.weight], [case.peer_weight])
    ranked = sorted(good, key=hot.__getitem__)
    ours, theirs = copies(case.weight), copies(case.peer_weight)
    cold = medians(case, {key: good[key] for key in ranked[:4]}, ours, theirs)
    with programmatic.without_overlap():
        alone = medians(case, {key: good[key] for key in ranked[:1]}, [case.weight], [])
    report(case, hot, cold, alone, ranked)
    found = {"hot_us": hot, "cold_weights_us": cold, "hot_without_overlap_us": alone}
    return {"case": case.name, **found, "chosen": label(case.candidates[0]), "wrong": wrong}


def copies(weight: Tensor) -> list[Tensor]:
    count = min(harness.MAX_CALLS, -(-COLD_BYTES // weight.nbytes))
    return [weight.clone() for _ in range(count)]


def medians(
    case: Case, ours: dict[str, Run], weights: list[Tensor], peer_weights: list[Tensor]
) -> dict[str, float]:
    """Of our tiles on each of the weights in turn, and of the peers on theirs, if any."""
    contenders = {key: [functools.partial(f, w) for w in weights] for key, f in ours.items()}
    if peer_weights:
        for key, peer in case.peers.items():
            contenders[key] = [functools.partial(peer, w) for w in peer_weights]
    timed = harness.measure(contenders, "cuda", effort=EFFORT)
    return {key: t.median_us for key, t in timed.items()}


def report(case: Case, hot: dict, cold: dict, alone: dict, ranked: Sequence[str]) -> None:
    peers = " ".join(f"{p} {hot[p]:.2f}/{cold[p]:.2f}" for p in case.peers)
    best_hot, best_cold = (min(times[p] for p in case.peers) for times in (hot, cold))
    first = f"{case.name}: {peers} us hot/cold weights"
    print(first + "".join(f"; alone {t:.2f}" for t in alone.values()), flush=True)
    chosen = label(case.candidates[0])
    for key in dict.fromkeys([*ranked[:5], *(k for k in ranked if k == chosen)]):
        also = f" cold {cold[key]:.2f} {best_cold / cold[key]:.2f}x" if key in cold else ""
        mark = " <- chosen" if key == chosen else ""
        print(f"  {hot[key]:6.2f} {best_hot / hot[key]:.2f}x {key}{also}{mark}", flush=True)


def label(tile: Tile) -> str:
    kind = " pingpong" if tile.pingpong else f" g{tile.groups}"
    kind += f" split{tile.split}" if tile.split > 1 else ""
    kind += f" shared {tile.shared}" if tile.shared else ""
    return f"{tile.block_m}x{tile.block_n}{kind}"


def odd_shapes() -> dict:
    """Random shapes of every variant, the chosen tile and a random one."""
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    torch.manual_seed(seed)
    pairs: list[tuple[Case, Tile]] = []
    for _ in range(24):
        m, n = dice.randint(1, 700), 8 * dice.randint(1, 90)
        k, deep = 8 * dice.randint(1, 90), 64 * dice.randint(1, 12)
        kind = dice.choice(("linear", "residual", "geglu", "layer_norm", "layer_norm, geglu"))
        gated, norm = kind.endswith("geglu"), kind.startswith("layer_norm")
        if norm:
            case = normed_case("geglu" if gated else "linear", m, deep, n << gated)
        elif gated:
            case = gated_case(m, k, 2 * n)
        else:
            case = linear_case(m, k, n, kind == "residual")
        fits = gemm.candidates(-(-(deep if norm else k) // 64), gated, norm)
        pairs += [(case, tiles(case)[0]), (case, dice.choice(fits))]
    compile_all(pairs)
    faults = [(case, tile, case.judge(case.run(case.weight, tile=tile))) for case, tile in pairs]
    wrong = [f"{case.name}, {tile}: {fault}" for case, tile, fault in faults if fault]
    count = len(pairs)
    print(f"odd shapes, seed {seed}: {count - len(wrong)} of {count} right", flush=True)
    print("\n".join(wrong[:10]), flush=True)
    return {"case": "odd", "seed": seed, "count": count, "wrong": wrong}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "linear", ["odd", *GROUPS], run_group, limit_s=60))
