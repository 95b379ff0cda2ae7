"""The one rule that says whether a kernel computes its op.

truth    = the reference on the inputs in float64
plain    = the torch backend on the inputs as they are
error    = ||out - truth|| / ||truth||,              allowed = 2 error(plain) + (1 + 4/sqrt(n)) u
maximum  = max |out - truth| / (|truth| + rms),      allowed = 4 maximum(plain) + 4 u

with u one rounding of the output type and n the number of values: over few of them torch may be
lucky, so a single value is allowed 5 u, a million 1.004 u. The rule is scale-free: no absolute
tolerance, nothing to tune per shape. The norm finds what is a little wrong everywhere (a short
accumulator), the maximum what is quite wrong somewhere (a tile left out). Values that are not
finite must stand where they stand in `plain` or in the truth.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels.kernel import Kernel
from mirage_hello.kernels.registry import Op, ops

# One rounding to nearest: half a unit in the last place, relative. uint8 frames: 1e-3 lets about
# one value in 50 sit on the other side of a rounding tie (1 level of about 147 rms, squared).
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-9,
    torch.float8_e4m3fn: 2.0**-4,
    torch.uint8: 1e-3,
}

# A torch kernel that is worse than this sets no example: on a CPU, its float32 GroupNorm of a
# channels_last tensor cancels to an error of 249 at mean 1000 and spread 0.1.
PLAIN_ERROR_CAP = 2.0**-5


@dataclass(frozen=True)
class Parity:
    """Outcome of one comparison: relative errors and what the rule allows."""

    error: float
    allowed: float
    max_error: float
    max_allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return not self.note and self.error <= self.allowed and self.max_error <= self.max_allowed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        numbers = f"error {self.error:.2e} of {self.allowed:.2e} allowed"
        largest = f"largest {self.max_error:.2e} of {self.max_allowed:.2e}"
        return f"{verdict}: {numbers}, {largest}" + (f" ({self.note})" if self.note else "")


def compare(
    op_name: str, kernel: Kernel, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Parity:
    """Run `kernel` on the arguments and hold it against the float64 reference.

    Outputs are poisoned: before the run, memory of the output's size is filled with NaN and given
    back to torch's allocator, so that an element that is never written shows.
    """
    kwargs = kwargs or {}
    op: Op = getattr(ops, op_name)
    with torch.no_grad(), exact_float32():
        truth = op.reference(*in_float64(args), **dict(in_float64_items(kwargs)))
        plain = op.torch_kernel.run(*args, **kwargs)
        poison(plain)
        out = kernel.run(*args, **kwargs)
        return judge(out, plain, truth)


def judge(out: Tensor, plain: Tensor, truth: Tensor) -> Parity:
    """Hold `out` against `truth`, with `plain` (same dtype, by torch) setting what is allowed."""
    if (out.shape, out.dtype, out.device) != (plain.shape, plain.dtype, plain.device):
        note = f"got {tuple(out.shape)} {out.dtype} on {out.device}, expected "
        note += f"{tuple(plain.shape)} {plain.dtype} on {plain.device}"
        return Parity(float("inf"), 0.0, float("inf"), 0.0, note)
    if out.numel() == 0:
        return Parity(0.0, 0.0, 0.0, 0.0)
    misplaced = _misplaced_nonfinite(out, plain, truth)
    if misplaced:
        note = f"{misplaced} of {out.numel()} values are NaN or infinite where torch's are not, or"
        return Parity(float("inf"), 0.0, float("inf"), 0.0, note + " the other way round")
    truth = truth.double()
    if out.dtype.is_floating_point:  # what rounds to 0 is 0: 1e-258 is nobody's relative error
        truth = truth.where(truth.to(out.dtype) != 0, 0)
    finite = torch.isfinite(out.double()) & torch.isfinite(plain.double()) & torch.isfinite(truth)
    u = ROUNDING[out.dtype]
    error, maximum = _errors(out, truth, finite)
    plain_error, plain_maximum = (min(e, PLAIN_ERROR_CAP) for e in _errors(plain, truth, finite))
    allowed = 2 * plain_error + (1 + 4 / out.numel() ** 0.5) * u
    if out.dtype == torch.uint8:  # levels: a rounding tie may fall either way, nothing more
        levels = (out.double() - truth).abs().max().item()
        return Parity(error, allowed, levels, 1.0)
    return Parity(error, allowed, maximum, 4 * plain_maximum + 4 * u)


def _errors(out: Tensor, truth: Tensor, finite: Tensor) -> tuple[float, float]:
    truth = truth.where(finite, 0)
    difference = (out.double() - truth).where(finite, 0)
    norm = truth.norm()
    if norm == 0:  # an absolute error is all there is
        return difference.norm().item(), difference.abs().max().item()
    rms = norm / truth.numel() ** 0.5
    maximum = (difference.abs() / (truth.abs() + rms)).max()
    return (difference.norm() / norm).item(), maximum.item()


def _misplaced_nonfinite(out: Tensor, plain: Tensor, truth: Tensor) -> int:
    """Number of values whose class (finite, NaN, +inf, -inf) is neither plain's nor the truth's."""

    def kind(t: Tensor) -> Tensor:
        t = t if t.element_size() > 1 else t.float()  # torch has no isposinf for e4m3
        return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3

    if not out.dtype.is_floating_point:
        return 0
    got, rounded = kind(out), truth.to(out.dtype)
    return int(((got != kind(plain)) & (got != kind(rounded))).sum())


def self_test(op: Op, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when `kernel` passes on every sample of the op that it supports, else the numbers."""
    for args, kwargs in op.samples(device, dtype):
        if kernel.refuses(op.describe(args, kwargs)):
            continue
        result = compare(op.name, kernel, args, kwargs)
        if not result.passed:
            shapes = " ".join("x".join(map(str, a.shape)) for a in args if isinstance(a, Tensor))
            return f"failed its self-test on {shapes}: {result}"
    return None


def in_float64(values: Sequence[Any]) -> list[Any]:
    """Floating tensors in float64; a floating torch.dtype argument becomes float64."""
    return [_to_float64(value) for value in values]


def in_float64_items(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, _to_float64(value)) for name, value in values.items())


def _to_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype.is_floating_point else value
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def poison(like: Tensor) -> None:
    """Leave NaN bytes in the block that torch's allocator hands out next for this size."""
    if like.device.type == "cuda":
        block = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8, device="cuda")
        block.fill_(0xFF)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 means float32: TF32 off, so that `plain` is what its dtype says."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = saved
