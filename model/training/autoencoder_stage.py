"""Stage 1: the autoencoder, on single frames of views and styles."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_hello.model.autoencoder import FACTOR, Autoencoder
from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.optimise import Optimiser, autocast, in_half
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.pool import FramePool

LATENT_NOISE = 0.06  # of their deviation: the decoder must bear a diffusion model's errors
LATENT_DECAY = 1e-3  # on mean square above 1: without it their scale wanders
SCALE_BATCHES = 8  # batches over which the latents' deviation is measured at the end
SIGMA_DATA = 0.5
FURTHEST = 7  # pixels, of the moves that the latents must follow: less than one latent
RIM = 2  # latents at the border that a moved frame's loss leaves out: a bicubic sample's reach


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


def translated(images: Tensor, move: Tensor, mode: str) -> Tensor:
    """y(p) = x(p + move), move [B, 2] (x, y) in widths and heights; the border is repeated."""
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrix[:, :, 2] = 2 * move
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode, "border", align_corners=False)


class AutoencoderLoss(nn.Module):
    """frames -> (loss, mean squared error, drift): one forward, so that DDP and FSDP can wrap it.

    The first frames of a batch are moved by whole pixels, which are fractions of a latent: decoding
    the interpolated latents must give the moved frame, and encoding that must give the interpolated
    latents. Without it a move of one pixel changes a latent's content beyond recognition (a
    quarter of its deviation, and interpolation explained none of it), and a video model cannot
    carry details from frame to frame. Source: the first half is EQ-VAE's regulariser (Kouzelis et
    al. 2025) with translations; the second, the encoder's, is what a memory of latents needs.
    """

    def __init__(self, autoencoder: Autoencoder, equivariance: float) -> None:
        super().__init__()
        self.autoencoder, self.equivariance = autoencoder, equivariance

    def encode(self, frames: Tensor) -> Tensor:
        dtype = self.autoencoder.encoder.conv_in.weight.dtype
        return self.autoencoder.encode(frames.to(dtype)).float()

    def forward(
        self, frames: Tensor, noise: Tensor, moves: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """noise: standard normal of the latents' shape; moves: int64 [M, 2] pixels, of frames[:M].

        drift: mean square of encoded(moved) - moved(encoded), over the latents' variance.
        """
        latents = self.encode(frames)
        count, rim = len(moves), min(RIM, latents.shape[3] // 4)
        deviation = latents.detach().std()
        # By numbers of the host: a captured step may not copy a tensor from it.
        move = torch.stack((moves[:, 0] / frames.shape[3], moves[:, 1] / frames.shape[2]), 1)
        target = translated(frames[:count], move, "nearest")
        moved = translated(latents[:count], move, "bicubic")
        noisy = torch.cat((moved, latents[count:])) + LATENT_NOISE * deviation * noise
        dtype = self.autoencoder.encoder.conv_in.weight.dtype
        decoded = self.autoencoder.decode(noisy.to(dtype)).float()
        drift = inner(self.encode(target) - moved, rim).square().mean() / deviation**2
        share = count / len(frames)
        still = pyramid_loss(decoded[count:], frames[count:])
        pixels = rim * FACTOR
        followed = pyramid_loss(inner(decoded[:count], pixels), inner(target, pixels))
        excess = F.relu(latents.square().mean() - 1)
        loss = (1 - share) * still + share * followed + self.equivariance * drift
        error = (decoded[count:] - frames[count:]).square().mean()
        return loss + LATENT_DECAY * excess, error, drift


def inner(images: Tensor, rim: int) -> Tensor:
    """Without the outer `rim` rows and columns."""
    height, width = images.shape[2:]
    return images[:, :, rim : height - rim, rim : width - rim]


class AutoencoderStage:
    """Trains `autoencoder`; `finish` scales its latents to deviation 0.5."""

    name = "autoencoder"

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, workers: Workers) -> None:
        self.config, self.workers = config, workers
        self.steps = config.autoencoder_steps
        self.autoencoder = autoencoder.to(workers.device).train()
        self.half = in_half(config, workers.ranks)
        module = AutoencoderLoss(self.autoencoder, config.equivariance)
        # Half a million parameters: replicas even where the video model is sharded.
        self.module = module if self.half else workers.wrap(module, "ddp")
        self.optimiser = Optimiser(
            self.module, config, config.autoencoder_lr, self.half, workers.ranks
        )
        self.pool = FramePool(config, workers.device, workers.rank, workers.ranks)
        self.generator = workers.generator(config.seed, 1)
        self.captured = workers.graphs(self.generator, config, self.half)
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
        moves = torch.randint(
            -FURTHEST, FURTHEST + 1, (len(frames) // 2, 2),
            generator=self.generator, device=self.workers.device,
        )  # fmt: skip
        with nullcontext() if self.half else autocast(config, self.workers.device):
            loss, error, drift = self.module(frames, noise, moves)
        norm = self.optimiser.apply(loss)
        # 4: the range [-1, 1] has length 2, and PSNR is for a range of length 1.
        psnr = -10 * (error.detach() / 4).log10()
        metrics = {"loss": loss.detach(), "psnr": psnr, "drift": drift.detach(), "norm": norm}
        return metrics, {"frames": frames, "noise": noise, "moves": moves}

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
