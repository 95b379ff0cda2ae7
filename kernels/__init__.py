"""Kernels, one page per op, and the registry that swaps them.

from mirage_hello.kernels import ops, use, explain, swap
"""

# The pages define the ops and register their kernels.
from mirage_hello.kernels import (  # noqa: F401
    attention,
    conv2d,
    elementwise,
    frames,
    group_norm,
    layer_norm,
    linear,
)
from mirage_hello.kernels.explanation import Candidate, Explanation, explain
from mirage_hello.kernels.kernel import Kernel
from mirage_hello.kernels.policy import Policy, policy, use
from mirage_hello.kernels.registry import BackendError, Op, define, forget_choices, ops, register
from mirage_hello.kernels.swap import swap, unswap

__all__ = [
    "BackendError",
    "Candidate",
    "Explanation",
    "Kernel",
    "Op",
    "Policy",
    "define",
    "explain",
    "forget_choices",
    "ops",
    "policy",
    "register",
    "swap",
    "unswap",
    "use",
]
