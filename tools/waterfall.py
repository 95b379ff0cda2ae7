"""Where the microseconds of a frame go, per kernel family, from left to right up to the frame.

    python -P tools/waterfall.py frame.json [...] docs/plots/frame-waterfall.png

A source is of bench/sweeps/frame.py, with a profile for each variant, or a run of `mirage bench`,
whose frame row has one of ours and one of torch.compile.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from mirage_hello.tools.figure import draw

# 0.803 TFLOP of the 880m's step at 512x512 at the measured matrix rate, 729 TFLOP/s: the longer of
# that and of its 1.72 GB of weights at the measured copy rate (404 us).
FLOOR_US = 0.803e12 / 729e12 * 1e6
COLOURS = {
    "convolution": "#e69f00",
    "attention": "#d55e00",
    "linear": "#009e73",
    "normalisation": "#0072b2",
    "elementwise": "#56b4e9",
    "copies over the bus": "#cc79a7",
    "idle": "#bbbbbb",
}
OTHER = "#8a929b"


def steps(profile: dict[str, Any]) -> list[tuple[str, float]]:
    """(family, us) of a profile, the largest first, idle last."""
    families = sorted(profile["families"].items(), key=lambda pair: -pair[1])
    return [*families, ("idle", profile["span_us"] - profile["busy_us"])]


def waterfall(profiles: dict[str, dict[str, Any]], floor_us: float = FLOOR_US) -> Figure:
    """One panel for each named profile; each bar begins where the one above it ends.

    Args:
        profiles: name -> what `frame_profile.profile` returned.
        floor_us: drawn as a line in every panel.
    """
    figure, axes = plt.subplots(
        len(profiles), 1, figsize=(8, 0.6 + 2.6 * len(profiles)), squeeze=False, sharex=True
    )
    for axis, (name, profile) in zip(axes[:, 0], profiles.items(), strict=True):
        at = 0.0
        listed = steps(profile)
        for row, (label, us) in enumerate(listed):
            axis.barh(row, us, left=at, color=COLOURS.get(label, OTHER), height=0.7)
            axis.text(at + us + 15, row, f"{us:.0f}", va="center", fontsize=8)
            at += us
        axis.set_yticks(range(len(listed)), [label for label, _ in listed], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(floor_us, color="#1b1f24", linestyle=":", linewidth=1)
        axis.text(floor_us, -0.75, f"floor {floor_us:.0f} us", fontsize=8, ha="center")
        axis.set_title(f"{name}: {at:.0f} us on the device", fontsize=9, loc="left", pad=14)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("microseconds of a frame")
    figure.tight_layout()
    return figure


def profiles(measured: Any) -> dict[str, dict[str, Any]]:
    """Name -> profile of what a source holds."""
    if isinstance(measured, list):
        return {variant["variant"]: variant["profile"] for variant in measured}
    rows = [row["device"] for row in measured["rows"] if "device" in row]
    return {name: found for row in rows for name, found in row.items() if isinstance(found, dict)}


if __name__ == "__main__":
    sys.exit(draw(__doc__ or "", profiles, waterfall))
