"""Several processes: who am I, how is a module wrapped, and how are states gathered and spread."""

from __future__ import annotations

import os
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mirage_hello.model.capture import Captured
from mirage_hello.model.training.config import TrainConfig


class Workers:
    """The processes of a run, as torchrun started them; one process needs no torchrun.

    Attributes: rank, ranks, device (of this process).
    """

    def __init__(self, config: TrainConfig, device: str | None = None) -> None:
        self.captured: weakref.WeakSet[Captured] = weakref.WeakSet()  # a stage ends with its graphs
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":  # set_device wants a number
            kind = f"cuda:{local}"
        self.device = torch.device(kind)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # cuDNN plans each attention shape anew; flash attention serves all of a small model's.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.ranks > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            # A rank that is lost must end the others with a sentence, not hang them for ever.
            dist.init_process_group(backend, timeout=timedelta(seconds=config.rank_timeout_s))

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def generator(self, seed: int, stage: int) -> torch.Generator:
        """A generator of this rank and stage, on the device."""
        key = (seed * 1_000_003 + self.rank * 8191 + stage * 127 + 11) % (1 << 62)
        return torch.Generator(self.device).manual_seed(key)

    def graphs(self, generator: torch.Generator, config: TrainConfig, half: bool) -> Captured:
        """The graphs of a stage's steps, which `close` lets go; DDP's own hooks want none."""
        made = Captured(self.device, generator, config.graphs and (self.ranks == 1 or half))
        self.captured.add(made)
        return made

    def wrap(self, module: nn.Module, parallel: str) -> nn.Module:
        """DDP (replicas, averaged gradients) or FSDP2 (parameters sharded over the ranks)."""
        if self.ranks == 1:
            return module
        if parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            for parameter in module.parameters():
                parameter.data = parameter.data.contiguous()  # channels-last cannot be sharded
            mesh = init_device_mesh(self.device.type, (self.ranks,))
            # One unit: the blocks' methods (`bias`, `keys_values`) read parameters outside of
            # their forward, and every use lies inside the root's.
            fully_shard(module, mesh=mesh)  # in place
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the ranks."""
        if self.ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.ranks
        return value

    def gather(self, value: Any) -> list[Any]:
        """One object of each rank, on the first rank; [] on the others."""
        if self.ranks == 1:
            return [value]
        found: list[Any] | None = [None] * self.ranks if self.first else None
        dist.gather_object(value, found)
        return found or []

    def same(self, value: float) -> float:
        """The first rank's number, on every rank."""
        if self.ranks == 1:
            return value
        shared = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    def close(self) -> None:
        """Leave the group. NCCL waits for ever for graphs that hold its collectives: they first."""
        for captured in tuple(self.captured):
            captured.release()
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()


def whole(value: Any) -> Any:
    """A state with every sharded tensor gathered and everything on the CPU (a collective)."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return value


def local(value: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def placed(value: Any, like: Tensor) -> Tensor:
    """A whole tensor placed as `like` is: sharded over its mesh, or simply on its device."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)
