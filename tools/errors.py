"""What the `mirage` command says when its input is bad: one sentence, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """One sentence for the person at the keyboard: what failed, got, expected, what to do."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a list: the known names and the nearest one.

    The registry words it the same way; this one serves where torch is not imported.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {what} {name!r} (known: {', '.join(names)}){hint}"
