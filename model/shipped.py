"""The trained weights in the package: where they lie, whether they are whole, and loading them.

    denoiser, autoencoder = shipped.load("tiny")

`weights/<name>.json` holds size and SHA-256 of `weights/<name>.safetensors`; the model card is
`weights/README.md`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from mirage_hello.model import checkpoint
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.denoiser import Denoiser

FOLDER = Path(__file__).resolve().parent / "weights"


def names() -> list[str]:
    """The presets that have weights here."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def path(name: str) -> Path:
    """The file of a preset's weights, checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not the one that was shipped.
    """
    file = FOLDER / f"{name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights of {name!r} in {FOLDER}; give --checkpoint, or make them with "
            "`mirage train`"
        )
    expected = json.loads(file.with_suffix(".json").read_text())["sha256"]
    found = sha256(file)
    if found != expected:
        raise ValueError(
            f"{file} is damaged: its SHA-256 is {found[:16]}..., expected {expected[:16]}... "
            f"({file.stat().st_size} bytes); install the package again"
        )
    return file


def load(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Denoiser, Autoencoder]:
    """(denoiser, autoencoder) with trained weights; raises as `path` does."""
    return checkpoint.load(path(name), dtype, device)


def sha256(file: Path) -> str:
    """The checksum of a file, hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def ship(source: Path, name: str) -> Path:
    """Copy a checkpoint into the package, with its checksum beside it."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.safetensors"
    file.write_bytes(source.read_bytes())
    about = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    file.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    return file
