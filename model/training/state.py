"""Checkpoints of a run: written beside their name and renamed, so that one that exists is whole."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mirage_hello.model.training.config import TrainingError

FORMAT = "mirage-training-3"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PART_BYTES = 15 << 20  # compact parts stay below 16 MiB, a usual limit of what may be sent


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("*.pt") if re.fullmatch(r"\d-[a-z]+-\d{8}\.pt", p.name)]
    return sorted(found)


def save(folder: Path, stage: int, name: str, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `<stage>-<name>-<step>.pt` and remove all but the newest `keep`.

    Raises:
        TrainingError: the disk is full; the older checkpoints are untouched.
    """
    path = folder / f"{stage}-{name}-{step:08d}.pt"
    beside = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        # torch's zip writer reports a failed write as a RuntimeError of its own.
        if not full and "unexpected pos" not in str(error) and "write" not in str(error):
            raise
        older = checkpoints(folder)
        last = f"the last good checkpoint is {older[-1]}" if older else "there is no checkpoint yet"
        raise TrainingError(
            f"checkpoint {path} cannot be written, the disk is full ({error}); {last}; "
            "free space and go on with --resume"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that can be read, and what was wrong with newer ones.

    Raises:
        TrainingError: there is none.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
            problems.append(f"checkpoint {path} cannot be read ({str(e).splitlines()[0]})")
            continue
        if state.get("format") != FORMAT:
            problems.append(f"checkpoint {path} has format {state.get('format')!r}, not {FORMAT!r}")
            continue
        return path, state, problems
    detail = f" ({'; '.join(problems)})" if problems else ""
    raise TrainingError(f"no checkpoint to resume from in {folder}{detail}; start without --resume")


def check_shapes(state: dict[str, Tensor], module: nn.Module, where: str) -> None:
    """One sentence about the first weight that does not fit the module.

    Raises:
        TrainingError: a weight is missing, unknown or has another shape.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise TrainingError(f"{where}: {name} is missing; it belongs to another model")
        if state[name].shape != tensor.shape:
            raise TrainingError(
                f"{where}: {name} has shape {list(state[name].shape)}, this model's has "
                f"{list(tensor.shape)}; resume with the configuration that wrote it"
            )
    extra = [name for name in state if name not in own]
    if extra:
        raise TrainingError(f"{where}: {extra[0]} is not in this model; it belongs to another one")


def parts(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Split into groups of at most PART_BYTES (a larger tensor is a group of its own)."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > PART_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def packed(moment: Tensor) -> tuple[Tensor, Tensor]:
    """v = peak 2^((code - 255) / 8), code in 1..255, and 0 for less than 2^-32 of the peak.

    Returns:
        (codes uint8 of the shape of `moment`, peak float32 [1]).
    """
    peak = moment.float().max().clamp_min(1e-30).reshape(1)
    codes = 255 + 8 * (moment.float() / peak).log2()
    return codes.round().clamp(0, 255).to(torch.uint8).contiguous(), peak


def unpacked(codes: Tensor, peak: Tensor) -> Tensor:
    """The inverse of `packed`, float32."""
    value = peak * torch.exp2((codes.float() - 255) / 8)
    return torch.where(codes > 0, value, torch.zeros_like(value))


def save_compact(folder: Path, state: dict[str, Any]) -> list[Path]:
    """A run as few small files: averaged weights and second moments in bfloat16, no streams.

    10.7 M x (2 + 1) B + 0.7 M x 4 B = 35 MB for `tiny`, against 4 x 10.7 M x 4 B = 171 MB of a
    checkpoint. Second moments are bytes, their logarithm in steps of 9 %. A run that resumes from
    it is a warm restart: its weights are the average, first moments begin at 0.

    Returns:
        the files, compact-0.safetensors and on.
    """
    tensors = {f"autoencoder.{k}": v.contiguous() for k, v in state["autoencoder"].items()}
    optimiser, finished = state["optimiser"], state["step"] == 0
    teacher = state.get("teacher", {})
    for name, saved in optimiser.items():
        if name == "count":
            continue
        tensors[f"average.{name}"] = saved["average"].bfloat16().contiguous()
        # A student has its teacher beside it; its own moments would be one part too many.
        if saved["exp_avg_sq"] is not None and not teacher:
            codes, peak = packed(saved["exp_avg_sq"])
            tensors |= {f"exp_avg_sq.{name}": codes, f"peak.{name}": peak}
    if finished and state["stage"] > 1:
        for name, value in state["denoiser"].items():
            tensors[f"average.denoiser.{name}"] = value.bfloat16().contiguous()
    tensors |= {f"teacher.{k}": v.bfloat16().contiguous() for k, v in teacher.items()}
    meta = {k: state[k] for k in ("stage", "step", "elapsed_s", "stage_s", "config", "pool")}
    meta |= {"count": optimiser["count"], "format": FORMAT}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("compact-*.safetensors"):
        old.unlink()
    paths = []
    for i, group in enumerate(parts(tensors)):
        path = folder / f"compact-{i}.safetensors"
        save_file(group, path, {"run": json.dumps(meta)})
        paths.append(path)
    return paths


def load_compact(folder: Path) -> dict[str, Any]:
    """What `save_compact` wrote, in the form of a checkpoint.

    Raises:
        TrainingError: no such files, or one of them is damaged.
    """
    paths = sorted(folder.glob("compact-*.safetensors"))
    if not paths:
        raise TrainingError(f"no compact-*.safetensors in {folder}; give the folder of --compact")
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    try:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["run"])
                tensors |= {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); copy it again") from error

    def of(prefix: str) -> dict[str, Tensor]:
        return {
            k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)
        }

    average, codes, peaks = of("average."), of("exp_avg_sq."), of("peak.")
    moments = {name: unpacked(codes[name], peaks[name]) for name in codes}
    optimiser: dict[str, Any] = {"count": meta["count"]}
    for name, value in average.items():
        optimiser[name] = {
            "weight": value, "average": value, "exp_avg": None, "exp_avg_sq": moments.get(name),
        }  # fmt: skip
    state = {**meta, "autoencoder": of("autoencoder."), "optimiser": optimiser}
    if denoiser := of("average.denoiser."):
        state["denoiser"] = denoiser
    if teacher := of("teacher."):
        state["teacher"] = teacher
    return state
