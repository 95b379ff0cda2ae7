"""Tiles by measurement: how a kernel picks among the ways it can run a shape on this card.

    tile = tile_for("conv2d", {"batch": 1, "p": 64, ...}, candidates, cost)

1. what `mirage tune` measured on this card:   <kernel cache>/tiles-<card>.json
2. what ships for this kind of card:           kernels/choices/<card>-tiles.json
3. else the candidate of the least cost, the kernel's own model of its time

Nothing is measured here, ever: a frame that meets a new shape takes the model's tile. A candidate
is a frozen dataclass, a string or a number; a stored one counts only while it is still among the
candidates. Both files hold, for a card,

    {"card": name, "commit": sha, "ops": {op: {"batch=1 p=64 ...": {
        "tile": {field: value where it is not the default}, "time_us": t, "timing": "cold-weights",
        "runner_up": {...}, "runner_up_us": t, "model": {...}, "model_us": t}}}}
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch

from mirage_hello.kernels.measured import file_name
from mirage_hello.ptx import cache

log = logging.getLogger("mirage_hello")
T = TypeVar("T")
Table = dict[str, dict[str, dict[str, Any]]]  # op -> key -> entry


@dataclass(frozen=True)
class Request:
    """What a kernel asks: the shape, the ways to run it and what each is thought to cost."""

    op: str
    key: str
    candidates: Callable[[], Sequence[Any]]
    cost: Callable[[Any], float]

    def ranked(self) -> list[Any]:
        """The candidates, the cheapest by the model first."""
        return sorted(self.candidates(), key=self.cost)


@dataclass(frozen=True)
class Choice:
    """The tile that a request gets, and why.

    source: "tuned on this card", "shipped for <card>" or "cost model".
    time_us, runner_up_us: measured; None where the model chose.
    cost_ratio: the model's cost of the runner-up over that of the tile; None where both are timed.
    """

    op: str
    key: str
    tile: Any
    source: str
    time_us: float | None = None
    runner_up: Any = None
    runner_up_us: float | None = None
    cost_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        names = {"tile": name(self.tile), "runner_up": self.runner_up and name(self.runner_up)}
        return vars(self) | names

    def __str__(self) -> str:
        time = f" {self.time_us:.2f} us" if self.time_us is not None else ""
        text = f"{name(self.tile)}{time} ({self.source})"
        if self.runner_up is None:
            return text
        text += f"; runner-up {name(self.runner_up)}"
        if self.runner_up_us is not None:
            return f"{text} {self.runner_up_us:.2f} us"
        return f"{text} {self.cost_ratio:.2f} x its estimate" if self.cost_ratio else text


class Asked(BaseException):
    """Carries a request out of a kernel that was started only to hear it (`request_of`)."""

    def __init__(self, request: Request) -> None:
        self.request = request


# Choice

_tiles: dict[tuple, Any] = {}
_listener: Callable[[Request], Any] | None = None


def tile_for(
    op: str,
    key: Mapping[str, int | str | bool],
    candidates: Callable[[], Sequence[T]],
    cost: Callable[[T], float],
) -> T:
    """The tile that was fastest where this shape was measured, else the one of the least cost.

    Args:
        op: name of the op, under which results are stored.
        key: everything the tile depends on, name -> value, in a fixed order.
        candidates: gives the tiles that fit; called once a shape.
        cost: estimated time of a tile in any unit. A kernel without a model gives its rule's
            choice 0 and the others 1.
    """
    asked = (op, _device(), *key.values())
    if _listener is None and asked in _tiles:
        return _tiles[asked]
    text = " ".join(f"{name}={value}" for name, value in key.items())
    request = Request(op, text, candidates, cost)
    if _listener is not None:
        return _listener(request)
    _tiles[asked] = choose(request).tile
    return _tiles[asked]


def choose(request: Request, card: str | None = None) -> Choice:
    """What a request gets on a card (None: the current one)."""
    card = card or current_card()
    for source, table in tables(card):
        entry = table.get(request.op, {}).get(request.key)
        tile = decoded(entry["tile"], request) if entry is not None else None
        if entry is not None and tile is not None:
            runner_up = decoded(entry.get("runner_up"), request)
            timed = entry.get("time_us"), runner_up, entry.get("runner_up_us")
            return Choice(request.op, request.key, tile, source, *timed)
        if entry is not None:
            text = "%s %s: %s is no candidate any more; run `mirage tune --op %s`"
            log.warning(text, request.op, request.key, entry["tile"], request.op)
    first, *others = request.ranked()
    second = others[0] if others else None
    own = request.cost(first)
    ratio = request.cost(second) / own if others and own else None
    source = "cost model"
    return Choice(request.op, request.key, first, source, runner_up=second, cost_ratio=ratio)


def request_of(run: Callable[..., Any], args: Sequence[Any]) -> Request | None:
    """What `run(*args)` would ask first, or None when it asks nothing; nothing is launched.

    args: tensors on the "meta" device, which have no data, and plain values.
    """

    def stop(request: Request) -> Any:
        raise Asked(request)

    with listening(stop):
        try:
            run(*args)
        except Asked as asked:
            return asked.request
        except Exception as error:  # a kernel without tiles went on to launch what has no data
            log.debug("%s asks for no tile: %s", run, error)
    return None


@contextlib.contextmanager
def listening(listener: Callable[[Request], Any]) -> Iterator[None]:
    """Within the block every request goes to `listener`, which returns the tile. For one thread."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def has_tiles(run: Callable[..., Any]) -> bool:
    """Whether a kernel chooses among tiles: then it takes one as `tile=`, too."""
    return "tile" in inspect.signature(run).parameters


def forget() -> None:
    """Drop what was read and chosen, so that the next call reads the files again."""
    _tiles.clear()
    tables.cache_clear()


# Cards and files


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def current_card() -> str | None:
    """Name of the current CUDA device; None in a process that uses none."""
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else None


def user_path(card: str) -> Path:
    """Where `mirage tune` keeps a card's results: beside the compiled kernels."""
    return cache.folder() / f"tiles-{file_name(card)}"


def shipped_path(card: str) -> Path:
    folder = Path(str(resources.files("mirage_hello.kernels"))) / "choices"
    return folder / file_name(card).replace(".json", "-tiles.json")


@functools.cache
def tables(card: str | None) -> tuple[tuple[str, Table], ...]:
    """(source, table) of a card, in the order in which they count."""
    if card is None:
        return ()
    own, shipped = user_path(card), shipped_path(card)
    return ("tuned on this card", read(own)), (f"shipped for {card}", read(shipped))


def read(path: Path) -> Table:
    """The table of a file; {} where there is none, or where it is damaged, which is logged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ops: Table = content["ops"]
        entries = [e for keys in ops.values() for e in keys.values()]
        if all(isinstance(e, dict) and "tile" in e for e in entries):
            return ops
        problem = "an entry has no tile"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    log.warning("tiles in %s cannot be used (%s); `mirage tune` writes them anew", path, problem)
    return {}


def save(card: str, commit: str, found: Table, path: Path) -> None:
    """Merge results into a file, which is written beside its place and renamed into it."""
    ops = read(path)
    for op, entries in found.items():
        ops[op] = dict(sorted((ops.get(op, {}) | entries).items()))
    lines = [
        json.dumps(op) + ": {\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        + "\n}"
        for op, entries in sorted(ops.items())
    ]  # fmt: skip
    head = f'{{"card": {json.dumps(card)}, "commit": {json.dumps(commit)}, "ops": {{\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(head + ",\n".join(lines) + "\n}}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    forget()


# Tiles as JSON


def encoded(tile: Any) -> Any:
    """A dataclass as its fields that are not the default; anything else as it is."""
    if not dataclasses.is_dataclass(tile):
        return tile
    values = ((f, getattr(tile, f.name)) for f in dataclasses.fields(tile))
    return {f.name: value for f, value in values if value != f.default}


def decoded(stored: Any, request: Request) -> Any:
    """The candidate that `stored` stands for, or None."""
    if stored is None:
        return None
    candidates = request.candidates()
    if isinstance(stored, dict) and candidates and dataclasses.is_dataclass(candidates[0]):
        kind: Any = type(candidates[0])
        try:
            stored = kind(**stored)
        except (TypeError, ValueError):  # fields that there were once
            return None
    return stored if stored in candidates else None


def name(tile: Any) -> str:
    """`Tile(warpgroups=2, block_n=96, split=4)`: without the defaults."""
    if not dataclasses.is_dataclass(tile):
        return str(tile)
    fields = ", ".join(f"{key}={value}" for key, value in encoded(tile).items())
    return f"{type(tile).__name__}({fields})"
