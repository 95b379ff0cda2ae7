"""`explain`: every kernel of an op for one call, with the reasons."""

from dataclasses import dataclass
from typing import Any

from mirage_hello.kernels import measured
from mirage_hello.kernels.call import Call
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
    rows = [
        Candidate(
            k.name, k.backend, k.source, k.refuses(call) or failed_self_test(k, call),
            times.get(k.backend), k is chosen,
        )
        for k in op.kernels
    ]  # fmt: skip
    rows.sort(key=lambda c: (not c.chosen, c.reason is not None))
    return Explanation(op_name, call, tuple(rows))
