"""Cuts of layer_norm on a GPU: parity first, then time beside Triton and a copy.

    python bench/sweeps/layer_norm.py [CASE-SUBSTRING]      writes $OUT/sweep-layer-norm.json

About 8 s a case, each in a process of its own.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from mirage_hello.bench import harness
from mirage_hello.bench.sweeps import runner
from mirage_hello.kernels import layer_norm as page
from mirage_hello.kernels import ops, parity

# rows, width
CASES = {
    f"{rows}x{width}": (rows, width) for rows, width in ((4096, 320), (1024, 640), (256, 1280))
}
CUTS = [(1, teams) for teams in (1, 2, 4, 8)] + [(warps, 1) for warps in (2, 4, 8)]


def run_case(name: str) -> dict:
    rows, width = CASES[name]
    x = torch.randn(rows, width, device="cuda").bfloat16() + 1
    weight, bias = (torch.randn(width, device="cuda").bfloat16() for _ in range(2))
    with ThreadPoolExecutor(8) as pool:
        programs = [page.ptx_program(width, x.dtype, cut, True) for cut in CUTS]
        list(pool.map(lambda program: program.compile("sm_90a"), programs))
    truth = ops.layer_norm.reference(*parity.in_float64((x, weight, bias)))
    plain = ops.layer_norm.torch_kernel.run(x, weight, bias)
    contenders: dict[str, harness.Function] = {
        "copy": lambda: x.clone(),
        "torch": lambda: ops.layer_norm.torch_kernel.run(x, weight, bias),
        "triton": lambda: page.layer_norm_triton(x, weight, bias),
    }
    for cut in CUTS:
        call = partial(page.layer_norm_ptx, x, weight, bias, cut=cut)
        result = parity.judge(call(), plain, truth)
        if result.passed:
            contenders[str(cut)] = call
        else:
            print(f"{name} {cut} WRONG {result}", flush=True)
    timed = harness.measure(contenders, "cuda", effort=harness.Effort(8, 300.0))
    medians = {key: t.median_us for key, t in timed.items()}
    print(f"{name}: chosen {page.choose_cut(rows, width * 2)}", flush=True)
    for us, key in sorted((us, key) for key, us in medians.items()):
        print(f"   {us:6.2f} us  {key}", flush=True)
    return {"case": name, "time_us": medians}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, "layer-norm", CASES, run_case))
