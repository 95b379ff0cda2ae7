"""Policies: which backend each op should use within a scope."""

import contextlib
import contextvars
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mirage_hello.kernels import backends


@dataclass(frozen=True, eq=False)
class Policy:
    """op -> backends in order of preference; "auto" stands for the best measured one.

    Compared and hashed by identity, which keeps a dispatch cheap: make one with `policy`, which
    returns the same object for the same specification.
    """

    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default: tuple[str, ...] = ("auto",)

    def wishes(self, op: str) -> tuple[str, ...]:
        return self.choices.get(op, self.default)


AUTO = Policy()
current: contextvars.ContextVar[Policy] = contextvars.ContextVar("policy", default=AUTO)


def policy(spec: "str | Sequence[str] | Mapping[str, str | Sequence[str]] | Policy") -> Policy:
    """A Policy from "ptx", ("ptx", "auto"), or {"attention": "ptx", "conv2d": ("cuda", "auto")}.

    Raises:
        ValueError: an unknown op or backend; the text names the nearest.
    """
    if isinstance(spec, Policy):
        return spec
    if isinstance(spec, Mapping):
        from mirage_hello.kernels.registry import ops  # the registry imports this module

        for name in spec:
            if name not in ops and name != "default":
                raise ValueError(unknown("op", name, dir(ops)))
        choices = {name: _backend_names(value) for name, value in spec.items()}
        default = choices.pop("default", ("auto",))
        return _interned(tuple(sorted(choices.items())), default)
    return _interned((), _backend_names(spec))


@functools.cache
def _interned(choices: tuple, default: tuple[str, ...]) -> Policy:
    return Policy(dict(choices), default) if choices or default != ("auto",) else AUTO


def _backend_names(spec: str | Sequence[str]) -> tuple[str, ...]:
    names = (spec,) if isinstance(spec, str) else tuple(spec)
    for name in names:
        if name not in backends.BACKENDS and name != "auto":
            raise ValueError(unknown("backend", name, ("auto", *backends.BACKENDS)))
    return names


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {what} {name!r} (known: {', '.join(known)}){hint}"


@contextlib.contextmanager
def use(spec: Any) -> Iterator[Policy]:
    """Within the block, ops follow this policy (see `policy`). Per thread and async task.

    An explicit backend runs or raises BackendError; ("ptx", "auto") asks for ptx where it can run.
    """
    chosen = policy(spec)
    token = current.set(chosen)
    try:
        yield chosen
    finally:
        current.reset(token)
