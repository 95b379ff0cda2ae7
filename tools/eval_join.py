"""Joins results of `mirage eval` whose candidates ran apart, each on a GPU of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mirage_hello.tools.errors import BadInput

# What makes numbers comparable.
SAME = ("format", "size", "styles", "seeds", "device", "torch", "settings")


def join(paths: list[Path], name: str) -> dict[str, Any]:
    """One result with the candidates of all; the requirements are the caller's to check again.

    Raises:
        BadInput: a file that is no result, results of other clips, or a candidate in two of them.
    """
    results = [read(path) for path in paths]
    first = results[0]
    joined = {**first, "name": name, "models": {}, "ablations": {}, "requirements": []}
    joined["seconds"] = sum(result["seconds"] for result in results)
    for path, result in zip(paths, results, strict=True):
        for key in SAME:
            if result.get(key) != first.get(key):
                raise BadInput(
                    f"eval: {path} has {key} {result.get(key)!r}, {paths[0]} has "
                    f"{first.get(key)!r}; join results of the same clips and machine"
                )
        for group in ("models", "ablations"):
            for candidate, numbers in result[group].items():
                if candidate in joined[group]:
                    raise BadInput(
                        f"eval: {candidate} is in {path} and in a file before it; leave it out of "
                        "one with --only"
                    )
                joined[group][candidate] = numbers
    return joined


def read(path: Path) -> dict[str, Any]:
    """A result file; BadInput where it is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"eval: {path} cannot be read ({error})") from error
    if not isinstance(result, dict) or not {"models", "ablations", "seconds"} <= set(result):
        raise BadInput(f"eval: {path} is no result of `mirage eval`; expected models and ablations")
    return result


def bring_pictures(paths: list[Path], out: Path) -> None:
    """Copy the pictures and clips that results name into the folder of the joined one."""
    for path in paths:
        if path.parent.resolve() == out.resolve():
            continue
        result = read(path)
        for numbers in (*result["models"].values(), *result["ablations"].values()):
            for name in filter(None, numbers["strips"].values()):
                if (path.parent / name).is_file():
                    shutil.copy(path.parent / name, out)
