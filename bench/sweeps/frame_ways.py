"""Which of the equal ways of a layer the 880m's U-Net is fastest with:
`python3.12 bench/sweeps/frame_ways.py OUT.json`.

Every pair of (from how many pixels on convolutions leave sums, from which K on LayerNorms fold) is
one captured step with prepared conditions; all replay in turn. About 60 s.
"""

import dataclasses
import itertools
import json
import sys
import time
from typing import Any

import torch

from mirage_hello.bench import harness
from mirage_hello.kernels import use
from mirage_hello.kernels.parity import exact_float32
from mirage_hello.model import build
from mirage_hello.model.ways import Ways, going

SIZE = 64  # of the latents of 512 x 512 pixels
NEVER = 2**31
SUMS = {"all": 0, "from 32x32": 1024, "at 64x64": 4096, "none": NEVER}
FOLDS = {"all": (0, 0), "all but q": (0, NEVER), "1280": (1280, 1280), "none": (NEVER, NEVER)}
OTHERS: dict[str, dict[str, Any]] = {
    "no merged products": {"merges_from": NEVER},
    "products merged from 640": {"merges_from": 640},
    "products merged of 1280": {"merges_from": 1280},
    "prompts not folded": {"prompts": False},
    "no sums of rows": {"row_sums": False},
    "none of both": {"row_sums": False, "merges_from": NEVER},
}
PRESET = "880m"


def variants() -> dict[str, Ways]:
    """Every pair of where sums are left and where LayerNorms fold; then one change more."""
    found = {}
    for (sums, pixels), (folds, (depth, q_depth)) in itertools.product(SUMS.items(), FOLDS.items()):
        found[f"sums {sums}, folds {folds}"] = Ways(pixels, depth, q_depth)
    for sums in ("all", "at 64x64"):
        for name, change in OTHERS.items():
            ways = dataclasses.replace(Ways(SUMS[sums], 0, 0), **change)
            found[f"sums {sums}, folds all, {name}"] = ways
    return found


@torch.no_grad()
def main(out: str, device: str = "cuda") -> int:
    started = time.perf_counter()
    truth_unet = build(PRESET, 0, torch.float32, device)[0].unet
    config = truth_unet.config
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = draw(1, config.in_channels, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    level, context = draw(1), draw(1, config.context_tokens, config.context_dim)
    with use("torch"), exact_float32():
        truth = truth_unet(x, level, context)
    del truth_unet
    unet = build(PRESET, 0, torch.bfloat16, device)[0].unet
    x, context = x.bfloat16(), context.bfloat16()

    def error(y: torch.Tensor) -> float:
        return ((y.double() - truth.double()).norm() / truth.double().norm()).item()

    with use("torch"):
        allowed = 2 * error(unet(x, level, context))
    biases, keys = unet.noise_biases(level), unet.context_keys(context, lasting=True)
    steps, errors = {}, {}
    for name, ways in variants().items():

        def step(ways: Ways = ways) -> torch.Tensor:
            with going(ways):
                return unet(x, biases, keys)

        errors[name] = error(step())
        if errors[name] <= allowed:
            steps[name] = step
        else:
            print(f"{name}: error {errors[name]:.2e} of {allowed:.2e}", flush=True)
    print(f"built and right after {time.perf_counter() - started:.0f} s", flush=True)
    effort = harness.Effort(rounds=20, sample_us=2000.0)
    timed = harness.measure(steps, device, effort=effort)
    results = {name: timed[name].percentiles_us | {"error": errors[name]} for name in timed}
    for name, found in sorted(results.items(), key=lambda item: item[1]["p50"]):
        print(f"{found['p50']:8.1f} us  {found['error']:.2e}  {name}", flush=True)
    with open(out, "w") as f:
        json.dump(results, f, indent=1)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
