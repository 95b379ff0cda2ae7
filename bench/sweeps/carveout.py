"""Does a fixed split of L1 and shared memory let kernels follow each other sooner?

    python bench/sweeps/carveout.py [SETTING ...]        writes $OUT/sweep-carveout.json

A multiprocessor changes its split between L1 and shared memory only when it is empty. Kernels with
different needs (a convolution of 200 KB, a GroupNorm of 2 KB) may so wait for each other to drain,
whatever griddepcontrol says. Settings: the driver's choice, and all shared memory for every kernel.
Each runs in a process of its own and times residual blocks (GroupNorm of given sums by a pass of
its own, then the convolution) and a U-Net step.
"""

import ctypes
import sys
from functools import partial

import torch

from mirage_hello.bench import composed, harness
from mirage_hello.bench.sweeps import frame, runner
from mirage_hello.model import build
from mirage_hello.ptx import programmatic

LIMIT_S = 90
PREFERRED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
SETTINGS = {"driver's choice": None, "all shared": 100}
BLOCKS = {"320 @64": (320, 64), "640 @32": (640, 32), "1280 @16": (1280, 16), "1280 @8": (1280, 8)}


def prefer(percent: int) -> None:
    """Every kernel loaded from here on asks for this much of the largest shared memory."""
    plain = programmatic.Function.__init__

    def init(self, code, entry, formats) -> None:
        plain(self, code, entry, formats)
        set_attribute = programmatic._driver().cuFuncSetAttribute
        programmatic._check(set_attribute(self._handle, PREFERRED_CARVEOUT, ctypes.c_int(percent)))

    programmatic.Function.__init__ = init  # type: ignore[method-assign]


def residual_block(channels: int, edge: int) -> harness.Function:
    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device="cuda")).bfloat16()

    last = torch.channels_last
    x = draw(1, channels, edge, edge).to(memory_format=last)
    sums = composed.sums_of(x).contiguous()
    weights = [
        draw(channels, channels, 3, 3, scale=(9 * channels) ** -0.5).to(memory_format=last)
        for _ in range(2)
    ]
    gammas, betas, bias = draw(2, channels), draw(2, channels), draw(channels)
    block = composed.residual_block_with(composed.applied)
    args = (x, sums, draw(1, channels), gammas, betas, weights[0], bias, weights[1], bias)
    return partial(block, *args)


def run_case(name: str) -> dict:
    percent = SETTINGS[name]
    if percent is not None:
        prefer(percent)
    torch.manual_seed(0)
    with torch.no_grad():
        contenders = {key: residual_block(*size) for key, size in BLOCKS.items()}
        unet = build("880m", 0, torch.bfloat16, "cuda")[0].unet
        args = frame.unet_inputs(unet, torch.bfloat16)
        biases, keys = unet.noise_biases(args[1], args[3]), unet.context_keys(args[2])
        contenders["880m step"] = lambda: unet(args[0], biases, keys)
        timed = harness.measure(contenders, "cuda")
    medians = {key: t.median_us for key, t in timed.items()}
    print(name, {key: round(us, 2) for key, us in medians.items()}, flush=True)
    return {"case": name, "time_us": medians}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "carveout", SETTINGS, run_case, LIMIT_S))
