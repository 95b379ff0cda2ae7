"""Arguments of tools/growth.py and tools/waterfall.py, and the sentence about a bad source."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(
    doc: str,
    found: Callable[[Any], dict[str, Any]],
    figure: Callable[[dict[str, Any]], Figure],
    argv: Sequence[str] | None = None,
) -> int:
    """Write figure(found(first source) | found(second) | ...); 0, or exit code 2 with the usage.

    Args:
        doc: the tool's docstring, for --help.
        found: what a source's JSON holds, by name; later sources add to the earlier ones.
        figure: draws it.
        argv: default: the process's own.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    parser.add_argument("source", nargs="+", type=Path, help="JSON that the sweep wrote")
    parser.add_argument("out", type=Path, help="the figure: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    together: dict[str, Any] = {}
    for source in args.source:
        try:
            together |= found(json.loads(source.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            parser.error(f"{source}: expected JSON of the sweep that --help names (got {error!r})")
    if not together:
        parser.error(f"nothing to draw in {', '.join(map(str, args.source))}; see --help")
    try:
        figure(together).savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:
        parser.error(f"{args.out}: cannot be written ({error}); give another path, such as x.png")
    except (LookupError, TypeError, AttributeError) as error:
        parser.error(f"the sources are not of the sweep that --help names (got {error!r})")
    return 0
