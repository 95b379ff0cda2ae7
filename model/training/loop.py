"""The run: stages in order, each step checked, checkpoints, time limits, and clear ends.

    train(preset("smoke"), Path("out/run"))

A run is a folder: config.json, metrics.jsonl, checkpoints/, samples/, and at the end
model.safetensors. It may be stopped at any moment and goes on with `resume=True`.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mirage_hello.kernels import use
from mirage_hello.model.training import state as states
from mirage_hello.model.training.autoencoder_stage import AutoencoderStage
from mirage_hello.model.training.config import STAGES, TrainConfig, TrainingError
from mirage_hello.model.training.distill_stage import DistillStage
from mirage_hello.model.training.norms import fused_norms
from mirage_hello.model.training.optimise import in_half
from mirage_hello.model.training.place import Options, Place
from mirage_hello.model.training.profile import write_profile
from mirage_hello.model.training.video_stage import VideoStage

SAVE_SECONDS = 10.0  # kept free at the end of a time limit for the checkpoint
TOGETHER = 10  # steps between decisions that depend on the time
SAY_SECONDS = 10.0  # between lines on the terminal; metrics.jsonl has them all
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "NCCL", "Gloo", "gloo")


class Run(Place):
    """The stages, from the current place to the end."""

    said = -math.inf  # when the last line of metrics was shown

    def make_stage(self):
        """The stage at the current number, at the current step."""
        config, workers = self.config, self.workers
        name = STAGES[self.stage_number]
        if name == "autoencoder":
            stage = AutoencoderStage(config, self.autoencoder, workers)
        else:
            kind = VideoStage if name == "video" else DistillStage
            stage = kind(config, self.unsharded(), self.autoencoder, workers)
            self.denoiser = stage.denoiser
        if self.loaded and self.step:
            ranks = self.loaded.get("ranks")
            if ranks is not None and len(ranks) != workers.ranks:
                raise TrainingError(
                    f"the checkpoint was written by {len(ranks)} processes and this run has "
                    f"{workers.ranks}; resume with as many"
                )
            own = ranks[workers.rank] if ranks else {}
            stage.load_state_dict({**own, **self.loaded})
        self.loaded = None
        stage.start()
        return stage

    def run(self) -> bool:
        """All stages from the current place; False where the time of this call ended first."""
        while self.stage_number < len(STAGES):
            name = STAGES[self.stage_number]
            if self.length(name) == 0:
                self.stage_number += 1
                continue
            stage = self.make_stage()
            if not self.run_stage(stage):
                return False
            stage.finish()
            self.stage_number, self.step, self.stage_s = self.stage_number + 1, 0, 0.0
            if name != "autoencoder" and self.workers.ranks > 1:
                self.denoiser = self.unsharded()
            self.save(stage, finished=True)
        self.export()
        return True

    def length(self, name: str) -> int:
        if name == "autoencoder" and self.config.autoencoder:
            return 0
        return getattr(self.config, f"{name}_steps")

    def progress(self, stage) -> float:
        """Of the stage, in [0, 1]: by steps, or by its share of the run's time if that is more."""
        done = self.step / max(1, stage.steps)
        lengths = [self.length(name) for name in STAGES]
        shares = [s if n else 0.0 for s, n in zip(self.config.shares, lengths, strict=True)]
        share = shares[self.stage_number] / (sum(shares) or 1.0)
        limit = 60 * self.config.minutes * share
        return max(done, self.stage_s / limit) if limit else done

    def run_stage(self, stage) -> bool:
        """Steps until the stage is over; False where this call's time is up (state is saved)."""
        config = self.config
        held: list[dict[str, Tensor]] = []
        previous: tuple[Tensor, dict[str, Tensor]] | None = None
        mark, spent = time.monotonic(), 0.0
        while (progress := self.progress(stage)) < 1:
            metrics = stage.step(self.step, progress)
            if previous is not None:
                # One step late, so that the device computes while the host looks at the number.
                self.check(stage, *previous, self.step - 1)
            previous = (metrics["loss"], stage.batch)
            held.append(metrics)
            self.step += 1
            now = time.monotonic()
            spent, mark = spent + now - mark, now
            # Clocks differ between ranks, so what depends on time is decided together.
            if self.workers.ranks == 1 or self.step % TOGETHER == 0:
                spent = self.workers.same(spent)
                self.stage_s, self.elapsed_s = self.stage_s + spent, self.elapsed_s + spent
                spent = 0.0
            if self.step % config.log_every == 0:
                self.log(stage, held)
                held = []
            up = False
            if self.options.minutes and self.step % TOGETHER == 0:
                used = self.workers.same(now - self.began)
                up = used > 60 * self.options.minutes - SAVE_SECONDS
            if up or self.step % config.checkpoint_every == 0:
                self.check(stage, *previous, self.step - 1)
                self.save(stage)
            if self.samples and (up or self.step % config.sample_every == 0):
                self.sample(stage)
            if up:
                self.say(f"time is up at {stage.name} step {self.step}; go on with --resume")
                if self.options.profile:
                    steps = partial(stage.step, self.step + 1, progress)
                    write_profile(self.out / f"profile-{stage.name}.txt", steps)
                return False
        if previous is not None:
            self.check(stage, *previous, self.step - 1)
        if self.samples:
            self.sample(stage)
        return True

    def check(self, stage, loss: Tensor, batch: dict[str, Tensor], step: int) -> None:
        """Stop at a loss that is not finite, with the batch that made it."""
        value = float(loss)
        if math.isfinite(value):
            return
        path = self.out / f"nan-{stage.name}-{step:08d}-rank{self.workers.rank}.pt"
        torch.save({"loss": value, "step": step, **{k: v.cpu() for k, v in batch.items()}}, path)
        older = states.checkpoints(self.out / "checkpoints")
        last = f"the last good checkpoint is {older[-1]}" if older else "no checkpoint was written"
        raise TrainingError(
            f"the loss is {value} at {stage.name} step {step}; its batch is in {path}; {last}; go "
            "on from there with --resume, with a lower lr or clip_norm if it happens again"
        )

    def log(self, stage, held: list[dict[str, Tensor]]) -> None:
        """Means over the last steps, as one line."""
        names = list(held[0])
        stacked = torch.stack([torch.stack([m[n].float() for n in names]) for m in held])
        values = dict(zip(names, stacked.mean(0).tolist(), strict=True))
        if self.journal is None:
            return
        values["elapsed_s"] = self.elapsed_s
        if self.stage_s:  # with several ranks it is shared only now and then
            values["steps_per_s"] = self.step / self.stage_s
        self.journal.write(stage.name, self.step - 1, values)
        if time.monotonic() - self.said < SAY_SECONDS:
            return
        self.said = time.monotonic()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self.say(f"{stage.name} {self.step}  {shown}")


def train(config: TrainConfig, out: Path, options: Options | None = None) -> bool:
    """Run all the stages; True when the run is finished, False when its time ended first.

    Args:
        config: what to train; out: the run's folder; options: how to run.

    Raises:
        TrainingError: one sentence about what is wrong (bad input, a loss that is not finite, a
            full disk, a lost rank, too little memory) and what to do; checkpoints stay whole.
    """
    options = options or Options()
    run = Run(config, out, options)
    try:
        # Kernels with a backward are what training needs; torch's are the registry's only ones
        # that every op has, and a fixed choice keeps a resumed run equal to the killed one.
        own = config.fused and in_half(config, run.workers.ranks)
        with use("torch"), fused_norms(run.workers.device, own):
            return run.run()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory ({str(error).splitlines()[0]}); lower batch, pool_clips or size, "
            "or set gradient_checkpointing"
        ) from error
    except OSError as error:  # of the journal or a sample; checkpoints have a sentence of their own
        if error.errno not in states.NO_SPACE:
            raise
        older = states.checkpoints(out / "checkpoints")
        last = f"the last good checkpoint is {older[-1]}" if older else "no checkpoint was written"
        raise TrainingError(
            f"the disk is full ({error}); {last}; free space and go on with --resume"
        ) from error
    except RuntimeError as error:
        if run.workers.ranks == 1 or not any(word in str(error) for word in LOST):
            raise
        older = states.checkpoints(out / "checkpoints")
        last = f"the last good checkpoint is {older[-1]}" if older else "no checkpoint was written"
        raise TrainingError(
            f"another rank was lost at step {run.step} ({str(error).splitlines()[0][:120]}); "
            f"{last}; start all ranks again with --resume"
        ) from error
    finally:
        if run.journal is not None:
            run.journal.close()
        run.workers.close()
