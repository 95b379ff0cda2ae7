"""From a run's compact state to a checkpoint that `mirage run` takes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mirage_hello.model import checkpoint
from mirage_hello.model.presets import build
from mirage_hello.model.training.config import STAGES, TrainConfig, TrainingError, as_dict
from mirage_hello.model.training.state import check_shapes, load_compact


def export(
    folder: Path, config: TrainConfig, path: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the averaged weights of a compact state as one safetensors file.

    Raises:
        TrainingError: no compact state there, one of another model, or one without a video model.
    """
    state = load_compact(folder)
    denoiser, autoencoder = build(config.model, config.seed)
    if "denoiser" not in state:
        raise TrainingError(f"{folder} is of the autoencoder stage: it has no video model yet")
    for part, module in (("denoiser", denoiser), ("autoencoder", autoencoder)):
        check_shapes(state[part], module, str(folder))
        module.load_state_dict(state[part])
    stage = STAGES[min(state["stage"], len(STAGES) - 1)]
    notes = {
        "training": json.dumps(as_dict(config)),
        "seconds": f"{state['elapsed_s']:.0f}",
        "stage": f"{stage} step {state['step']}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, denoiser.to(dtype), autoencoder.to(dtype), notes=notes)
