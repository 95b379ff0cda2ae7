"""`explain`: every kernel of an op for one call, with the reasons, and the tile it would run."""

from dataclasses import dataclass
from typing import Any

import torch

from mirage_hello.kernels import measured, tuning
from mirage_hello.kernels.call import Call, TensorSpec
from mirage_hello.kernels.kernel import Kernel
from mirage_hello.kernels.policy import unknown
from mirage_hello.kernels.registry import BackendError, failed_self_test, ops


@dataclass(frozen=True)
class Candidate:
    """One line of `explain`."""

    kernel: str
    backend: str
    source: str
    reason: str | None  # why it cannot run; None: it can
    time_us: float | None  # measured at the nearest shape on this GPU
    chosen: bool
    tile: tuning.Choice | None = None  # of a kernel that has tiles, where it can run


@dataclass(frozen=True)
class Explanation:
    """Every kernel of an op for one call, with its reason; `print` it."""

    op: str
    call: Call
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"{self.op} {self.call.label} on {self.call.arch}"]
        for c in self.candidates:
            mark = "->" if c.chosen else "  "
            time = f", measured {c.time_us:.1f} us" if c.time_us is not None else ""
            lines.append(
                f"{mark} {c.kernel:32} {c.reason or 'can run'}{time}  [{c.source or c.backend}]"
            )
            if c.tile:
                lines.append(f"     {c.tile}")
        return "\n".join(lines)


def explain(op_name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Every candidate for this call, which one the current policy chooses, and the reasons.

    Raises:
        ValueError: unknown op (the nearest name is given), or bad shapes. TypeError: bad dtypes.
    """
    if op_name not in ops:
        raise ValueError(unknown("op", op_name, dir(ops)))
    op = getattr(ops, op_name)
    call = op.describe(args, kwargs)
    try:
        chosen = op.select(args, kwargs)
    except BackendError:
        chosen = None
    times = measured.times_us(call)
    rows = []
    for k in op.kernels:
        reason = k.refuses(call) or failed_self_test(k, call)
        tile = tile_of(k, call) if reason is None else None
        rows.append(
            Candidate(k.name, k.backend, k.source, reason, times.get(k.backend), k is chosen, tile)
        )
    rows.sort(key=lambda c: (not c.chosen, c.reason is not None))
    return Explanation(op_name, call, tuple(rows))


def tile_of(kernel: Kernel, call: Call) -> tuning.Choice | None:
    """The tile that a kernel would take for this call; None for one without tiles."""
    if not tuning.has_tiles(kernel.run):
        return None
    request = tuning.request_of(kernel.run, [without_data(v) for v in call.args.values()])
    if request is None:
        return None
    on_gpu = call.device.type == "cuda"
    return tuning.choose(request, torch.cuda.get_device_name(call.device) if on_gpu else None)


def without_data(value: Any) -> Any:
    """A tensor of this specification that has no memory; anything else as it is."""
    if not isinstance(value, TensorSpec):
        return value
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
