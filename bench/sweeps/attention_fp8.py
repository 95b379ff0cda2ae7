"""fp8 attention on a GPU: error against float64 and time, beside the bfloat16 kernel and cuDNN.

python bench/sweeps/attention_fp8.py      about 15 s; writes $OUT/attention-fp8.json
"""

import json
import os
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirage_hello.bench import harness
from mirage_hello.kernels.attention_fp8 import attention_fp8, quantize, reference
from mirage_hello.kernels.attention_sm90a import attention_sm90a
from mirage_hello.reference import attention

# (B, H, N, M, D)
SHAPES = [
    (1, 16, 8192, 8192, 128),
    (1, 16, 8192, 8192, 64),
    (1, 8, 1024, 1024, 80),
    (2, 2, 77, 333, 64),
]


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return ((out.double() - truth).norm() / truth.norm()).item()


def run(shape: tuple) -> dict:
    b, h, n, m, d = shape
    q, k, v = (torch.randn(b, x, h, d, device="cuda") for x in (n, m, m))
    (q8, qs), (k8, ks), (v8, vs) = quantize(q), quantize(k), quantize(v)
    args = (q8, k8, v8, qs, ks, vs)
    first = slice(0, min(n, 256))
    out = attention_fp8(*args)[:, first]
    dequantised = reference(q8[:, first], *args[1:])
    exact = attention(q[:, first].double(), k.double(), v.double())
    q16, k16, v16 = q.bfloat16(), k.bfloat16(), v.bfloat16()

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q16.transpose(1, 2), k16.transpose(1, 2), v16.transpose(1, 2)
            )

    effort = harness.Effort(rounds=6, sample_us=1000.0)
    contenders = {
        "fp8": lambda: attention_fp8(*args),
        "bf16": lambda: attention_sm90a(q16, k16, v16),
        "cudnn bf16": cudnn,
    }
    timed = harness.measure(contenders, "cuda", effort=effort)
    time_us = {name: t.median_us for name, t in timed.items()}
    flops = 4 * b * h * n * m * d
    result = {
        "shape": shape,
        "error_of_the_kernel": error(out, dequantised),
        "error_with_quantisation": error(out, exact),
        "error_of_bf16": error(attention_sm90a(q16, k16, v16)[:, first], exact),
        "time_us": time_us,
        "tflops": {name: flops / us / 1e6 for name, us in time_us.items()},
    }
    print({**result, "time_us": {name: round(us, 1) for name, us in time_us.items()}})
    return result


def main() -> int:
    results = [run(shape) for shape in SHAPES]
    with open(f"{os.environ.get('OUT', '.')}/attention-fp8.json", "w") as f:
        json.dump(results, f, indent=1)
    return 0 if all(r["error_of_the_kernel"] < 0.04 for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
