"""Stage 3: one student for one and for two steps, from the video model at eight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.samplers import Level, euler
from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.optimise import autocast
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.video_stage import Batch, StyledDenoiser, VideoStage


class DistillStage(VideoStage):
    """The student learns, from each noise, the frame that the teacher's ODE ends at.

    loss = |S(x0; s0) - y|^2 + |S(x1; s1) - y|^2 + w (the same against the true frame),
    with x0 = s0 noise, y the teacher's result after `teacher_steps` Euler steps from x0, and x1 the
    student's own first step from s0 to s1, without gradient: what it meets at run time.

    Source: the direct regression of Luhman and Luhman, "Knowledge Distillation in Iterative
    Generative Models", 2021; the true frame's term is ours, and keeps a student's closed loop
    from inheriting the teacher's errors.
    """

    name = "distill"

    def __init__(
        self, config: TrainConfig, denoiser: Denoiser, autoencoder: Autoencoder, workers: Workers
    ) -> None:
        teacher = copy.deepcopy(denoiser).to(workers.device).eval().requires_grad_(False)
        self.teacher = StyledDenoiser(teacher)
        super().__init__(config, denoiser, autoencoder, workers)
        self.steps = config.distill_steps
        self.optimiser.lr = config.distill_lr
        self.generator = workers.generator(config.seed, 3)

    def step(self, number: int, progress: float) -> dict[str, Tensor]:
        """One optimiser step, then one frame of every live stream (by the student)."""
        config, device = self.config, self.workers.device
        batch = self.next_batch(number, 1.0)
        sigmas = self.denoiser.sigmas(2)
        noise = torch.randn(batch.target.shape, generator=self.generator, device=device)
        x = sigmas[0] * noise
        self.batch = {"x": x, **vars(batch)}
        with torch.no_grad():
            goal = self.teach(x, batch)
        first = self.student(x, sigmas[0], batch)
        with torch.no_grad():
            x = x + (sigmas[1] - sigmas[0]) * (x - first) / sigmas[0]
        second = self.student(x, sigmas[1], batch)
        loss, error = torch.zeros((), device=device), torch.zeros((), device=device)
        for student in (first, second):
            to_teacher = (student - goal).square().mean()
            to_truth = (student - batch.target).square().mean()
            loss = loss + to_teacher + config.truth_weight * to_truth
            error = error + 0.5 * to_teacher.detach()
        loss = loss / self.denoiser.config.sigma_data**2
        norm = self.optimiser.step(loss, progress)
        metrics = {"loss": loss.detach(), "error": error, "norm": norm}
        if self.streams:
            metrics["rollout_error"] = self.roll(batch, 1 + number % 2)
        return metrics

    def teach(self, x: Tensor, batch: Batch) -> Tensor:
        """The teacher's frame from x by Euler steps."""

        def denoise(x: Tensor, sigma: Level, step: int) -> Tensor:
            levels = torch.full((len(x),), float(sigma), device=x.device)
            with autocast(self.config, x.device):
                return self.teacher(x, levels, batch.inputs, batch.styles, batch.level).float()

        return euler(denoise, x, self.denoiser.sigmas(self.config.teacher_steps))

    def student(self, x: Tensor, sigma: float, batch: Batch) -> Tensor:
        """S(x; sigma), with gradient."""
        levels = torch.full((len(x),), float(sigma), device=x.device)
        with autocast(self.config, x.device):
            return self.module(x, levels, batch.inputs, batch.styles, batch.level).float()

    def state_dict(self) -> dict:
        teacher = {k: v.detach() for k, v in self.teacher.denoiser.state_dict().items()}
        return {**super().state_dict(), "teacher": teacher}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.teacher.denoiser.load_state_dict(state["teacher"])
