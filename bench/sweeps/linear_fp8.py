"""The transformers' layers in e4m3 on a GPU: parity, then every tile beside our own bfloat16.

python bench/sweeps/linear_fp8.py OUT.json [SUBSTRING ...]      about 90 s

A row is one launch of the 880m at 512x512: what it multiplies, what its epilogue does and where its
result goes. Hot, then with copies of the weight in turn (`linear.COLD_BYTES`), as a model has them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps.linear import COLD_BYTES
from mirage_hello.bench.tune import requests, unlaunched
from mirage_hello.kernels import (
    conv2d_fp8,
    conv2d_fused,
    layer_norm_linear,
    linear_fp8,
    prompt_attention,
    tuning,
)
from mirage_hello.kernels import linear_sm90a as gemm

SIZES = {320: (64, 5), 640: (32, 5), 1280: (16, 5)}  # channels: edge of the image, transformers
EFFORT = harness.Effort(rounds=6, sample_us=300.0)
TILES, COLD_TILES = 12, 4
E4M3 = torch.float8_e4m3fn
LIMIT_S = 60  # for the rows of one process

Run = Callable[..., Any]


@dataclass
class Row:
    """One launch. run: (weight, tile=) -> (result, what may come with it); peer: (weight) -> the
    same in bfloat16; truth: what the result must come to but for `allowed` of its norm."""

    name: str
    run: Run
    weight: Tensor
    peer: Run
    peer_weight: Tensor
    truth: Tensor
    allowed: float


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@dataclass
class Rows:
    """The residual stream of a transformer: rows, their sums, a copy in e4m3, its scale."""

    rows: Tensor
    sums: gemm.RowSums
    copy: Tensor
    scale: float


def stream(m: int, c: int) -> Rows:
    scale = 6.0 / linear_fp8.LARGEST
    x, weight = draw(m, c), torch.eye(c, device="cuda", dtype=torch.bfloat16)
    rows, sums = gemm.linear_summed(x, weight, copy_scale=scale)
    assert sums.copy is not None
    return Rows(rows, sums, sums.copy, scale)


def folded_layer(n: int, c: int) -> layer_norm_linear.FoldedLinear:
    return layer_norm_linear.fold(1 + draw(c, scale=0.1), draw(c), draw(n, c, scale=c**-0.5))


def packed_row(name: str, m: int, k: int, c: int, residual: bool) -> Row:
    """A product that leaves rows, sums and copy: the projection in, the prompt's values."""
    x, weight, bias = draw(m, k), draw(c, k, scale=k**-0.5), draw(c)
    added, scale = (draw(m, c) if residual else None), 6.0 / linear_fp8.LARGEST
    packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), bias)
    q = linear_fp8.quantize(x, packed.x_scale)
    return Row(
        name,
        lambda w, tile=None: gemm.scaled_summed(q, w, packed.columns, added, tile, scale),
        packed.weight,
        lambda w: gemm.linear_summed(x, w, bias, added),
        weight,
        linear_fp8.linear_fp8_torch(q, packed, added),
        4e-3,
    )


def copied_row(m: int, c: int) -> Row:
    """The projection behind attention, in bfloat16: what its copy in e4m3 costs."""
    x, weight, bias, added = draw(m, c), draw(c, c, scale=c**-0.5), draw(c), draw(m, c)
    plain = gemm.linear_summed(x, weight, bias, added)[0]
    return Row(
        f"out {m}x{c}x{c}",
        lambda w, tile=None: gemm.linear_summed(x, w, bias, added, tile, 6 / 448),
        weight,
        lambda w: gemm.linear_summed(x, w, bias, added),
        weight,
        plain,
        1e-3,
    )


def normed_row(op: str, m: int, c: int, n: int) -> Row:
    of, layer = stream(m, c), folded_layer(n, c)
    eight = linear_fp8.fold(layer, of.scale)
    truth = linear_fp8.layer_norm_linear_fp8_torch(of.rows, of.copy, eight)
    out_scale = None
    if op == "geglu":
        h, gate = truth.chunk(2, -1)
        truth = h * torch.nn.functional.gelu(gate)
        out_scale = truth.abs().max().item() / linear_fp8.LARGEST
        truth = truth / out_scale
    wide = getattr(layer_norm_linear, f"layer_norm_{op}")
    given = (eight.columns, None, 1e-5)

    def run(w: Tensor, tile: Any = None) -> Tensor:
        return gemm.normed(op, of.copy, w, *given, tile, out_scale, of.sums, eight.factor)

    return Row(
        f"{'gate' if op == 'geglu' else 'q, k, v'} {m}x{c}x{n}",
        run,
        eight.weight,
        lambda w: wide(
            of.rows, layer_norm_linear.FoldedLinear(w, layer.columns), sums=of.sums
        ),
        layer.weight,
        truth,
        4e-3 if op == "linear" else 0.03,
    )  # fmt: skip


def scores_row(m: int, c: int, heads: int = 8) -> Row:
    of = stream(m, c)
    weights = draw(c, c, scale=c**-0.5), draw(77, 2 * c), draw(c, c, scale=c**-0.5)
    prompt = prompt_attention.fold(draw(c), draw(c), *weights, heads)
    eight = prompt_attention.quantise(prompt, of.scale, None)
    scores = linear_fp8.layer_norm_linear_fp8_torch(of.rows, of.copy, eight.scores)
    truth = torch.softmax(scores.unflatten(-1, (heads, -1)) * 0.6931471805599453, -1)
    width, columns, factor = prompt.width, eight.scores.columns, eight.scores.factor

    def run(w: Tensor, tile: Any = None) -> Tensor:
        given = (width, 1e-5, of.sums, tile, factor, prompt_attention.P_SCALE)
        return gemm.softmaxed(of.copy, w, columns, *given)

    return Row(
        f"scores {m}x{c}x{heads * width}",
        run,
        eight.scores.weight,
        lambda w: gemm.softmaxed(of.rows, w, prompt.columns, width, 1e-5, of.sums),
        prompt.scores,
        truth.flatten(-2) / prompt_attention.P_SCALE,
        0.03,
    )


def merged_row(edge: int, c: int) -> Row:
    """x + [P W, P] [g, h]: a 1x1 convolution of two inputs, with GroupNorm's sums."""
    g, h, x = (image(n, edge) for n in (4 * c, c, c))
    weight = draw(c, 5 * c, scale=(5 * c) ** -0.5)[:, :, None, None]
    weight = weight.contiguous(memory_format=torch.channels_last)
    eight = conv2d_fp8.quantise_weight(weight)
    q, skip = (conv2d_fp8.quantise(t, 6 / 448) for t in (g, h))
    args = (None, 1, 0, None, x)

    def run(w: Tensor, tile: Any = None) -> Any:
        packed = conv2d_fp8.Weight(w, eight.scales)
        return conv2d_fp8.conv2d_fp8(q, packed, 6 / 448, *args, skip, unit=10, tile=tile)

    both = torch.cat([q, skip], 1).double() * (6 / 448)
    wide = (eight.values.double() * eight.scales.double()[:, None, None, None]).flatten(1)
    truth = x.double() + torch.einsum("bkhw,ok->bohw", both, wide)
    return Row(
        f"merged {edge}x{edge} {5 * c}->{c}",
        run,
        eight.values,
        lambda w: conv2d_fused.conv2d_fused(g, w, *args, h, unit=10, backend="ptx"),
        weight,
        truth,
        4e-3,
    )


def image(channels: int, edge: int) -> Tensor:
    return draw(1, channels, edge, edge).contiguous(memory_format=torch.channels_last)


def rows(c: int) -> list[Row]:
    edge, _ = SIZES[c]
    m = edge**2
    return [
        packed_row(f"in {m}x{c}x{c}", m, c, c, False),
        normed_row("linear", m, c, 3 * c),
        copied_row(m, c),
        scores_row(m, c),
        packed_row(f"values {m}x640x{c}", m, 640, c, True),
        normed_row("geglu", m, c, 8 * c),
        merged_row(edge, c),
    ]


def first(made: Any) -> Tensor:
    out = made if isinstance(made, Tensor) else made[0]
    return out.view(torch.uint8) if out.dtype == E4M3 else out


def asked(row: Row) -> list[Any]:
    """Tiles that the row chooses among: its choice, then the best of the model, two of a kind."""
    request = requests(row.run, (row.weight,), {})[-1]
    found, kinds = [tuning.choose(request).tile], dict[tuple, int]()
    for tile in request.ranked():
        kind = tuple(sorted((k, v) for k, v in tuning.encoded(tile).items() if k != "block_n"))
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= 3 and len(found) < TILES and "stages" not in tuning.encoded(tile):
            found.append(tile)
    return list(dict.fromkeys(found))


def compile_all(pairs: Sequence[tuple[Row, list[Any]]]) -> None:
    with unlaunched() as programs:
        for row, tiles in pairs:
            for tile in tiles:
                row.run(row.weight, tile=tile)
    with ThreadPoolExecutor(16) as pool:  # ptxas is a process of its own
        list(pool.map(lambda program: program.compile("sm_90a"), programs))


def fault(row: Row, tile: Any) -> str:
    made = row.run(row.weight, tile=tile)
    again, out = row.run(row.weight, tile=tile), made if isinstance(made, Tensor) else made[0]
    error = ((out.double() - row.truth).norm() / row.truth.double().norm()).item()
    if not error < row.allowed:
        return f"error {error:.1e}"
    return "" if torch.equal(first(made), first(again)) else "not the same bits twice"


def measured(row: Row, tiles: list[Any]) -> dict[str, Any]:
    """Faults of the tiles, then microseconds of those that are right, and of bfloat16."""
    faults = {tuning.name(tile): fault(row, tile) for tile in tiles}
    right = {tuning.name(t): partial(row.run, tile=t) for t in tiles if not faults[tuning.name(t)]}

    def medians(names: Sequence[str], count: int) -> dict[str, float]:
        ours = [row.weight.clone() for _ in range(count)]
        theirs = [row.peer_weight.clone() for _ in range(count)]
        runs = {n: [partial(lambda f, w: first(f(w)), right[n], w) for w in ours] for n in names}
        runs["bf16"] = [partial(lambda w: first(row.peer(w)), w) for w in theirs]
        return {n: t.median_us for n, t in harness.measure(runs, "cuda", effort=EFFORT).items()}

    hot = medians(list(right), 1)
    best = sorted(right, key=hot.__getitem__)[:COLD_TILES]
    chosen = tuning.name(tiles[0])
    count = min(harness.MAX_CALLS // 4, -(-COLD_BYTES // row.weight.nbytes))
    cold = medians(list(dict.fromkeys([*best, *([chosen] if chosen in right else [])])), count)
    fastest = min((n for n in cold if n != "bf16"), key=cold.__getitem__, default="none")
    print(
        f"{row.name}: bf16 {hot['bf16']:.2f} / {cold['bf16']:.2f}, chosen {hot.get(chosen, 0):.2f} "
        f"/ {cold.get(chosen, 0):.2f}, best {hot.get(fastest, 0):.2f} / {cold.get(fastest, 0):.2f} "
        f"{fastest}" + "".join(f"\n  WRONG {n}: {f}" for n, f in faults.items() if f),
        flush=True,
    )
    wrong = {n: f for n, f in faults.items() if f}
    return {"row": row.name, "chosen": chosen, "hot_us": hot, "cold_us": cold, "wrong": wrong}


@torch.no_grad()
def run_size(c: int, out: str) -> None:
    torch.manual_seed(0)
    made = rows(c)
    pairs = [(row, asked(row)) for row in made]
    compile_all(pairs)
    with open(out, "w") as f:
        json.dump([measured(row, tiles) for row, tiles in pairs], f)


def main(out: str, *wanted: str) -> int:
    results, code = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for c in (c for c in SIZES if not wanted or str(c) in wanted):
            part = os.path.join(folder, f"{c}.json")
            command = [sys.executable, __file__, "--size", str(c), part]
            try:
                code |= subprocess.run(command, timeout=LIMIT_S, check=False).returncode
            except subprocess.TimeoutExpired:
                code, _ = 1, print(f"{c}: cut after {LIMIT_S} s", flush=True)
            if os.path.exists(part):
                with open(part) as f:
                    results += json.load(f)
            with open(out, "w") as f:
                json.dump(results, f, indent=1)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--size":
        run_size(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(*sys.argv[1:]))
