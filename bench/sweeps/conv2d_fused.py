"""What each fusion of conv2d.sm90a costs and saves on a GPU, beside cuDNN, hot and cold.

python bench/sweeps/conv2d_fused.py [CASE-SUBSTRING]      writes $OUT/sweep-conv2d_fused.json

    conv            the chosen tile, weights loading under the kernel before (griddepcontrol)
    alone           the same text without griddepcontrol: starts when the kernel before has ended
    conv+sums       with the statistics of its output
"""

import functools
import sys
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.bench.sweeps import product, runner
from mirage_hello.bench.sweeps.conv2d import CASES, image
from mirage_hello.kernels import conv2d_fused as page
from mirage_hello.kernels import conv2d_sm90a as conv
from mirage_hello.kernels import parity
from mirage_hello.ptx import loader

UNITS = {128: 4, 512: 16}  # C / 32; 10 for the widths of a U-Net
with_overlap = conv.program


def alone(*args, **kwargs) -> loader.Program:
    """conv2d's program as an ordinary launch."""
    return without_waits(with_overlap(*args, **kwargs))


@functools.cache
def without_waits(program: loader.Program) -> loader.Program:
    assert program.text is not None
    lines = [line for line in program.text.splitlines() if "griddepcontrol" not in line]
    return loader.Program(program.name, "\n".join(lines))


def run_case(name: str) -> dict:
    b, c, o, size, stride = CASES[name]
    x, weight = image(b, c, size, size), image(o, c, 3, 3, scale=(9 * c) ** -0.5)
    bias = torch.randn(o, device="cuda", dtype=torch.bfloat16)
    unit = UNITS.get(o, 10)
    args = (x, weight, bias, stride, 1)

    @mock.patch.object(conv, "program", alone)
    def without_overlap() -> Tensor:
        return conv.conv2d_sm90a(*args)

    contenders: dict[str, Callable[[], Tensor]] = {
        "cudnn": lambda: F.conv2d(*args),
        "conv": lambda: conv.conv2d_sm90a(*args),
        "alone": without_overlap,
        "conv+sums": lambda: conv.conv2d_fused_sm90a(*args, unit=unit)[0],
    }
    plain = F.conv2d(*args)
    truth = F.conv2d(x.float(), weight.float(), bias.float(), stride, 1)
    for key, run in contenders.items():
        result = parity.judge(run(), plain, truth)
        if not result.passed:
            print(f"{name} WRONG {key}: {result}", flush=True)
    out, sums = conv.conv2d_fused_sm90a(*args, unit=unit)
    assert sums is not None
    found, expected = (page.merged(s.double()) for s in (sums, page.sums_torch(out, unit)))
    print(f"{name}: sums {(found / expected - 1).abs().amax((0, 1)).tolist()}", flush=True)
    hot, cold = (product.medians(contenders, cold=cold) for cold in (False, True))
    for key in contenders:
        ratios = f"{hot['cudnn'] / hot[key]:.2f} {cold['cudnn'] / cold[key]:.2f}"
        print(f"  {key:14} {hot[key]:7.2f} {cold[key]:7.2f} us  x cudnn {ratios}", flush=True)
    return {"case": name, "hot_us": hot, "cold_us": cold}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "conv2d_fused", CASES, run_case, limit_s=60))
