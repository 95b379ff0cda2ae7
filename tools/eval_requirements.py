"""What a stable model must show in the JSON of `mirage eval`: each with its value, and whether."""

from __future__ import annotations

from typing import Any

TEACHER_FRAMES = 1000  # most frames of a teacher, of ablations and of what is compared with them
LOST_DB = 0.5  # over LONG_FRAMES frames, at the worst end of the slope's interval
LONG_FRAMES = 5000
CONTRAST = 0.03  # of the early value
FLICKER = 2.0  # times the model's, without history
BELOW_TEACHER_DB = {"2-step": 0.5, "1-step": 1.5}

Check = tuple[str, str, bool]


def requirements(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All checks of what was measured, as {"text", "value", "passed"}; see `unmeasured`."""
    models, ablations = result["models"], result["ablations"]
    checks: list[Check] = []
    asked = result.get("settings", {}).get("frames", 0)
    for name, model in models.items():
        if not name.startswith("teacher"):  # it streams nowhere: it is what students are held to
            checks += stable(name, model, asked)
    checks += [check for name in ablations for check in fails(name, result)]
    teacher = teacher_of(result)
    for name, most in BELOW_TEACHER_DB.items():
        if teacher and name in models:
            lost = teacher["psnr_db"]["mean"] - as_long_as_teacher(models[name])["psnr_db"]["mean"]
            text = f"{name} within {most} dB of the teacher"
            checks.append((text, f"{lost:.2f} dB lost", lost <= most))
    return [{"text": a, "value": b, "passed": bool(c)} for a, b, c in checks]


def unmeasured(result: dict[str, Any]) -> list[str]:
    """What a whole evaluation has and this one has not."""
    wanted = [name for name in BELOW_TEACHER_DB if name not in result["models"]]
    wanted += [] if teacher_of(result) else ["teacher"]
    wanted += [n for n in ("no-history", "no-augmentation") if n not in result["ablations"]]
    if result.get("settings", {}).get("frames", 0) < LONG_FRAMES:
        wanted.append(f"{LONG_FRAMES} frames")
    return wanted


def teacher_of(result: dict[str, Any]) -> dict[str, Any] | None:
    return next((m for n, m in result["models"].items() if n.startswith("teacher")), None)


def as_long_as_teacher(model: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a model over the frames that teachers and ablations have."""
    return model.get("shorter", {}).get(str(TEACHER_FRAMES), model)


def stable(name: str, model: dict[str, Any], frames: int) -> list[Check]:
    """The long run was whole, its slope is flat, no stream collapsed, no statistic moved."""
    slope = model["psnr_slope_db_per_1000"]
    flat, text = False, "one seed has no interval; give --seeds 2 or more"
    if slope["low"] is not None:
        # Zero inside, or the worst end costs less than 0.5 dB in 5000 frames.
        costs = -slope["low"] * LONG_FRAMES / 1000
        flat = slope["low"] <= 0 <= slope["high"] or costs < LOST_DB
        text = f"{slope['mean']:.3f} ({slope['low']:.3f} to {slope['high']:.3f})"
    worst, moved = largest_move(model)
    dead, ran = model["collapsed"], model["frames"]
    return [
        (f"{name}: {frames} frames in closed loop", str(ran), ran >= frames),
        (f"{name}: PSNR slope in dB per 1000 frames holds zero, or its worst end costs less than "
         f"{LOST_DB} dB in {LONG_FRAMES}", text, flat),
        (f"{name}: no stream collapses", f"{len(dead)}: {'; '.join(dead)}" if dead else "none",
         not dead),
        (f"{name}: start-end contrast below {CONTRAST:.0%}", f"{worst} {moved:.2%}",
         moved < CONTRAST),
    ]  # fmt: skip


def largest_move(model: dict[str, Any]) -> tuple[str, float]:
    """The statistic of the output that moves most from start to end, and by which share."""
    moves = {name: abs(found["output"]) for name, found in model["contrast"].items()}
    worst = max(moves, key=lambda name: moves[name])
    return worst, moves[worst]


def fails(name: str, result: dict[str, Any]) -> list[Check]:
    """How an ablation must fail: otherwise the test is too easy."""
    ablation = result["ablations"][name]
    if name == "no-augmentation":
        dead, streams = len(ablation["collapsed"]), ablation["streams"]
        db = ablation["ends_db"]
        text = f"{dead} of {streams} streams; {db['first']:.1f} dB at first, {db['late']:.1f} late"
        return [("without augmentation most streams collapse", text, 2 * dead > streams)]
    students = [m for n, m in result["models"].items() if not n.startswith("teacher")]
    same = [m for m in students if m["steps"] == ablation["steps"]]
    if name != "no-history" or not same:
        return []
    with_history = as_long_as_teacher(same[-1])["warp_error"]
    without = ablation["warp_error"]
    ratio = without["output"] / with_history["output"]
    # The truth has a warp error too (sampling, lights): beyond it the ratio is larger.
    beyond = (with_history["output"] - with_history["truth"], without["output"] - without["truth"])
    more = f"{beyond[1] / beyond[0]:.1f}" if beyond[0] > 0 else "no flicker with history"
    text = f"{ratio:.2f} (beyond the truth's own: {more})"
    return [(f"without history at least {FLICKER:g} times the flicker", text, ratio >= FLICKER)]
