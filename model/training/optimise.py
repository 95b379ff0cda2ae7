"""AdamW with warm-up and cosine decay, gradient clipping, and the moving average of the weights.

A replica in bfloat16 (`half`) computes with bfloat16 weights, as at run time, and the optimiser
keeps the float32 ones. Autocast would cast every weight in every evaluation, about 400 launches of
the 2500 of a step, and run all normalisations in float32. Replicas on several devices sum their
float32 gradients in one buffer by one all-reduce, which a CUDA graph can hold; DDP's hooks cannot
be captured without its own warm-up rules, and would reduce the bfloat16 gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.parallel import local, placed

FINAL_LR = 0.05  # of the peak, at the end of a stage
BETAS = (0.9, 0.99)


def in_half(config: TrainConfig, ranks: int) -> bool:
    """Whether weights are bfloat16 copies (see above); FSDP shards float32 ones."""
    return config.precision == "bf16" and (ranks == 1 or config.parallel == "ddp")


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 autocast where the configuration says so; float32 needs none."""
    if config.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def learning_rate(peak: float, step: int, warmup: int, progress: float) -> float:
    """peak min(1, (step + 1) / warmup) (f + (1 - f) (1 + cos(pi progress)) / 2), f = FINAL_LR.

    Args:
        progress: of the stage, in [0, 1].
    """
    ramp = min(1.0, (step + 1) / max(1, warmup))
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * ramp * (FINAL_LR + (1 - FINAL_LR) * wave)


def joined_gradients(weights: list[Tensor]) -> Tensor:
    """Give every weight a gradient of zeros; all of them are views of the tensor returned."""
    buffer = weights[0].new_zeros(sum(w.numel() for w in weights))
    parts = buffer.split([w.numel() for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.as_strided(weight.shape, weight.stride())
    return buffer


class Optimiser:
    """One step: backward, clip, AdamW, average.

    The average's decay starts low, min(ema, (1 + n) / (10 + n)), so that short runs have one too.
    What changes from step to step (rate, decay) is on the device, so that a captured step sees it:
    `prepare` on the host, then `apply`, which a CUDA graph may replay.

    Args:
        module: whose parameters; sharded (FSDP) and plain ones alike.
        lr: the peak.
        half: the module's weights become bfloat16 copies of float32 ones that are kept here.
        ranks: replicas whose gradients are averaged here (with `half`; DDP and FSDP do their own).
    """

    def __init__(
        self, module: nn.Module, config: TrainConfig, lr: float, half: bool = False, ranks: int = 1
    ) -> None:
        self.module, self.config, self.lr, self.ranks = module, config, lr, ranks
        self.count, self.origin = 0, 0  # steps so far, and the one at which the moments began
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.names = [n.removeprefix("module.") for n, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.weights = self.parameters  # in float32
        if half:
            self.weights = [p.detach().clone().requires_grad_() for p in self.parameters]
            self.gradients = joined_gradients(self.weights)
            if ranks > 1:
                self.take_first_weights()
            module.bfloat16()  # in place: the parameters stay the same objects
        # Gains, biases and tables decay toward nothing meaningful: only matrices are decayed.
        matrices = [p for p in self.weights if p.ndim >= 2]
        vectors = [p for p in self.weights if p.ndim < 2]
        device = self.weights[0].device
        self.rate, self.pull = (torch.zeros((), device=device) for _ in range(2))
        on_gpu = device.type == "cuda"
        # A tensor is what a graph reads; sharded weights take a plain number.
        self.rate_on_device = on_gpu and not isinstance(self.weights[0], DTensor)
        self.adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.rate if self.rate_on_device else lr,
            betas=BETAS,
            fused=on_gpu,
            capturable=self.rate_on_device,
        )
        if self.rate_on_device:
            for group in self.adam.param_groups:
                group["lr"] = self.rate  # this very tensor, whatever the constructor made of it
        self.average = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def take_first_weights(self) -> None:
        """Every replica begins with the first one's weights; they travel in the gradients."""
        parts = [w.grad for w in self.weights if w.grad is not None]
        torch._foreach_copy_(parts, self.weights)
        dist.broadcast(self.gradients, 0)
        torch._foreach_copy_(self.weights, parts)
        torch._foreach_copy_(self.parameters, self.weights)
        self.gradients.zero_()

    def step(self, loss: Tensor, progress: float) -> Tensor:
        """`prepare` and `apply`."""
        self.prepare(progress)
        return self.apply(loss)

    def prepare(self, progress: float) -> None:
        """The rate and the average's decay of the next step."""
        rate = learning_rate(self.lr, self.count - self.origin, self.config.warmup, progress)
        self.rate.fill_(rate)
        if not self.rate_on_device:
            for group in self.adam.param_groups:
                group["lr"] = rate
        self.pull.fill_(1 - min(self.config.ema, (1 + self.count) / (10 + self.count)))
        self.count += 1

    def apply(self, loss: Tensor) -> Tensor:
        """Returns the gradient's norm before clipping, on the device."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        half = self.weights is not self.parameters
        if half:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            torch._foreach_copy_([w.grad for w in self.weights if w.grad is not None], grads)
            if self.ranks > 1:
                dist.all_reduce(self.gradients)
                self.gradients /= self.ranks
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm)
        self.adam.step()
        with torch.no_grad():
            now = [local(p.detach()) for p in self.weights]
            average = [local(a) for a in self.average]
            change = torch._foreach_sub(now, average)
            torch._foreach_mul_(change, self.pull)
            torch._foreach_add_(average, change)
            if half:
                torch._foreach_copy_(self.parameters, self.weights)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def use_average(self) -> None:
        """The average becomes the weights, in float32 again."""
        if self.weights is not self.parameters:
            self.module.float()
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the weights are the average."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict:
        """Weights, average and Adam's moments by parameter name (sharded ones as they are)."""
        state: dict[str, Any] = {"count": self.count}
        for i, name in enumerate(self.names):
            own = self.adam.state.get(self.weights[i], {})
            state[name] = {
                "weight": self.weights[i].detach(),
                "average": self.average[i],
                "exp_avg": own.get("exp_avg"),
                "exp_avg_sq": own.get("exp_avg_sq"),
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`. Moments may be missing: they then begin at zero."""
        self.count = state["count"]
        for i, name in enumerate(self.names):
            saved, weight = state[name], self.weights[i]
            weight.copy_(placed(saved["weight"], weight))
            self.parameters[i].copy_(weight)
            self.average[i].copy_(placed(saved["average"], weight))
            if saved["exp_avg_sq"] is None:
                self.origin = self.count  # new moments need a new warm-up
                continue
            moments = {"step": torch.tensor(float(self.count), device=self.rate.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = torch.zeros_like(weight)
                if saved[key] is not None:
                    moments[key].copy_(placed(saved[key], weight))
            self.adam.state[weight] = moments
