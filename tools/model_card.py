"""The model card of shipped weights, from JSON: their record, their evaluation, frame times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.eval_requirements import (
    TEACHER_FRAMES,
    as_long_as_teacher,
    largest_move,
    unmeasured,
)

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def read(path: Path) -> dict[str, Any]:
    """A JSON object; BadInput where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"publish: {path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"publish: {path} holds no JSON object")
    return found


def card(
    name: str, record: dict[str, Any], result: dict[str, Any], runs: list[dict[str, Any]]
) -> str:
    """The text of the card.

    Args:
        record: `weights/<name>.json`; result: of `mirage eval`; runs: of `mirage bench`, any of
            which may have frame rows of this model.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )  # text, not HTML: nothing to escape
    candidates = {**result["models"], **result["ablations"]}
    first = next(iter(candidates.values()))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        record=record,
        settings=record["training"][0]["settings"],
        gpu_seconds=sum(stage["seconds"] * stage["gpus"] for stage in record["training"]),
        changed=changed,
        result=result,
        not_measured=unmeasured(result),
        quality=[quality_cells(key, model) for key, model in candidates.items()],
        seeds=first["seeds"],
        styles=len(first["by_style"]),
        ceiling_db=first["ceiling_db"],
        early=[
            (key, streams)
            for key, model in result["models"].items()
            if model["frames"] > TEACHER_FRAMES
            if (streams := as_long_as_teacher(model)["collapsed"])
        ],
        frames=[cells for run in runs for cells in frame_cells(name, run)],
    )


def changed(stage: dict[str, Any]) -> str:
    """Settings that are not the preset's, as --set takes them."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(f"{k}={text(v)}" for k, v in stage["changed"].items()) or "none"


def ranged(value: dict[str, Any] | None, digits: int) -> str:
    """A mean with its interval."""
    if value is None or value["mean"] is None:
        return "-"
    text = f"{value['mean']:.{digits}f}"
    if value.get("low") is None:
        return text
    return f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def quality_cells(name: str, model: dict[str, Any]) -> list[str]:
    """One candidate's numbers."""
    worst, moved = largest_move(model)
    warp, memory = model["warp_error"], model.get("memory_db")
    return [
        name, str(model["steps"]), f"{model['frames']:,}", ranged(model["psnr_db"], 2),
        ranged(model["ssim"], 3), ranged(model["psnr_slope_db_per_1000"], 3),
        f"{worst} {moved:.1%}",
        f"{warp['output']:.4f} ({warp['truth']:.4f})",
        f"{model['edges']['output']:.2f} ({model['edges']['without']:.2f})",
        ranged(model.get("cut_recovery_frames"), 1), ranged(model.get("persistence"), 2),
        ranged(model.get("recall"), 2),
        " / ".join(f"{memory[k]:.1f}" for k in ("true", "own", "none")) if memory else "-",
        str(len(model["collapsed"])),
    ]  # fmt: skip


def frame_cells(name: str, run: dict[str, Any]) -> list[list[str]]:
    """The frame times of this model in a run, a row for each size and number of steps."""
    meta, found = run["meta"], []
    for row in run["rows"]:
        if row["op"] == "frame" and row["case"].startswith(f"{name} "):
            times = row["frame_us"]
            found.append([
                f"{meta['gpu']}, {meta['host']}" if meta["device"] == "cpu" else meta["gpu"],
                row["case"].removeprefix(f"{name} "), row["dtype"],
                f"{times['p50'] / 1e3:.3g}", f"{times['p95'] / 1e3:.3g}", f"{times['frames']:,}",
                meta["commit"][:12],
            ])  # fmt: skip
    return found
