"""What the `mirage` command says when its input is bad: one sentence, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """One sentence for the person at the keyboard: what failed, got, expected, what to do."""


def unknown_name(kind: str, got: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a list: the known names and the nearest one.

    Args:
        kind: what the name stands for, such as "preset".
        got: the name as typed.
        known: every name that would have been accepted.
    """
    names = sorted(known)
    near = difflib.get_close_matches(got.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {got!r}; known: {', '.join(names)}{hint}"
