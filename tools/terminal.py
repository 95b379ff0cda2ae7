"""What a person or a script sees: tables and text, progress bars, one JSON object."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Wide enough for every table: a file or a pipe has no edge to wrap at.
WIDTH_WITHOUT_TERMINAL = 200


def console() -> Console:
    """Standard output, for tables and sentences."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich's own way out is exit code 1, which means a failed check

    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    return Output(highlight=False, soft_wrap=True, width=width)


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"warning: {text}", file=sys.stderr)


def progress_bar(unit: str = "") -> Progress:
    """A bar on standard error with the count, the rate in `unit` a second and the time left.

    Without a terminal it prints nothing, so that logs stay short.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} {unit}/s" if unit and speed else "")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on standard output; numbers that JSON lacks (inf, NaN) become null."""
    json.dump(_finite(result), sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:  # inf - inf and NaN - NaN are NaN
        return None
    return value
