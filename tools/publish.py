"""Make everything that ships with trained weights, from an evaluated checkpoint and its records.

    python -m mirage_hello.tools.publish --checkpoint run/model.safetensors \\
        --run autoencoder/ video/:2 distill/ --eval out/eval/tiny.json

Each part may be made alone: --checkpoint with --run the weights and their record, --eval the
results, plots and page under bench/results/eval, --pictures the frames that README and card show,
--tables the measured tables of docs/training.md.
The card is written in each case, from what then lies in the package.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage_hello.tools import eval_page, model_card, training_tables
from mirage_hello.tools.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "plots" / "styles.png"
RESULTS = ROOT / "bench" / "results"
NAME = "tiny"
MOST_BYTES = 24_000_000  # of the weights: they lie in the repository
RATES = {"autoencoder": "autoencoder_lr", "video": "lr", "distill": "distill_lr"}
# Settings of a run that say nothing about the weights.
ASIDE = (
    "minutes", "shares", "log_every", "checkpoint_every", "keep", "sample_every", "sample_frames",
    "autoencoder", "start", "seed", "autoencoder_steps", "video_steps", "distill_steps",
)  # fmt: skip


def stages(folder: Path, gpus: int) -> list[dict[str, Any]]:
    """What a run's journal says of each stage that it trained.

    Seconds are those of the logged steps: a step's mean time in the journal, times the steps.

    Raises:
        BadInput: the folder has no config.json, or no metrics.jsonl with a step.
    """
    from mirage_hello.model.training.config import as_dict, preset
    from mirage_hello.model.training.journal import read

    config, rows = model_card.read(folder / "config.json"), read(folder)
    if not rows:
        raise BadInput(f"publish: {folder} has no metrics.jsonl with a step; give a run's folder")
    usual, found = as_dict(preset("shipped")), []
    for name in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == name]
        first, last = mine[0], mine[-1]
        steps = last["step"] + 1 - max(0, first["step"] + 1 - config["log_every"])
        apart = last["step"] - first["step"]
        each = (last["elapsed_s"] - first["elapsed_s"]) / apart if apart else 0.0
        changed = {k: v for k, v in config.items() if usual.get(k) != v and k not in ASIDE}
        # Where files lay on the machine that trained is nobody's business.
        files = ("autoencoder", "start", "video")
        names = {k: Path(config[k]).name for k in files if config.get(k)}
        found.append({
            "stage": name, "steps": steps, "seconds": round(each * steps, 1), "gpus": gpus,
            "batch": config["autoencoder_batch" if name == "autoencoder" else "batch"] * gpus,
            "lr": config[RATES[name]], "changed": changed, "settings": config | names,
        })  # fmt: skip
    return found


def ship(checkpoint: Path, runs: Sequence[str], began_with: Path | None = None) -> Path:
    """Put a checkpoint into the package in bfloat16, with its checksum and record.

    Args:
        began_with: the record (JSON) of the weights that the first run began with, which goes
            before those of the runs.
    """
    import torch

    from mirage_hello.model import shipped
    from mirage_hello.model.checkpoint import load, save

    record = [stage for run in runs for stage in stages(*folder_and_gpus(run))]
    if began_with is not None:
        record = model_card.read(began_with).get("training", []) + record
    if not runs:
        raise BadInput("publish: --checkpoint needs --run, the folders that trained it")
    try:
        denoiser, autoencoder = load(checkpoint, torch.bfloat16)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"publish: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / "half.safetensors"
        save(half, denoiser, autoencoder, notes={"training": json.dumps(record)})
        if half.stat().st_size > MOST_BYTES:
            raise BadInput(
                f"publish: {checkpoint} has {half.stat().st_size:,} bytes in bfloat16, more than "
                f"the {MOST_BYTES:,} that ship; give a smaller model"
            )
        file = shipped.ship(half, NAME)
    about = {
        **json.loads(file.with_suffix(".json").read_text()),
        "parameters": {
            "unet": sum(p.numel() for p in denoiser.parameters()),
            "autoencoder": sum(p.numel() for p in autoencoder.parameters()),
        },
        "training": record,
    }
    file.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    return file


def folder_and_gpus(text: str) -> tuple[Path, int]:
    """FOLDER or FOLDER:GPUS."""
    folder, colon, gpus = text.rpartition(":")
    if colon and gpus.isdecimal() and int(gpus) > 0:
        return Path(folder), int(gpus)
    return Path(text), 1


def publish_results(source: Path) -> Path:
    """Put an evaluation, its pictures and its page in the place of the last one."""
    result = eval_page.read(source)
    target = RESULTS / "eval" / f"{NAME}.json"
    candidates = (*result["models"].values(), *result["ablations"].values())
    names = [name for model in candidates for name in model["strips"].values() if name]
    lost = [name for name in names if not (source.parent / name).is_file()]
    if lost:
        raise BadInput(f"publish: {source} names {lost[0]}, which is not beside it; copy it there")
    if source.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{NAME}*"):
            old.unlink()
        for name in names:
            shutil.copy(source.parent / name, target.parent)
        target.write_text(json.dumps(result | {"name": NAME}, indent=1) + "\n")
    eval_page.write(target)
    return target


def draw_pictures(frames: int) -> Path:
    """The shipped clip and what the shipped model makes of it in each style, at 512 x 512."""
    from mirage_hello.tools import cli, demo
    from mirage_hello.tools.demo_sheet import write_sheet

    clip = demo.SHIPPED_CLIP
    with tempfile.TemporaryDirectory() as folder:
        videos = [demo.video(clip, Path(folder), style) for style in demo.styles()]
        for style, video in zip(demo.styles(), videos, strict=True):
            words = ["run", str(clip), "-o", str(video), "--style", style, "--device", "cpu"]
            if cli.main([*words, "--max-frames", str(frames)]):
                raise BadInput(f"publish: the clip could not be drawn as {style}")
        write_sheet(PICTURE, [clip, *videos])
    return PICTURE


def write_card() -> Path:
    """The model card, from the record, the results and every benchmark of this model's frame."""
    from mirage_hello.model import shipped

    path = shipped.FOLDER / "README.md"
    path.write_text(card_text())
    return path


def card_text() -> str:
    from mirage_hello.model import shipped

    record = model_card.read(shipped.FOLDER / f"{NAME}.json")
    if "training" not in record:
        raise BadInput(
            f"publish: {NAME}.json says nothing of its training; give --checkpoint, --run"
        )
    result = model_card.read(RESULTS / "eval" / f"{NAME}.json")
    folders = sorted(f for f in RESULTS.iterdir() if f.is_dir() and f.name != "eval")
    runs = [model_card.read(path) for f in folders for path in sorted(f.glob("*.json"))]
    return model_card.card(NAME, record, result, [run for run in runs if "rows" in run])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="the model that ships")
    parser.add_argument(
        "--run", nargs="+", default=[], metavar="FOLDER[:GPUS]",
        help="folders of the runs that trained it, in order, with config.json and metrics.jsonl",
    )  # fmt: skip
    parser.add_argument(
        "--began-with", type=Path, metavar="RECORD.json",
        help="of the weights that the first of the runs began with (start=), as shipped with them",
    )  # fmt: skip
    parser.add_argument("--eval", type=Path, help="its results, with the pictures beside them")
    parser.add_argument(
        "--pictures", type=int, nargs="?", const=60, metavar="FRAMES",
        help="draw the frames of README and card (default: 60 of the clip)",
    )  # fmt: skip
    parser.add_argument("--tables", action="store_true", help="make those of docs/training.md")
    arguments = parser.parse_args(argv)
    try:
        if arguments.checkpoint:
            print(ship(arguments.checkpoint, arguments.run, arguments.began_with))
        if arguments.eval:
            print(publish_results(arguments.eval))
        if arguments.pictures:
            print(draw_pictures(arguments.pictures))
        if arguments.tables:
            print(training_tables.write())
        print(write_card())
    except BadInput as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
