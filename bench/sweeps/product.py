"""What the tile sweeps of conv2d and linear share: one process a case, parity first, then times.

A case returns {"peer": function, ...}, {tile: function} and a function that says whether an output
is right. Each case runs in a process of its own with a time limit, so a kernel that hangs costs
little.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mirage_hello.bench import harness
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_tiles import Tile
from mirage_hello.ptx import loader

EFFORT = harness.Effort(rounds=6, sample_us=500.0)


@dataclass
class Candidates:
    """One case: peers and tiles as functions, the parity of an output, the tile that is chosen."""

    peers: Mapping[str, Callable[[], Tensor]]
    run: Callable[[Tile], Tensor]
    judge: Callable[[Tensor], parity.Parity]
    tiles: list[Tile]
    chosen: Tile
    compile: Callable[[Tile], Any]
    flops: float


def measure(name: str, case: Candidates) -> dict:
    """Parity and determinism of every tile, then hot times of all and cold times of the best."""
    tiles = list(dict.fromkeys([case.chosen, *case.tiles]))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(case.compile, tiles))
    wrong, good = [], {}
    for tile in tiles:
        result = case.judge(case.run(tile))
        same = torch.equal(case.run(tile), case.run(tile))
        if result.passed and same:
            good[label(tile)] = lambda tile=tile: case.run(tile)
        else:
            wrong.append({"tile": label(tile), "parity": str(result), "deterministic": same})
            print(f"{name} WRONG {label(tile)} same={same} {result}", flush=True)
    hot = medians({**case.peers, **good}, cold=False)
    ranked = sorted(good, key=hot.__getitem__)
    kept = dict.fromkeys([label(case.chosen), *ranked[:3]])
    cold = medians({**case.peers, **{k: good[k] for k in kept if k in good}}, cold=True)
    peer_hot, peer_cold = (min(times[p] for p in case.peers) for times in (hot, cold))
    peers = " ".join(f"{p} {hot[p]:.2f}/{cold[p]:.2f}" for p in case.peers)
    print(f"{name}: {peers} us hot/cold", flush=True)
    for key in ranked[:6] + [k for k in (label(case.chosen),) if k in ranked[6:]]:
        mark = " <- chosen" if key == label(case.chosen) else ""
        rate = case.flops / hot[key] / 1e6
        also = f" cold {cold[key]:.2f} {peer_cold / cold[key]:.2f}x" if key in cold else ""
        print(
            f"  {hot[key]:7.2f} us {peer_hot / hot[key]:.2f}x {rate:4.0f} TF  {key}{also}{mark}",
            flush=True,
        )
    return {"case": name, "hot_us": hot, "cold_us": cold, "wrong": wrong}


def compile_all(contenders: Iterable[Callable[[], Any]]) -> None:
    """The PTX that the contenders would launch, on all cores; nothing is launched."""
    found: list[loader.Program] = []

    def launch(program: loader.Program, *args: Any, **kwargs: Any) -> None:
        found.append(program)

    with mock.patch.object(loader.Program, "launch", launch):
        for run in contenders:
            run()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda program: program.compile("sm_90a"), set(found)))


def medians(contenders: Mapping[str, Callable[[], Tensor]], cold: bool) -> dict[str, float]:
    timed = harness.measure(contenders, "cuda", cold=cold, effort=EFFORT)
    return {key: t.median_us for key, t in timed.items()}


def label(tile: Tile) -> str:
    stages = f" st{tile.stages}" if tile.stages else ""
    twice = " x2" if tile.blocks_per_sm == 2 else ""
    patch = " patch" if tile.patch else ""
    twice += " persistent" if tile.persistent else ""
    return f"{tile.block_m}x{tile.block_n} split{tile.split}{patch}{twice}{stages}"
