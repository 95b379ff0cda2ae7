"""Plots and an HTML page from the JSON of `mirage eval`."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from mirage_hello.tools.errors import BadInput

FORMAT = "mirage-eval-3"
PANELS = (
    ("psnr", "PSNR against truth (dB)"),
    ("ssim", "SSIM against truth"),
    ("edges", "edges where the truth's are"),
    ("warp", "warp error (flicker)"),
    ("output_saturation", "saturation"),
    ("output_contrast", "contrast"),
    ("output_brightness", "brightness"),
)
OPENING = 200  # frames of the left column, where a weak memory falls
GREY = {
    "psnr": "psnr_without",
    "edges": "edges_without",
    "warp": "warp_truth",
}  # what is drawn in grey, if not truth_...
GREY_LABELS = {"psnr_without": "without a memory", "edges_without": "without a memory"}
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
SHOWN = (
    ("clip", "The long run"),
    ("cuts", "The first frames of the run with cuts, none left out"),
    ("frame", "The last frame"),
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px;
       padding: 0 1rem; color: #1f2328; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; text-align: left;
       border-bottom: 1px solid #d1d9e0; }
img, video { max-width: 100%; } .clips { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 320px; } .pass { color: #1a7f37; } .fail { color: #d1242f; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
"""


def read(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        BadInput: no such file, or not results of `mirage eval`.
    """
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"--page: no file {path}; run `mirage eval` first") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"--page: {path} is not JSON ({error})") from error
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise BadInput(
            f"--page: {path} is not a result of `mirage eval` as this version writes it (format "
            f"{found!r}, expected {FORMAT!r}); measure again"
        )
    return result


def write(path: Path) -> str:
    """Plots and page beside the JSON; returns what was written, in words."""
    result = read(path)
    plot = path.with_suffix(".png")
    draw(result, plot)
    page = path.with_suffix(".html")
    page.write_text(page_text(result, plot.name))
    return f"{page} and {plot}"


def draw(result: dict[str, Any], path: Path) -> None:
    """One row a measure, its opening and the whole; one line a model; ablations are dashed."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("plots need matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(PANELS), 2, figsize=(13, 2.2 * len(PANELS)), sharey="row", sharex="col",
        width_ratios=(1, 2),
    )  # fmt: skip
    lines = [(n, m, "-") for n, m in result["models"].items()]
    lines += [(n, m, "--") for n, m in result["ablations"].items()]
    for (key, label), row_axes in zip(PANELS, axes, strict=True):
        for axis in row_axes:
            draw_panel(axis, key, lines)
        row_axes[0].set_ylabel(label, fontsize=8)
    axes[-1, 0].set_xlim(0, OPENING)
    for row in (0, list(dict(PANELS)).index("warp")):  # from there on grey is the truth
        axes[row, 1].legend(fontsize=7, ncol=4)
    for axis in axes[-1]:
        axis.set_xlabel("frame")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_panel(axis: Any, key: str, lines: list[tuple[str, dict[str, Any], str]]) -> None:
    """The lines of all candidates, and in grey what the truth has (of the longest run)."""
    for (name, model, dash), colour in zip(lines, COLOURS * 3, strict=False):
        curves = model["curves"]
        axis.plot(curves["frame"], curves[key], dash, color=colour, label=name, linewidth=1.1)
    grey = GREY.get(key, key.replace("output_", "truth_"))
    curves = max((model["curves"] for _, model, _ in lines), key=lambda c: len(c["frame"]))
    if grey != key and grey in curves:
        label = GREY_LABELS.get(grey, "truth")
        axis.plot(curves["frame"], curves[grey], color="0.5", label=label, linewidth=1)
    axis.grid(alpha=0.3)


def page_text(result: dict[str, Any], plot: str) -> str:
    """The page: requirements, one table of all candidates, plots, pictures."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>mirage eval: {html.escape(result['name'])}</title><style>{STYLE}</style>",
        f"<h1>Closed-loop evaluation: {html.escape(result['name'])}</h1>",
        f"<p>{result['size']}x{result['size']} pixels on {html.escape(result['device'])}, "
        f"{result['date']}, {result['seconds']} s.</p><h2>Requirements</h2><table>",
    ]
    for item in result["requirements"]:
        word = "pass" if item["passed"] else "fail"
        parts.append(
            f"<tr><td class='{word}'>{word}</td><td>{html.escape(item['text'])}</td>"
            f"<td>{html.escape(item['value'])}</td></tr>"
        )
    if result.get("not_measured"):
        missing = html.escape(", ".join(result["not_measured"]))
        parts.append(f"<tr><td></td><td>not measured</td><td>{missing}</td></tr>")
    heads = ("model", "steps", "frames", "PSNR (dB)", "SSIM", "slope (dB / 1000)", "warp error",
             "edges", "cut recovery (frames)", "persistence", "recall",
             "true / own / no memory (dB)")  # fmt: skip
    parts.append("</table><h2>Numbers</h2><table><tr><th>" + "<th>".join(heads) + "</tr>")
    everything = {**result["models"], **result["ablations"]}
    parts += [row(name, model) for name, model in everything.items()]
    parts.append(f"</table><h2>Over time</h2><img src='{plot}' alt='curves'>")
    for kind, title in SHOWN:
        shown = [(n, f) for n, m in everything.items() if (f := picture_of(m, kind))]
        if shown:
            parts.append(f"<h2>{title}: input | output | truth</h2><div class='clips'>")
            parts += [figure(name, file) for name, file in shown]
            parts.append("</div>")
    return "\n".join(parts) + "</html>\n"


def picture_of(model: dict[str, Any], kind: str) -> str:
    """The file that a candidate has of a kind of `SHOWN`; "" if it has none."""
    return next((file for label, file in model["strips"].items() if label.startswith(kind)), "")


def figure(name: str, file: str) -> str:
    """A clip or a picture with its name."""
    name, file = html.escape(name), html.escape(file, quote=True)
    if file.endswith(".mp4"):
        shown = f"<video src='{file}' controls loop muted></video>"
    else:
        shown = f"<img src='{file}' alt='{name}'>"
    return f"<figure>{shown}<figcaption>{name}</figcaption></figure>"


def row(name: str, model: dict[str, Any]) -> str:
    """One line of the table."""

    def ranged(key: str, digits: int) -> str:
        value = model.get(key)
        if value is None:
            return "-"
        text = f"{value['mean']:.{digits}f}"
        if value["low"] is None:
            return text
        return f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    warp, cut = model["warp_error"], model.get("cut_recovery_frames")
    db = model.get("memory_db")
    memory = " / ".join(f"{db[k]:.1f}" for k in ("true", "own", "none")) if db else "-"
    cells = [
        html.escape(name), str(model["steps"]), str(model.get("frames", "-")),
        ranged("psnr_db", 2), ranged("ssim", 3),
        ranged("psnr_slope_db_per_1000", 3), f"{warp['output']:.4f} (truth {warp['truth']:.4f})",
        f"{model['edges']['output']:.3f} (without a memory {model['edges']['without']:.3f})",
        "-" if cut is None or cut["mean"] is None else f"{cut['mean']:.1f}",
        ranged("persistence", 3), ranged("recall", 3), memory,
    ]  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
