"""Stage 3: one student for one and for two steps, from the video model at eight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.parallel import Workers, placed
from mirage_hello.model.training.video_stage import StyledDenoiser, VideoStage


class DistillStage(VideoStage):
    """The student learns, from each noise, the frame that the teacher's ODE ends at.

    loss = |S(x0; s0) - y|^2 + |S(x1; s1) - y|^2 + w (`error` of both, against the true frame),
    with x0 = s0 noise, y the teacher's result after `teacher_steps` Euler steps from x0, and x1 the
    student's own first step from s0 to s1, without gradient: what it meets at run time.

    Source: the direct regression of Luhman and Luhman, "Knowledge Distillation in Iterative
    Generative Models", 2021; the true frame's term is ours, and keeps a student's closed loop
    from inheriting the teacher's errors.

    The stage ends with the mean of the student's and the teacher's weights (`student_share`). One
    step of the teacher is the mean of what is possible: soft, and true to the view. The student
    draws one possibility, and after thousands of frames its edges wander. Between their weights,
    as Wortsman et al. found ("Robust fine-tuning of zero-shot models", 2022), lies more of both
    than between their pictures: see docs/training.md.
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
        self.captured = workers.graphs(self.generator, config, self.half)
        if self.half:
            teacher.bfloat16()

    def body(self, rolls: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(metrics, batch) of one step, on the device alone; the student moves the streams."""
        batch = self.next_batch()
        sigmas = self.denoiser.sigmas(2)
        x = self.denoiser.config.sigma_max * self.noise_of(batch.target)
        kept = {"x": x, **vars(batch)}
        with torch.no_grad():
            goal = self.trace(self.teacher, x, batch, self.config.teacher_steps)
        first = self.evaluate(self.module, x, sigmas[0], batch)
        x = x + (sigmas[1] - sigmas[0]) * (x - first.detach()) / sigmas[0]
        second = self.evaluate(self.module, x, sigmas[1], batch)
        loss, error = torch.zeros_like(goal[0, 0, 0, 0]), torch.zeros_like(goal[0, 0, 0, 0])
        for student in (first, second):
            to_teacher = (student - goal).square().mean()
            to_truth = self.error(student, batch).mean()
            loss = loss + to_teacher + self.config.truth_weight * to_truth
            error = error + 0.5 * to_teacher.detach()
        loss = loss / self.denoiser.config.sigma_data**2
        norm = self.optimiser.apply(loss)
        metrics = {"loss": loss.detach(), "error": error, "norm": norm}
        if self.streams:
            metrics["rollout_error"] = self.roll(rolls)
        return metrics, kept

    def prepare(self, number: int, progress: float) -> None:
        """The student's streams are as long as the teacher's at the end, whatever the progress."""
        super().prepare(number, progress)
        self.longest.fill_(self.config.rollouts[-1])

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the averaged weights' mean with the teacher's."""
        super().finish()
        share, teacher = self.config.student_share, self.teacher.denoiser.state_dict()
        for name, weight in self.denoiser.named_parameters():
            weight.mul_(share).add_(placed(teacher[name].to(weight.dtype), weight), alpha=1 - share)

    def state_dict(self) -> dict:
        teacher = {k: v.detach() for k, v in self.teacher.denoiser.state_dict().items()}
        return {**super().state_dict(), "teacher": teacher}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.teacher.denoiser.load_state_dict(state["teacher"])
