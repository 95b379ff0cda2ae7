"""A frame and a U-Net step of the 880m preset, with each change left out in turn, and where the
microseconds go: `python3.12 bench/sweeps/frame.py OUT.json [VARIANT ...]`.

Every variant runs in a process of its own; parity against the float32 model comes before times.
"""

import contextlib
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from mirage_hello.bench import bus, frame_profile, harness
from mirage_hello.kernels import use
from mirage_hello.kernels.parity import exact_float32
from mirage_hello.model import FrameStream, build, ways
from mirage_hello.ptx import programmatic

SIZE = (512, 512)
LIMIT_S = 120
FRAMES = 300
VARIANTS = {
    "all": (),
    "1x1 normalised on load": (lambda: ways.going(ways.Ways(on_load=(1,))),),
    "normalised on load": (lambda: ways.going(ways.Ways(on_load=(1, 3))),),
    "fp8": (),
    "without overlap": (programmatic.without_overlap,),
    "op by op": (lambda: ways.fusing(None),),
}


def unet_inputs(unet: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x = draw(1, unet.config.in_channels, SIZE[0] // 8, SIZE[1] // 8)
    context = draw(1, unet.config.context_tokens, unet.config.context_dim).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).to(dtype)
    return x, torch.tensor([601.0], device="cuda"), context, torch.tensor([0.05], device="cuda")


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.double() - truth.double()).norm() / truth.double().norm()).item()


def measure(variant: str) -> dict:
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for change in VARIANTS[variant]:
            stack.enter_context(change())
        return _measure(variant) | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def _measure(variant: str) -> dict:
    truth_unet = build("880m", 0, torch.float32, "cuda")[0].unet
    with use("torch"), exact_float32():
        truth = truth_unet(*unet_inputs(truth_unet, torch.float32)).clone()
    del truth_unet
    torch.cuda.empty_cache()
    pair = build("880m", 0, torch.bfloat16, "cuda")
    unet = pair[0].unet
    args = unet_inputs(unet, torch.bfloat16)
    with use("torch"):
        plain_error = error(unet(*args), truth)
    clip = np.random.default_rng(0).integers(0, 256, (8, *SIZE, 3), dtype=np.uint8)
    if variant == "fp8":
        FrameStream(*pair, graph=False).use_fp8(clip)
    parity = {"error": error(unet(*args), truth), "allowed": 2 * plain_error}
    print(f"{variant}: step error {parity['error']:.2e} of {parity['allowed']:.2e}", flush=True)
    biases, keys = unet.noise_biases(args[1], args[3]), unet.context_keys(args[2], lasting=True)
    timed = harness.measure(
        {"step": lambda: unet(*args), "prepared": lambda: unet(args[0], biases, keys)}, "cuda"
    )
    result: dict = {"variant": variant, "parity": parity}
    result["step_us"] = {name: t.percentiles_us for name, t in timed.items()}
    print(f"  step {timed['step'].median_us:.0f} us, with prepared conditions "
          f"{timed['prepared'].median_us:.0f} us", flush=True)  # fmt: skip
    stream = FrameStream(*pair, size=SIZE)
    for i in range(20):
        stream.push(clip[i % 8])
    spans = []
    for i in range(FRAMES):
        begin = time.perf_counter()
        stream.push(clip[i % 8])
        spans.append((time.perf_counter() - begin) * 1e6)
    p10, p50, p99 = np.percentile(spans, (10, 50, 99))
    result["frame_us"] = {"p10": p10, "p50": p50, "p99": p99}
    print(f"  frame p10 {p10:.0f} p50 {p50:.0f} p99 {p99:.0f} us", flush=True)
    frames = [clip[i % 8] for i in range(200)]
    result["host_us"] = bus.host_us(stream, frames)
    result["under_way"] = bus.pipelined(stream, frames)
    host, under_way = result["host_us"], result["under_way"]
    print(f"  host {host['p50']:.0f} us, of them {host['submit_p50']:.0f} to submit; with a frame "
          f"under way {under_way['us']:.0f} us a frame", flush=True)  # fmt: skip
    result["profile"] = profiled = frame_profile.profile(lambda: stream.push(clip[0]))
    print(f"  on the device {profiled['span_us']:.0f} us, idle {profiled['idle_share']:.1%}, "
          f"{profiled['launches']:.0f} launches; " + ", ".join(
              f"{name} {us:.0f}" for name, us in
              sorted(profiled["families"].items(), key=lambda p: -p[1])), flush=True)  # fmt: skip
    for kernel in profiled["kernels"][:40]:
        print(f"    {kernel['us']:7.1f} us {kernel['calls']:4.0f} x {kernel['name']}", flush=True)
    return result


def main() -> int:
    out, *wanted = sys.argv[1:]
    if out == "--variant":
        path, variant = wanted
        with open(path, "w") as f:
            json.dump(measure(variant), f)
        return 0
    results = []
    for variant in wanted or VARIANTS:
        command = [sys.executable, "-P", __file__, "--variant", f"{out}.part", variant]
        try:
            code: int | str = subprocess.run(command, timeout=LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
        if code:
            print(f"{variant}: failed ({code})", flush=True)
            continue
        with open(f"{out}.part") as f:
            results.append(json.load(f))
        with open(out, "w") as f:
            json.dump(results, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
