"""AdamW with warm-up and cosine decay, gradient clipping, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mirage_hello.model.training.config import TrainConfig
from mirage_hello.model.training.parallel import local, placed

FINAL_LR = 0.05  # of the peak, at the end of a stage
BETAS = (0.9, 0.99)


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


class Optimiser:
    """One step: backward, clip, AdamW, average.

    The average's decay starts low, min(ema, (1 + n) / (10 + n)), so that short runs have one too.

    Args:
        module: whose parameters; sharded (FSDP) and plain ones alike.
        lr: the peak.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, lr: float) -> None:
        self.config, self.lr = config, lr
        self.count, self.origin = 0, 0  # steps so far, and the one at which the moments began
        self.names = [
            n.removeprefix("module.") for n, p in module.named_parameters() if p.requires_grad
        ]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        # Gains, biases and tables decay toward nothing meaningful: only matrices are decayed.
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        self.adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=BETAS,
            fused=self.parameters[0].device.type == "cuda",
        )
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, loss: Tensor, progress: float) -> Tensor:
        """Returns the gradient's norm before clipping, on the device."""
        rate = learning_rate(self.lr, self.count - self.origin, self.config.warmup, progress)
        for group in self.adam.param_groups:
            group["lr"] = rate
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        decay = min(self.config.ema, (1 + self.count) / (10 + self.count))
        with torch.no_grad():
            now = [local(p.detach()) for p in self.parameters]
            torch._foreach_lerp_([local(a) for a in self.average], now, 1 - decay)
        self.count += 1
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def use_average(self) -> None:
        """The average becomes the weights."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the weights are the average."""
        kept = [p.detach().clone() for p in self.parameters]
        self.use_average()
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
            own = self.adam.state.get(self.parameters[i], {})
            state[name] = {
                "weight": self.parameters[i].detach(),
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
            saved, parameter = state[name], self.parameters[i]
            parameter.copy_(placed(saved["weight"], parameter))
            self.average[i].copy_(placed(saved["average"], parameter))
            if saved["exp_avg_sq"] is None:
                self.origin = self.count  # new moments need a new warm-up
                continue
            moments = {"step": torch.tensor(float(self.count))}
            if parameter.device.type == "cuda":
                moments["step"] = moments["step"].to(parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = torch.zeros_like(parameter)
                if saved[key] is not None:
                    moments[key].copy_(placed(saved[key], parameter))
            self.adam.state[parameter] = moments
