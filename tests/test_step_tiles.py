"""Tiles timed in a captured step: a step on a CPU, captures and a clock of ours."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from mirage_hello.bench import harness, model_tiles, run_file, step_tiles, tune, worker
from mirage_hello.kernels import tuning

PLACE, OTHER = ("double", "n=3"), ("double", "n=5")


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int = 8
    split: int = 1
    stages: int | None = None


TILES = [Tile(64), Tile(64, split=2), Tile(64, split=2, stages=4), Tile(128), Tile(128, split=4)]
STEP_US = {Tile(64): 100.0, Tile(64, split=2): 98.0, Tile(128): 99.5, Tile(128, split=4): 40.0}


def double(x: torch.Tensor) -> torch.Tensor:
    key = {"n": x.numel()}
    tile = tuning.tile_for("double", key, lambda: TILES, lambda t: t.rows * t.split)
    asked.append((x.numel(), tile))
    return 2 * x if tile != Tile(128, split=4) else 2 * x + 1  # which is wrong


def ruled(x: torch.Tensor) -> torch.Tensor:
    tuning.tile_for("ruled", {"n": x.numel()}, lambda: ("a", "b"), lambda t: float(t != "b"))
    return x


asked: list[tuple[int, Tile]] = []


def step() -> torch.Tensor:
    return double(double(torch.ones(3))).sum() + double(torch.ones(5)).sum()


class Graph:
    """A capture of the step: which tile it has at the place that is timed."""

    def __init__(self) -> None:
        self.tile = next(tile for n, tile in reversed(asked) if n == 3)

    def replay(self) -> "Graph":
        return self


class Event:
    def __init__(self, us: float) -> None:
        self.us = us

    def elapsed_time(self, end: "Event") -> float:
        return end.us / 1e3


@pytest.fixture
def clock(monkeypatch):
    def capture(body, pool=None):
        body()
        return Graph()

    def timed(replay):
        return Event(0.0), Event(STEP_US.get(replay().tile, 120.0))

    asked.clear()
    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness, "timed", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_step_knows_what_it_asks_and_how_often():
    found = step_tiles.Step(step)
    assert found.calls == {PLACE: 2, OTHER: 1} and found.heaviest() == [PLACE, OTHER]
    assert found.tiles == {PLACE: Tile(64), OTHER: Tile(64)}
    asked.clear()
    found.with_tiles({OTHER: Tile(128)})
    assert asked == [(3, Tile(64)), (3, Tile(64)), (5, Tile(128))]


def test_places_with_a_rule_and_few_ways_come_first_others_last():
    found = step_tiles.Step(lambda: step() + ruled(torch.ones(2)).sum())
    assert found.heaviest() == [("ruled", "n=2"), PLACE, OTHER]
    request = found.requests["ruled", "n=2"]
    many = dataclasses.replace(request, candidates=lambda: "abcde")
    found.requests["ruled", "n=2"] = many
    assert found.heaviest() == [PLACE, OTHER, ("ruled", "n=2")]


def test_candidates_are_near_the_one_in_use_or_the_best():
    found = step_tiles.Step(step)
    assert found.candidates(PLACE, 8, 8) == [*TILES[:2], *TILES[3:]]  # no ring of another tile
    assert found.candidates(PLACE, 0, 3) == [*TILES[:2], TILES[3]]
    found.tiles[PLACE] = Tile(64, split=2)
    assert found.candidates(PLACE, 8, 0) == [Tile(64, split=2), Tile(64), TILES[2]]


def test_the_fastest_is_kept_if_it_is_faster_by_more_than_noise(clock):
    found = step_tiles.Step(step)
    best = step_tiles.best(found, PLACE, [Tile(64), Tile(64, split=2), Tile(128)])
    assert best["tile"] == {"rows": 64, "split": 2} and best["effect_us"] == -2.0
    assert best["effects_us"]["Tile(rows=128)"] == -0.5
    assert found.tiles[PLACE] == Tile(64, split=2)
    best = step_tiles.best(found, PLACE, [Tile(64, split=2), Tile(128)])
    assert best["effect_us"] == 0.0 and found.tiles[PLACE] == Tile(64, split=2)


def test_tiles_of_an_earlier_run_count_while_they_are_candidates():
    found = step_tiles.Step(step)
    found.take({PLACE: {"rows": 128}, OTHER: {"rows": 256}, ("gone", "n=1"): {"rows": 64}})
    assert found.tiles == {PLACE: Tile(128), OTHER: Tile(64)}


class TestInANetwork:
    """A place of a network: what is right is timed, what is found is kept at once."""

    def measured(self, lost=()):
        truth = torch.tensor(22.0)  # 2 2 3 + 2 5
        calls = {PLACE: (double, (torch.ones(3),), {})}
        network = model_tiles.Network("step", step, truth)
        timed = model_tiles.Timed(network, step_tiles.Step(step), calls, 1e-3, None)
        unit = timed.unit(PLACE, TILES)
        begun: list[str] = []
        outcome = unit.run(lambda name, seconds: begun.append(name), lost)
        return outcome, begun

    def test_the_wrong_one_is_not_timed(self, clock):
        outcome, begun = self.measured()
        (result,) = outcome.tiles
        assert result["entry"]["tile"] == {"rows": 64, "split": 2}
        assert result["entry"]["was"] == {"rows": 64} and begun[-1] == "timing"
        assert "Tile(rows=128, split=4)" in result["wrong"]
        assert "-2.00 us double n=3" in tune.line(result)
        assert tune.table([result]) == {"double": {"n=3": result["entry"]}}

    def test_every_place_comes_with_its_candidates(self, monkeypatch):
        monkeypatch.setattr(step_tiles, "compiling", lambda step, candidates, pool: [])
        monkeypatch.setattr(model_tiles, "TOGETHER", 1)
        found = step_tiles.Step(step)
        with ThreadPoolExecutor(1) as pool:
            pairs = dict(model_tiles.compiled(found, [PLACE, OTHER], 8, pool))
        assert list(pairs) == [PLACE, OTHER] and pairs[PLACE] == found.candidates(PLACE, 8, 8)

    def test_what_it_brought_is_printed(self, clock, capsys):
        found = step_tiles.Step(step)
        network = model_tiles.Network("step", step, torch.tensor(22.0))
        timed = model_tiles.Timed(network, found, {}, 1e-3, None)
        before = dict(found.tiles)
        found.tiles[PLACE] = Tile(64, split=2)
        model_tiles.gained(timed, before, lambda name, seconds: None, [])
        assert "step: 100.0 us, now 98.0 us" in capsys.readouterr().out

    def test_what_hung_is_left_out_and_what_is_not_better_is_not_stored(self, clock):
        outcome, begun = self.measured(lost=["Tile(rows=64, split=2)"])
        assert "Tile(rows=64, split=2)" not in begun
        assert tune.table(outcome.tiles) == {}

    def test_a_result_is_in_the_file_before_the_next_begins(self, clock, tmp_path):
        outcome, _ = self.measured()
        run = run_file.new_run("cpu", "0123456")
        path = tmp_path / "tiles.json"
        worker.add(run, outcome, tmp_path / "run.json", str(path))
        assert tuning.read(path)["double"]["n=3"]["tile"] == {"rows": 64, "split": 2}
