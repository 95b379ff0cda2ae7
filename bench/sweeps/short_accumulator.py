"""Error of P V where wgmma sums e4m3 products in its short accumulator: a model, on a CPU.

    python bench/sweeps/short_accumulator.py [KIND ...]      4 s; the table of docs/attention.md

One product adds 32 terms and the sum in fixed point: each is cut off (toward zero) below 2^-13 of
the largest, and the sum keeps 14 bits (ptx/emulator/tensorcore.py has the fit to an H200).
"""

import sys

import torch
from torch import Tensor

from mirage_hello.kernels.attention_fp8 import quantize, quantize_values

KEYS, QUERIES, HEAD_DIM = 8192, 24, 64
FRACTION = 13
INTERVALS = (0, 1024, 128)  # keys whose products one sum takes; 0: all
KINDS = ("normal", "mean 1", "mean 10", "channel", "halves")


def exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), far below any number's for 0."""
    return torch.where(x == 0, -20000, torch.frexp(x)[1] - 1)


def product(total: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """total [N, D] + p [N, 32] v [32, D] as the tensor core adds it."""
    terms = exponent(p).clamp(min=-6)[:, :, None] + exponent(v).clamp(min=-6)[None]
    largest = torch.maximum(terms.amax(1), exponent(total))
    unit = (largest - FRACTION).clamp(-500, 500)
    scale = torch.ldexp(torch.ones_like(total), -unit)
    added = torch.trunc(p[:, :, None] * v * scale[:, None]).sum(1) + torch.trunc(total * scale)
    added = torch.ldexp(added, unit)
    kept = torch.ldexp(torch.ones_like(added), exponent(added).clamp(min=-500) - FRACTION)
    return torch.trunc(added / kept) * kept


def draw(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(n, HEAD_DIM).double() for n in (QUERIES, KEYS, KEYS))
    if kind.startswith("mean"):
        v += float(kind.split()[1])
    if kind == "channel":
        v[:, 3] += 50
    if kind == "halves":  # values of opposite mean, and queries that look at one half of them
        sign = torch.where(torch.arange(KEYS) < KEYS // 2, 1.0, -1.0).double()[:, None]
        direction = torch.nn.functional.normalize(torch.randn(HEAD_DIM).double(), dim=0)
        k += 4 * sign * direction
        q += 6 * torch.where(torch.arange(QUERIES) % 2 == 0, 1.0, -1.0)[:, None] * direction
        v += 3 * sign
    return q, k, v


def errors(kind: str, centred: bool) -> list[float]:
    """Root mean square relative to float64 on the dequantised inputs, for each of INTERVALS."""
    q, k, v = (x[None, :, None] for x in draw(kind))
    (q8, q_scale), (k8, k_scale) = quantize(q), quantize(k)
    v8, v_scale = quantize(v)
    mean = torch.zeros(1, HEAD_DIM).double()
    if centred:
        v8, v_scale, taken = quantize_values(v)
        mean = taken[0].double()
    wide = [
        (x.double() * s.double())[0, :, 0] for x, s in ((q8, q_scale), (k8, k_scale), (v8, v_scale))
    ]
    scores = wide[0] @ wide[1].T * HEAD_DIM**-0.5
    truth = scores.softmax(1) @ wide[2] + mean
    above = 4 * torch.rand(QUERIES, 1)  # how far the kernel's maximum may lie below the row's
    p = (scores - scores.amax(1, keepdim=True)).exp() * 2 ** (4 + above)
    rounded, values = p.float().to(v8.dtype).double(), v8[0, :, 0].double()
    found = []
    for keys in INTERVALS:
        out = total = torch.zeros(QUERIES, HEAD_DIM).double()
        for i in range(0, KEYS, 32):
            total = product(total, rounded[:, i : i + 32], values[i : i + 32])
            if keys and (i + 32) % keys == 0:
                out, total = out + total, torch.zeros_like(total)
        out = (out + total) / p.sum(1, keepdim=True) * v_scale.item() + mean
        found.append(((out - truth).norm() / truth.norm()).item())
    return found


def main() -> int:
    print("float32 never, every", *(f"{keys} keys" for keys in INTERVALS[1:]))
    for kind in sys.argv[1:] or KINDS:
        for centred in (False, True):
            torch.manual_seed(1)
            said = "  ".join(f"{error:.2%}" for error in errors(kind, centred))
            print(f"{kind:8} {'mean off' if centred else 'as it is'}  {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
