"""The registry: an op is a contract, a kernel is one way to compute it, a policy chooses.

    ops.silu(x)                             runs the best kernel for x
    with use("ptx"): ops.silu(x)            runs the ptx kernel or raises
    print(explain("silu", x))               every candidate with its reason

A choice is made once per call signature (shapes, strides, dtypes, devices, 16-byte alignment,
integer options, gradient mode, policy) and cached; later calls cost one dictionary lookup.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import backends, measured
from mirage_hello.kernels.call import Call, TensorSpec, device_arch
from mirage_hello.kernels.kernel import Kernel
from mirage_hello.kernels.policy import current, unknown

log = logging.getLogger("mirage_hello")
MAX_CACHED_SIGNATURES = 4096


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run this call; the text says why and what to do."""


class Op:
    """A contract, callable: `op(*args)` runs the kernel that the current policy chooses.

    Args:
        name: the op's one name.
        reference: the truth; its signature is the op's.
        check: called with parameter name -> TensorSpec or value; raises ValueError for shapes,
            TypeError for dtypes.
        samples: (device, dtype) -> small inputs [(args, kwargs)], for self-tests and parity runs.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Tensor],
        check: Callable[[Mapping[str, Any]], None],
        samples: Callable[[torch.device, torch.dtype], list[tuple[tuple, dict]]],
    ) -> None:
        self.name, self.reference, self.check, self.samples = name, reference, check, samples
        self.kernels: list[Kernel] = []
        # Set by `register`; a plain attribute, which torch.compile can trace.
        self.torch_kernel: Kernel
        self.__doc__ = reference.__doc__
        self.__name__ = name
        self.__signature__ = inspect.signature(reference)
        self._optional = frozenset(
            name for name, p in self.__signature__.parameters.items() if p.default is not p.empty
        )
        self._chosen: dict[tuple, Callable[..., Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.torch_kernel.run(*args, **kwargs)
        key = self._key(args, kwargs)
        try:
            run = self._chosen.get(key)
        except TypeError:  # a list, say, which no op takes: its check says so
            self.describe(args, kwargs)
            raise
        if run is None:
            run = self.select(args, kwargs).run
            if len(self._chosen) >= MAX_CACHED_SIGNATURES:
                self._chosen.clear()
            self._chosen[key] = run
        return run(*args, **kwargs)

    def _key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple:
        """Everything a choice may depend on. Floats are coefficients: they never matter."""
        key: list[Any] = [current.get(), torch.is_grad_enabled()]
        key += torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
        for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                key += (
                    value.shape,
                    value.stride(),
                    value.dtype,
                    value.get_device(),
                    value.data_ptr() & 15,
                    value.requires_grad,
                )
            else:
                key.append(float if type(value) is float else value)
        return tuple(key)

    def describe(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call's specification. Raises what `check` raises; ValueError for mixed devices."""
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{self.name}: {error}; expected {self.name}{self.__signature__}"
            ) from None
        bound.apply_defaults()
        values = {
            name: TensorSpec.of(v) if isinstance(v, Tensor) else v
            for name, v in bound.arguments.items()
        }
        tensors = {name: v for name, v in values.items() if isinstance(v, TensorSpec)}
        if not tensors:
            raise TypeError(f"{self.name}: no tensor among the arguments (got {values})")
        if len({t.device for t in tensors.values()}) > 1:
            places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"{self.name}: tensors must be on one device (got {places})")
        device = next(iter(tensors.values())).device
        autocast = torch.is_autocast_enabled(device.type)
        if not autocast:
            self.check(values)
        dtypes = [t.dtype for t in tensors.values()]
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        asked: Any = values.get("dtype")  # of ops whose result has another dtype than their input
        dtype = floating[0] if floating else asked or dtypes[0]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
        arch = device_arch(device)
        return Call(self.name, values, device, dtype, arch, needs_grad, autocast, self._optional)

    def select(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kernel:
        """The kernel that the current policy chooses for these arguments.

        Raises:
            BackendError: an explicit backend cannot run, with its reason.
        """
        call = self.describe(args, kwargs)
        wishes = current.get().wishes(self.name)
        reasons: list[str] = []
        for wish in wishes:
            for kernel in self.candidates(call, wish):
                reason = kernel.refuses(call) or self_test(kernel, call)
                if reason is None:
                    log.info("%s %s: %s", self.name, call.label, kernel.name)
                    return kernel
                reasons.append(f"{kernel.name} {reason}")
                if "self-test" in reason:
                    log.warning("%s is not used: %s", kernel.name, reason)
            if wish != "auto" and wish not in {k.backend for k in self.kernels}:
                have = ", ".join(dict.fromkeys(k.backend for k in self.kernels))
                reasons.append(f"no {wish} kernel is registered (registered: {have})")
        tried = "; ".join(reasons)
        raise BackendError(
            f"{self.name}: backend {' or '.join(wishes)} cannot run {call.label} on "
            f"{call.arch}: {tried}; explain('{self.name}', ...) lists what can"
        )

    def candidates(self, call: Call, wish: str) -> Iterable[Kernel]:
        """Kernels of the wished backend, newest architecture first; for "auto", best first."""
        if wish != "auto":
            chosen = [k for k in self.kernels if k.backend == wish]
            return sorted(chosen, key=lambda k: k.order)
        times = measured.times_us(call)
        usable = [k for k in self.kernels if k.backend != "ptx-emulated"]
        return sorted(usable, key=lambda k: (times.get(k.backend, float("inf")), k.order))


class Ops:
    """Namespace of the defined ops: `ops.silu(x)`."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}

    def __getattr__(self, name: str) -> Op:
        if name.startswith("__"):
            raise AttributeError(name)
        op = self._ops.get(name)
        if op is None:
            raise AttributeError(unknown("op", name, self._ops))
        setattr(self, name, op)  # the next look-up is a plain attribute
        return op

    def __iter__(self) -> Iterator[Op]:
        return iter(self._ops.values())

    def __contains__(self, name: str) -> bool:
        return name in self._ops

    def __dir__(self) -> list[str]:
        return sorted(self._ops)


ops = Ops()


def define(op: Op) -> Op:
    """Add a contract. Raises ValueError when the name is taken."""
    if op.name in ops._ops:
        raise ValueError(f"op {op.name} is defined already; a contract has one page")
    ops._ops[op.name] = op
    return op


def register(kernel: Kernel) -> Kernel:
    """Add a kernel to its op; a ptx kernel brings its emulated twin, which runs on CPU tensors.

    Raises:
        KeyError: the op is not defined. ValueError: unknown backend, or registered twice.
    """
    if kernel.op not in ops._ops:
        raise KeyError(unknown("op", kernel.op, ops._ops))
    if kernel.backend not in backends.BACKENDS:
        raise ValueError(unknown("backend", kernel.backend, backends.BACKENDS))
    op = ops._ops[kernel.op]
    if any(k.name == kernel.name for k in op.kernels):
        raise ValueError(f"kernel {kernel.name} is registered already")
    op.kernels.append(kernel)
    if kernel.backend == "torch":
        op.torch_kernel = kernel
    if kernel.backend == "ptx":
        op.kernels.append(replace(kernel, backend="ptx-emulated", devices=("cpu",)))
    forget_choices()
    return kernel


def forget_choices() -> None:
    """Drop every cached choice, so that the next call of each op selects again."""
    for op in ops:
        op._chosen.clear()


_proven: dict[tuple, str | None] = {}
_proof_lock = threading.RLock()


def failed_self_test(kernel: Kernel, call: Call) -> str | None:
    """The numbers of a self-test that failed earlier in this process, or None."""
    return _proven.get((kernel.name, call.device, call.dtype))


def self_test(kernel: Kernel, call: Call) -> str | None:
    """Prove a kernel at its first use on a device: its samples against the float64 reference.

    Wrong pictures from a fast kernel are the failure that people report most; this costs
    milliseconds, once per process, kernel, device and dtype. Torch's own kernels are trusted.

    Returns:
        None when the kernel may be used, else the reason with the numbers.
    """
    from mirage_hello.kernels import parity

    key = (kernel.name, call.device, call.dtype)
    if kernel.backend in ("torch", "ptx-emulated") or key in _proven:
        return _proven.get(key)
    if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return (
            "was not used on this device before the CUDA-graph capture began; "
            "call it once before capturing"
        )
    with _proof_lock:
        if key not in _proven:
            _proven[key] = parity.self_test(ops._ops[kernel.op], kernel, call.device, call.dtype)
    return _proven[key]
