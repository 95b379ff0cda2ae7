"""Stage 2: the video model, on windows of true frames and on streams of its own outputs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.memory import LATENT_LIMIT
from mirage_hello.model.samplers import Level, euler, next_noise
from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.history import ErrorBank, augmented, true_memory
from mirage_hello.model.training.optimise import Optimiser, autocast, in_half
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.pool import ClipPool
from mirage_hello.model.training.streams import LiveStreams

RUN_NOISE = 0.05  # of roll-outs; above FrameStream's default, 0.02, so that it is on the safe side


@dataclass
class Batch:
    """One batch of latents.

    inputs [B, C + (K + 1) C, h, w]: input view, then the memory as the network sees it; level [B];
    styles int64 [B]; target [B, C, h, w]: the true next frame; details float32 [B]: how much the
    sample is held to it point by point, and not only to its means.
    """

    inputs: Tensor
    level: Tensor
    styles: Tensor
    target: Tensor
    details: Tensor


class StyledDenoiser(nn.Module):
    """D(x; sigma) with the tokens of each sample's style: one forward, for DDP and FSDP to wrap."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, x: Tensor, sigma: Tensor, inputs: Tensor, styles: Tensor, level: Tensor
    ) -> Tensor:
        context = self.denoiser.unet.style_table[styles]
        return self.denoiser(x, sigma, inputs, context, level)


class VideoStage:
    """Trains `denoiser` on the latents of a finished autoencoder."""

    name = "video"

    def __init__(
        self, config: TrainConfig, denoiser: Denoiser, autoencoder: Autoencoder, workers: Workers
    ) -> None:
        self.config, self.workers = config, workers
        self.steps, self.lr = config.video_steps, config.lr
        device = workers.device
        self.autoencoder = autoencoder.to(device).eval().requires_grad_(False)
        self.denoiser = denoiser.to(device).train()
        self.denoiser.unet.gradient_checkpointing = config.gradient_checkpointing
        self.history = denoiser.unet.config.history
        self.channels = denoiser.unet.config.latent_channels
        if config.compile:
            self.denoiser.unet.compile(dynamic=False)
        self.half = in_half(config, workers.ranks)
        module = StyledDenoiser(self.denoiser)
        self.module = module if self.half else workers.wrap(module, config.parallel)
        self.optimiser = Optimiser(self.module, config, self.lr, self.half, workers.ranks)
        self.pool = ClipPool(
            config, self.encode, self.channels, device, workers.rank, workers.ranks
        )
        self.generator = workers.generator(config.seed, 2)
        live = round(config.live_share * config.batch)
        self.streams = LiveStreams(live, self.pool, self.history) if live else None
        self.bank = ErrorBank(config.bank_size, self.pool.sinks[:1].float())
        self.longest = torch.zeros((), dtype=torch.int64, device=device)  # live stream, in frames
        self.captured = workers.graphs(self.generator, config, self.half)
        self.batch: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        with autocast(self.config, self.workers.device):
            return self.autoencoder.encode(frames).float().clamp(-LATENT_LIMIT, LATENT_LIMIT)

    def start(self) -> None:
        """Render the pool."""
        self.pool.fill()

    def prepare(self, number: int, progress: float) -> None:
        """What a step needs from the host: new clips, the longest stream, the rate."""
        config = self.config
        if number and number % config.refresh_every == 0:
            replaced = self.pool.advance()
            if self.streams:
                self.streams.lose(replaced)
        self.pool.render_until((number % config.refresh_every + 1) / config.refresh_every)
        spans = config.rollouts
        self.longest.fill_(spans[min(len(spans) - 1, int(progress * len(spans)))])
        self.optimiser.prepare(progress)

    def next_batch(self) -> Batch:
        """Half windows of true frames with augmented history, half live streams."""
        config, pool, generator = self.config, self.pool, self.generator
        live = self.streams.count if self.streams else 0
        count, device = config.batch - live, self.workers.device
        n, frames = pool.targets.shape[:2]
        clip = torch.randint(n, (count,), generator=generator, device=device)
        time = torch.randint(frames, (count,), generator=generator, device=device)
        old_sink = torch.rand(count, generator=generator, device=device) < 0.7
        memory = true_memory(pool, clip, time, self.history, old_sink).float()
        details = torch.ones(count, device=device)
        if self.streams:
            self.streams.retire(self.longest, generator)
            own_details = self.streams.held_to_details(config.detail_frames)
            details = torch.cat((details, own_details))
            held, clip_live, time_live = self.streams.read()
            memory = torch.cat((memory, held))
            clip, time = torch.cat((clip, clip_live)), torch.cat((time, time_live))
        kept = ~self.chosen(len(clip), config.history_dropout if config.history else 1.0)
        memory = memory * kept[:, None, None, None]
        details = torch.where(kept, details, 1.0)
        own = torch.arange(len(clip), device=device) >= count
        memory, level = augmented(memory, own, self.bank, config, generator)
        inputs = torch.cat((pool.views[clip, time].float(), memory), 1)
        target = pool.targets[clip, time].float()
        return Batch(self.laid_out(inputs), level, pool.styles[clip], target, details)

    def chosen(self, count: int, share: float) -> Tensor:
        """bool [count], each True with this probability."""
        device = self.workers.device
        return torch.rand(count, generator=self.generator, device=device) < share

    def noised(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """x = (1 - sigma / sigma_max) target + sigma noise, with ln sigma normal; and that sigma.

        At run time the first x is pure noise, while target + sigma_max noise still holds a tenth
        of the frame's colours: a model that relies on it loses them when it runs. With this path
        the start holds nothing, and an Euler step from any point of it, (s'/s) x + (1 - s'/s) D,
        lands on it again wherever D is right: the second of two steps sees what it was trained
        on, (1 - s'/s_max) D + s' noise. A share of the samples sits at the start itself.
        """
        config, generator = self.config, self.generator
        limits, batch, device = self.denoiser.config, len(target), target.device
        sigma = torch.randn(batch, generator=generator, device=device)
        sigma = (config.sigma_mean + config.sigma_deviation * sigma).exp()
        sigma = sigma.clamp(limits.sigma_min, limits.sigma_max)
        start = torch.rand(batch, generator=generator, device=device) < config.start_share
        sigma = sigma.masked_fill(start, limits.sigma_max)
        noise = self.noise_of(target)
        kept = 1 - sigma / limits.sigma_max
        return kept[:, None, None, None] * target + sigma[:, None, None, None] * noise, sigma

    def step(self, number: int, progress: float) -> dict[str, Tensor]:
        """One optimiser step, then one frame of every live stream."""
        self.prepare(number, progress)
        rolls = 1 + number % 2
        metrics, self.batch = self.captured(rolls, partial(self.body, rolls))
        return metrics

    def body(self, rolls: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(metrics, batch) of one step, on the device alone; `rolls`: evaluations of a stream."""
        batch = self.next_batch()
        x, sigma = self.noised(batch.target)
        denoised = self.evaluate(self.module, x, sigma, batch)
        data = self.denoiser.config.sigma_data
        weight = (sigma**2 + data**2) / (sigma * data) ** 2  # Karras et al. 2022, table 1
        error = self.error(denoised, batch)
        loss = (weight * error).mean()
        norm = self.optimiser.apply(loss)
        metrics = {"loss": loss.detach(), "error": error.detach().mean(), "norm": norm}
        if self.streams:
            metrics["rollout_error"] = self.roll(rolls)
        return metrics, {"x": x, "sigma": sigma, **vars(batch)}

    def error(self, denoised: Tensor, batch: Batch) -> Tensor:
        """d mean e^2 + (1 - d) mean (means of e over the frame's quarters)^2, [B], d the details.

        What the input view does not tell, a stream invents; the truth has something else there.
        Held to the truth point by point, the best answer to a memory of own outputs is to forget
        its details. The means keep such a stream from drifting and leave it what it invented.
        """
        e = denoised - batch.target
        coarse = F.adaptive_avg_pool2d(e, 2).square().mean((1, 2, 3))
        return torch.lerp(coarse, e.square().mean((1, 2, 3)), batch.details)

    def laid_out(self, inputs: Tensor) -> Tensor:
        """As the network wants its input channels."""
        dtype = torch.bfloat16 if self.half else torch.float32
        return inputs.to(dtype, memory_format=torch.channels_last)

    def evaluate(self, module: nn.Module, x: Tensor, sigma: Level, batch: Batch) -> Tensor:
        """D(x; sigma) in float32 by the model, its wrapper, or its teacher."""
        if not isinstance(sigma, Tensor):
            sigma = torch.full((len(x),), float(sigma), device=x.device)
        with contextlib.nullcontext() if self.half else autocast(self.config, x.device):
            return module(x, sigma, batch.inputs, batch.styles, batch.level).float()

    def trace(self, module: nn.Module, x: Tensor, batch: Batch, steps: int) -> Tensor:
        """Where `steps` Euler steps from x = sigma_max noise end: [B, C, h, w] float32."""

        def denoise(x: Tensor, sigma: Level, step: int) -> Tensor:
            return self.evaluate(module, x, sigma, batch)

        return euler(denoise, x, self.denoiser.sigmas(steps))

    def noise_of(self, like: Tensor) -> Tensor:
        """Standard normal of that shape [B, C, h, w]; the last ones go on from their streams'."""
        noise = torch.randn(like.shape, generator=self.generator, device=like.device)
        if self.streams:
            own = noise[-self.streams.count :]
            own.copy_(next_noise(self.streams.noise, own, self.config.noise_correlation))
        return noise

    @torch.no_grad()
    def roll(self, steps: int) -> Tensor:
        """Push every live stream one frame; its error goes to the bank. Returns the mean square."""
        assert self.streams is not None
        memory, clip, time = self.streams.read()
        noise = torch.randn(memory.shape, generator=self.generator, device=memory.device)
        memory = memory + RUN_NOISE * noise
        level = torch.full((len(clip),), RUN_NOISE, device=memory.device)
        inputs = self.laid_out(torch.cat((self.pool.views[clip, time].float(), memory), 1))
        details = self.streams.held_to_details(self.config.detail_frames)
        now = Batch(inputs, level, self.pool.styles[clip], memory, details)
        self.streams.noise.copy_(self.noise_of(self.streams.noise))
        start = self.denoiser.config.sigma_max * self.streams.noise
        outputs = self.trace(self.module, start, now, steps)
        errors = self.streams.push(outputs)
        # Four a step: the bank then spans the last bank_size / 4 steps, not the last three.
        # An invention is no error.
        self.bank.add((errors * details[:, None, None, None])[:: max(1, len(errors) // 4)])
        return errors.square().mean()

    def finish(self) -> None:
        """Keep the averaged weights."""
        self.optimiser.use_average()
        self.denoiser.eval()
        self.denoiser.unet.trained = True

    def state_dict(self) -> dict:
        return {
            "optimiser": self.optimiser.state_dict(),
            "pool": self.pool.state_dict(),
            "generator": self.generator.get_state(),
            "streams": self.streams.state_dict() if self.streams else None,
            "bank": self.bank.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.pool.load_state_dict(state["pool"])
        if "generator" not in state:  # a compact state: a warm restart with new streams
            self.generator.manual_seed(self.config.seed + state["step"])
            return
        self.generator.set_state(state["generator"])
        self.bank.load_state_dict(state["bank"])
        if self.streams:
            self.streams.load_state_dict(state["streams"])
