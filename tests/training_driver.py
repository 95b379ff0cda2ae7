"""Training runs in processes of their own that a test can kill, starve of disk space, or lose.

They come from a fork server that has imported torch and done nothing else: forked from the test
process itself, they would inherit its thread pools without their threads, and hang.
"""

import multiprocessing
import os
import resource
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mirage_hello.model.autoencoder import AutoencoderConfig
from mirage_hello.model.denoiser import DenoiserConfig
from mirage_hello.model.presets import PRESETS, Preset
from mirage_hello.model.training import Options, TrainConfig, TrainingError, preset, train
from mirage_hello.model.training.config import changed
from mirage_hello.model.training.journal import read as read_metrics
from mirage_hello.model.training.optimise import Optimiser
from mirage_hello.model.training.video_stage import VideoStage
from mirage_hello.model.unet import UNetConfig

QUICK = ("model=minute", "size=16", "clip_frames=4", "autoencoder_steps=2", "distill_steps=1")


def quick(**values) -> TrainConfig:
    """The configuration of a run of seconds."""
    pairs = dict(item.split("=") for item in QUICK)
    return changed(preset("smoke"), {**pairs, **values})


def losses(out: Path) -> dict[tuple[str, int], float]:
    """(stage, step) -> loss, of a run's journal."""
    return {(row["stage"], row["step"]): row["loss"] for row in read_metrics(out)}


def add_minute_model() -> None:
    """The preset "minute": 101 thousand parameters."""
    unet = UNetConfig(
        channels=(16, 16),
        heads=(1, 1),
        transformers=(False, True),
        blocks_per_level=1,
        context_dim=16,
        groups=8,
        styles=8,
        context_tokens=2,
    )
    PRESETS["minute"] = Preset(unet, AutoencoderConfig(channels=(8, 8, 8)), DenoiserConfig())


@dataclass(frozen=True)
class Fault:
    """What happens to a run: its last rank ends without a word at video step `die_at`; files grow
    to at most `file_limit` bytes, as on a full disk."""

    die_at: int = -1
    file_limit: int = 0


@dataclass
class Started:
    """Running processes of one run; `finish` waits and gives exit codes and error texts."""

    processes: list = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)

    def finish(self) -> tuple[list[int], list[str]]:
        for process in self.processes:
            process.join(90)
            if process.is_alive():
                process.kill()
                process.join()
        return [p.exitcode for p in self.processes], [t.read_text() for t in self.texts]


def start(
    config: TrainConfig, out: Path, options: Options, ranks: int = 1, fault: Fault | None = None
) -> Started:
    """Train in `ranks` new processes joined by gloo, as torchrun would start them."""
    port = free_port()
    context, started = multiprocessing.get_context("forkserver"), Started()
    context.set_forkserver_preload(["mirage_hello.model.training"])
    out.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        text = out / f"error-{rank}.txt"
        text.write_text("")
        arguments = (config, out, options, rank, ranks, port, fault or Fault(), text)
        process = context.Process(target=child, args=arguments)
        process.start()
        started.processes.append(process)
        started.texts.append(text)
    return started


def replica(rank, ranks, port, path, config) -> None:
    """Two steps of a layer in half precision on data of this rank's own; saves its weights."""
    address = f"tcp://127.0.0.1:{port}"
    if ranks > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.manual_seed(rank)  # ranks begin with different weights: the first one's count
    layer = nn.Linear(4, 3)
    optimiser = Optimiser(layer, config, 0.1, half=True, ranks=ranks)
    for number in range(2):
        losses = [layer(batch_of(r, number)).square().mean() for r in range(2)]
        loss = losses[rank] if ranks > 1 else (losses[0] + losses[1]) / 2
        optimiser.step(loss, 0.5)
    torch.save(optimiser.weights, path)


def batch_of(rank: int, number: int) -> torch.Tensor:
    return torch.arange(8.0).view(2, 4).bfloat16() * (1 + rank) / 8 - number


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def child(config, out, options, rank, ranks, port, fault, text) -> None:
    """One rank; ends with code 2 and its sentence in `text` where training cannot go on."""
    add_minute_model()
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_limit, fault.file_limit))
    step = VideoStage.step

    def step_or_die(self, number, progress):
        if number == fault.die_at and rank == ranks - 1:
            os._exit(9)
        return step(self, number, progress)

    VideoStage.step = step_or_die
    try:
        train(config, out, options)
    except TrainingError as error:
        text.write_text(str(error))
        os._exit(2)
    os._exit(0)
