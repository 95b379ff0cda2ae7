"""Hold every kernel that can serve a call on this machine against the float64 reference."""

from typing import Any

from hypothesis import HealthCheck, settings
from torch import Tensor

from mirage_hello.kernels import Kernel, ops, parity

# The device fixture is made anew for each test, not for each example, which is what is wanted.
PROPERTY = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def able(op: str, *args: Any, **kwargs: Any) -> list[Kernel]:
    """The kernels that accept the call. The emulator's turn is in tests of its own: it is slow."""
    call = getattr(ops, op).describe(args, kwargs)
    kernels = [k for k in getattr(ops, op).kernels if k.backend != "ptx-emulated"]
    return [k for k in kernels if k.refuses(call) is None]


def assert_parity(op: str, *args: Any, **kwargs: Any) -> None:
    """Every able kernel passes parity.compare."""
    kernels = able(op, *args, **kwargs)
    assert kernels, f"no kernel of {op} accepts {[getattr(a, 'shape', a) for a in args]}"
    for kernel in kernels:
        result = parity.compare(op, kernel, args, kwargs)
        assert result.passed, f"{kernel.name}: {result}"


def outputs(op: str, *args: Any, **kwargs: Any) -> list[tuple[str, Tensor]]:
    """(name, result) of every able kernel."""
    return [(k.name, k.run(*args, **kwargs)) for k in able(op, *args, **kwargs)]
