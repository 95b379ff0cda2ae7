"""A kernel: one implementation of one op, and the reasons it cannot serve a call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels import backends
from mirage_hello.kernels.call import Call

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Order in which `auto` tries backends that were not measured on this GPU at a similar shape.
# PTX first: what is written by hand is here because it was faster where it was measured. A page
# gives a kernel of its own that is not (rank=...).
DEFAULT_RANK = {
    "ptx": 40,
    "ptx-emulated": 40,
    "torch": 50,
    "triton": 60,
    "cuda": 70,
    "cupy": 90,
    "numba": 90,
}
# Of products (attention, convolution, linear) in mma.sync: right, but not timed against torch's
# libraries on the Ampere and Ada cards that they are for. Used by name, or after a measurement.
UNTIMED_RANK = 75


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Args:
        op: name of the contract.
        backend: one of backends.BACKENDS.
        run: takes exactly the op's arguments, returns a new tensor.
        supports: Call -> None, or why it cannot ("C must be a multiple of 8 (got C=33)").
        source: path of the source in the repository, for people.
        arch: None: any device. "sm_80": that and newer. "sm_90a": exactly 9.0.
        devices: device types it runs on.
        dtypes: of Call.dtype.
        differentiable: has a backward pass.
        rank: order among kernels without a measurement, lowest first; None: by backend.
    """

    op: str
    backend: str
    run: Callable[..., Tensor]
    supports: Callable[[Call], str | None] | None = None
    source: str = ""
    arch: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    differentiable: bool = False
    rank: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sort key among kernels without a measurement: by rank, newest architecture first."""
        rank = DEFAULT_RANK.get(self.backend, 99) if self.rank is None else self.rank
        return rank, -int(self.arch[3:].rstrip("a")) if self.arch else 0

    @property
    def name(self) -> str:
        return f"{self.op}/{self.backend}" + (f"/{self.arch}" if self.arch else "")

    def refuses(self, call: Call) -> str | None:
        """Why this kernel cannot serve the call; None when it can."""
        checks = (self._refuses_place, self._refuses_use, self.supports)
        return next((r for check in checks if check and (r := check(call))), None)

    def _refuses_place(self, call: Call) -> str | None:
        reason = backends.unavailable(self.backend, call.device.type)
        if reason:
            return reason
        interpreted = self.backend == "triton" and call.device.type == "cpu"
        if call.device.type not in self.devices and not interpreted:
            return f"runs on {' and '.join(self.devices)} (got {call.device.type})"
        if self.arch and call.device.type == "cuda" and not arch_runs(self.arch, call.arch):
            exact = "exactly" if self.arch.endswith("a") else "or newer"
            return f"needs {self.arch} {exact} (got {call.arch})"
        return None

    def _refuses_use(self, call: Call) -> str | None:
        if call.autocast and self.backend != "torch":
            return "torch.autocast is active, which only the torch backend understands"
        if call.needs_grad and not self.differentiable:
            return "has no backward pass and a gradient is required; use torch.no_grad() or torch"
        if call.dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"dtype must be one of {known} (got {str(call.dtype).removeprefix('torch.')})"
        return None


def arch_runs(arch: str, device: str) -> bool:
    """Whether code for `arch` runs on `device` (both "sm_XY" or "sm_XYa")."""
    if arch.endswith("a"):
        return arch == device
    return int(arch[3:]) <= int(device[3:].rstrip("a"))
