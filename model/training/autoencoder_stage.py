"""Stage 1: the autoencoder, on single frames of views and styles."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.capture import Captured
from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.optimise import Optimiser, alone_in_half, autocast
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.pool import FramePool

LATENT_NOISE = 0.06  # of their deviation: the decoder must bear a diffusion model's errors
LATENT_DECAY = 1e-3  # on mean square above 1: without it their scale wanders
SCALE_BATCHES = 8  # batches over which the latents' deviation is measured at the end
SIGMA_DATA = 0.5


def pyramid_loss(frames: Tensor, target: Tensor, levels: int = 3) -> Tensor:
    """mean |d| + sum over levels of mean |grad d|: colours at one pixel, edges at several scales.

    Args:
        frames, target: [B, 3, H, W] in [-1, 1].
    """
    d = frames - target
    total = d.abs().mean()
    for _ in range(levels):
        across, down = d[..., 1:] - d[..., :-1], d[..., 1:, :] - d[..., :-1, :]
        total = total + 0.5 * (across.abs().mean() + down.abs().mean())
        d = F.avg_pool2d(d, 2)
        total = total + 0.5 * d.abs().mean()
    return total


class AutoencoderLoss(nn.Module):
    """frames -> (loss, mean squared error): one forward, so that DDP and FSDP can wrap it."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """noise: standard normal of the latents' shape."""
        latents = self.autoencoder.encode(frames.to(self.autoencoder.encoder.conv_in.weight.dtype))
        deviation = latents.detach().float().std()
        noisy = latents + LATENT_NOISE * deviation * noise
        decoded = self.autoencoder.decode(noisy.to(latents.dtype)).float()
        excess = F.relu(latents.float().square().mean() - 1)
        loss = pyramid_loss(decoded, frames) + LATENT_DECAY * excess
        return loss, (decoded - frames).square().mean()


class AutoencoderStage:
    """Trains `autoencoder`; `finish` scales its latents to deviation 0.5."""

    name = "autoencoder"

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, workers: Workers) -> None:
        self.config, self.workers = config, workers
        self.steps = config.autoencoder_steps
        self.autoencoder = autoencoder.to(workers.device).train()
        # Half a million parameters: replicas even where the video model is sharded.
        self.module = workers.wrap(AutoencoderLoss(self.autoencoder), "ddp")
        self.half = alone_in_half(config, workers.ranks)
        self.optimiser = Optimiser(self.module, config, config.autoencoder_lr, self.half)
        self.pool = FramePool(config, workers.device, workers.rank, workers.ranks)
        self.generator = workers.generator(config.seed, 1)
        self.captured = Captured(
            workers.device, self.generator, config.graphs and workers.ranks == 1
        )
        self.batch: dict[str, Tensor] = {}

    def start(self) -> None:
        """Render what the first batches need."""
        self.pool.fill()

    def step(self, number: int, progress: float) -> dict[str, Tensor]:
        """One optimiser step; returns the metrics as tensors on the device."""
        if number and number % self.config.autoencoder_refresh_every == 0:
            self.pool.advance()
        self.optimiser.prepare(progress)
        metrics, self.batch = self.captured(number % 2, self.body)
        return metrics

    def body(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(metrics, batch) of one step, on the device alone."""
        config = self.config
        frames = self.pool.sample(config.autoencoder_batch, self.generator)
        side = config.size // 8
        shape = (len(frames), self.autoencoder.config.latent_channels, side, side)
        noise = torch.randn(shape, generator=self.generator, device=self.workers.device)
        with nullcontext() if self.half else autocast(config, self.workers.device):
            loss, error = self.module(frames, noise)
        norm = self.optimiser.apply(loss)
        # 4: the range [-1, 1] has length 2, and PSNR is for a range of length 1.
        psnr = -10 * (error.detach() / 4).log10()
        return {"loss": loss.detach(), "psnr": psnr, "norm": norm}, {
            "frames": frames,
            "noise": noise,
        }

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the averaged weights; scale the latents to the deviation the denoiser expects."""
        self.optimiser.use_average()
        squares = []
        for _ in range(SCALE_BATCHES):
            frames = self.pool.sample(self.config.autoencoder_batch, self.generator)
            squares.append(self.autoencoder.encode(frames).float().square().mean())
        deviation = self.workers.mean(torch.stack(squares).mean()).sqrt()
        self.autoencoder.rescale_latents(float(deviation) / SIGMA_DATA)
        self.autoencoder.eval()
        self.autoencoder.trained = True

    def state_dict(self) -> dict:
        return {
            "optimiser": self.optimiser.state_dict(),
            "pool": self.pool.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.pool.load_state_dict(state["pool"])
        if "generator" in state:  # a compact state has none: a warm restart
            self.generator.set_state(state["generator"])
        else:
            self.generator.manual_seed(self.config.seed + state["step"])
