"""Plots and an HTML page from the JSON of `mirage eval`."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from mirage_hello.tools.errors import BadInput

PANELS = (
    ("psnr", "PSNR against truth (dB)"),
    ("ssim", "SSIM against truth"),
    ("warp", "warp error (flicker)"),
    ("output_saturation", "saturation"),
    ("output_brightness", "brightness"),
)
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px;
       padding: 0 1rem; color: #1f2328; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; text-align: left;
       border-bottom: 1px solid #d1d9e0; }
img, video { max-width: 100%; } .pass { color: #1a7f37; } .fail { color: #d1242f; }
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
    except json.JSONDecodeError as error:
        raise BadInput(f"--page: {path} is not JSON ({error})") from error
    if result.get("format") != "mirage-eval-1":
        raise BadInput(f"--page: {path} is not a result of `mirage eval`")
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
    """One panel a measure, one line a model; ablations are dashed, the truth is grey."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("plots need matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PANELS), 1, figsize=(9, 2.4 * len(PANELS)), sharex=True)
    lines = [(n, m, "-") for n, m in result["models"].items()]
    lines += [(n, m, "--") for n, m in result["ablations"].items()]
    for (key, label), axis in zip(PANELS, axes, strict=True):
        for (name, model, dash), colour in zip(lines, COLOURS * 3, strict=False):
            curves = model["curves"]
            axis.plot(curves["frame"], curves[key], dash, color=colour, label=name, linewidth=1.2)
        truth = key.replace("output_", "truth_")
        if truth != key:
            curves = lines[0][1]["curves"]
            axis.plot(curves["frame"], curves[truth], color="0.5", label="truth", linewidth=1)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, ncol=3)
    axes[-1].set_xlabel("frame")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    heads = ("model", "steps", "PSNR (dB)", "SSIM", "slope (dB / 1000)", "warp error",
             "cut recovery (frames)", "persistence", "true / own / no memory (dB)")  # fmt: skip
    parts.append("</table><h2>Numbers</h2><table><tr><th>" + "<th>".join(heads) + "</tr>")
    everything = {**result["models"], **result["ablations"]}
    parts += [row(name, model) for name, model in everything.items()]
    parts.append(f"</table><h2>Over time</h2><img src='{plot}' alt='curves'>")
    for name, model in everything.items():
        parts.append(f"<h2>{html.escape(name)}: input | output | truth</h2>")
        for label, file in model["strips"].items():
            if file.endswith(".mp4"):
                parts.append(f"<video src='{file}' controls loop muted></video>")
            elif file:
                parts.append(f"<p>{html.escape(label)}</p><img src='{file}' alt='{label}'>")
    return "\n".join(parts) + "</html>\n"


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
        html.escape(name), str(model["steps"]), ranged("psnr_db", 2), ranged("ssim", 3),
        ranged("psnr_slope_db_per_1000", 3), f"{warp['output']:.4f} (truth {warp['truth']:.4f})",
        "-" if cut is None or cut["mean"] is None else f"{cut['mean']:.1f}",
        ranged("persistence", 3), memory,
    ]  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
