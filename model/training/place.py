"""Where a run is: its models, stage and step, the folder that holds it, and its checkpoints."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_hello.model import checkpoint
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.presets import build
from mirage_hello.model.training import state as states
from mirage_hello.model.training.config import STAGES, TrainConfig, TrainingError, as_dict
from mirage_hello.model.training.journal import Journal
from mirage_hello.model.training.parallel import Workers, whole
from mirage_hello.model.training.samples import write_decoded, write_sample
from mirage_hello.model.unet import VideoUNet


@dataclass
class Options:
    """How to run, apart from what to train: none of these change the result.

    minutes: end this call after so long (0: no limit); compact: also write the small form there;
    profile: write the kernels of a few steps of each stage, by time.
    """

    resume: bool = False
    resume_from: Path | None = None
    minutes: float = 0.0
    device: str | None = None
    tensorboard: bool = False
    compact: Path | None = None
    quiet: bool = False
    profile: bool = False


class Place:
    """One call of `train`: the models, where the run is, and its journal."""

    def __init__(self, config: TrainConfig, out: Path, options: Options) -> None:
        self.config, self.out, self.options = config, out, options
        self.began = time.monotonic()
        self.workers = Workers(config, options.device)
        self.denoiser, self.autoencoder = build(config.model, config.seed)
        self.stage_number, self.step, self.stage_s, self.elapsed_s = 0, 0, 0.0, 0.0
        self.samples = bool(config.sample_every) and not config.video
        if self.samples and importlib.util.find_spec("av") is None:
            self.say("samples are pictures alone: PyAV is not installed (pip install av)")
        self.loaded: dict[str, Any] | None = None
        if options.resume or options.resume_from:
            self.resume()
        elif states.checkpoints(out / "checkpoints"):
            raise TrainingError(
                f"{out} holds a run already; go on with --resume or give another --out"
            )
        else:
            self.begin()
        self.journal: Journal | None = None
        if self.workers.first:
            at = (self.stage_number, self.step) if self.loaded else None
            self.journal = Journal(out, options.tensorboard, at)
            (out / "config.json").write_text(json.dumps(as_dict(config), indent=1) + "\n")

    def begin(self) -> None:
        """Take the weights that the settings name; a run that resumes has its own."""
        if self.config.start:
            self.borrow(Path(self.config.start), "start", ("autoencoder", "denoiser"))
        if self.config.autoencoder:
            self.borrow(Path(self.config.autoencoder), "autoencoder", ("autoencoder",))
            self.autoencoder.trained = True

    def borrow(self, path: Path, setting: str, parts: tuple[str, ...]) -> None:
        """Take the weights of these parts from a checkpoint or from a compact state."""
        try:
            if path.is_dir():
                found = states.load_compact(path)
            else:
                denoiser, autoencoder = checkpoint.load(path)[:2]
                found = {"autoencoder": autoencoder.state_dict(), "denoiser": denoiser.state_dict()}
        except (ValueError, FileNotFoundError) as error:
            raise TrainingError(f"config: {setting}={str(path)!r}: {error}") from error
        for part in parts:
            if part not in found:
                raise TrainingError(f"config: {setting}={str(path)!r}: it has no {part}")
            states.check_shapes(found[part], getattr(self, part), f"{part} of {path}")
            getattr(self, part).load_state_dict(found[part])

    def resume(self) -> None:
        """Take the weights and the place from the newest checkpoint or the compact form."""
        options = self.options
        if options.resume_from:
            where, loaded = str(options.resume_from), states.load_compact(options.resume_from)
        else:
            path, loaded, problems = states.load(self.out / "checkpoints")
            where = f"checkpoint {path}"
            for problem in problems:
                self.say(f"{problem}; an older one is used")
        states.check_shapes(loaded["autoencoder"], self.autoencoder, where)
        self.autoencoder.load_state_dict(loaded["autoencoder"])
        self.autoencoder.trained = loaded["stage"] > 0 or bool(self.config.autoencoder)
        if "denoiser" in loaded:
            states.check_shapes(loaded["denoiser"], self.denoiser, where)
            self.denoiser.load_state_dict(loaded["denoiser"])
        elif self.config.start and (loaded["stage"], loaded["step"]) <= (1, 0):
            # The compact form of the first stage has no denoiser: it was not trained yet.
            self.borrow(Path(self.config.start), "start", ("denoiser",))
        self.stage_number, self.step = loaded["stage"], loaded["step"]
        self.elapsed_s, self.stage_s = loaded["elapsed_s"], loaded["stage_s"]
        self.loaded = loaded
        if self.stage_number < len(STAGES):
            self.say(f"resumed from {where}: {STAGES[self.stage_number]} step {self.step}")

    def say(self, text: str) -> None:
        if self.workers.first and not self.options.quiet:
            print(text, flush=True)

    def unsharded(self) -> Denoiser:
        """The denoiser with whole weights: after FSDP its parameters are shards."""
        weights = whole(self.denoiser.state_dict())
        fresh = Denoiser(VideoUNet(self.denoiser.unet.config), self.denoiser.config)
        fresh.load_state_dict(weights)
        fresh.unet.trained = self.denoiser.unet.trained
        return fresh

    def save(self, stage, finished: bool = False) -> None:
        """A checkpoint of the current place (collective: every rank calls it)."""
        state: dict[str, Any] = {
            "config": json.dumps(as_dict(self.config)),
            "stage": self.stage_number, "step": self.step,
            "elapsed_s": self.elapsed_s, "stage_s": self.stage_s,
            "autoencoder": whole(self.autoencoder.state_dict()),
            "denoiser": whole(self.denoiser.state_dict()),
        }  # fmt: skip
        own = stage.state_dict()
        optimiser, teacher = own.pop("optimiser"), own.pop("teacher", None)
        state["pool"] = own["pool"]
        # At the end of a stage the models are all there is: the next one begins at step 0.
        state["optimiser"] = {"count": 0} if finished else whole(optimiser)
        if not finished:
            state["ranks"] = self.workers.gather(whole(own))
            if teacher is not None:
                state["teacher"] = whole(teacher)
        if not self.workers.first:
            return
        name = STAGES[min(self.stage_number, len(STAGES) - 1)]
        folder = self.out / "checkpoints"
        states.save(folder, self.stage_number, name, self.step, state, self.config.keep)
        if self.options.compact:
            states.save_compact(self.options.compact, state)

    def sample(self, stage) -> None:
        """A closed-loop video of a held-out world with the averaged weights (first rank writes)."""
        path = self.out / "samples" / f"{stage.name}-{self.step:08d}"
        if stage.name == "autoencoder":
            if self.workers.first:
                with stage.optimiser.averaged():
                    write_decoded(path, self.autoencoder, stage.pool.frames)
            return
        with stage.optimiser.averaged():
            denoiser = self.unsharded() if self.workers.ranks > 1 else self.denoiser
            if self.workers.first:
                write_sample(path, denoiser, self.autoencoder, self.config, self.workers.device)

    def export(self) -> None:
        """model.safetensors: what `mirage run --checkpoint` takes."""
        if not self.workers.first:
            return
        notes = {"training": json.dumps(as_dict(self.config)), "seconds": f"{self.elapsed_s:.0f}"}
        path = self.out / "model.safetensors"
        checkpoint.save(path, self.denoiser.cpu(), self.autoencoder.cpu(), notes=notes)
        self.say(f"finished after {self.elapsed_s:.0f} s of training: {path}")
