"""What may change between two frames, and the part of a stream that changes it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.model import derived, fp8
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.deltas import Delta, Deltas
from mirage_hello.model.denoiser import Denoiser


@dataclass(frozen=True)
class Controls:
    """What a caller sets.

    Args:
        strength: in (0, 1]: how much is redrawn. history_noise: sigma on the memory, 0 to 10.
        noise_correlation: of neighbouring frames' start noise, 0 to 1.
        guidance: None, or the scale of classifier-free guidance (two evaluations in one batch).
        schedule: noise levels, decreasing, the last 0; None: the denoiser's for `strength`.
        context, negative: [1, L, D] tokens, of the picture and of what it is guided away from.
    """

    strength: float
    history_noise: float
    noise_correlation: float
    guidance: float | None
    schedule: tuple[float, ...] | None
    context: Tensor
    negative: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.history_noise <= 10:
            raise ValueError(
                f"FrameStream: history_noise must be from 0 to 10 (got {self.history_noise})"
            )
        if not 0 <= self.noise_correlation <= 1:
            raise ValueError(
                f"FrameStream: noise_correlation must be from 0 to 1 (got {self.noise_correlation})"
            )
        if self.guidance is not None and self.context.shape != self.negative.shape:
            raise ValueError(
                "FrameStream: with guidance the negative context must have the context's shape "
                f"(got {list(self.negative.shape)} and {list(self.context.shape)})"
            )

    def levels(self, denoiser: Denoiser, steps: int) -> list[float]:
        """The steps + 1 noise levels. ValueError: a schedule of another length, or not falling."""
        if self.schedule is None:
            return denoiser.sigmas(steps, self.strength)
        levels = [float(level) for level in self.schedule]
        falling = all(a > b for a, b in itertools.pairwise(levels))
        if len(levels) != steps + 1 or not falling or levels[-1] != 0:
            raise ValueError(
                f"FrameStream: a schedule of {steps} steps is {steps + 1} falling noise levels, "
                f"the last 0 (got {levels}); another number of steps is another stream"
            )
        return levels


class LiveControls(ABC):
    """The controls of a stream; each is effective on the next frame, and none is ignored."""

    denoiser: Denoiser
    autoencoder: Autoencoder
    steps: int
    dtype: torch.dtype
    device: torch.device
    _controls: Controls
    _deltas: Deltas
    _lock: threading.RLock
    _running: Callable[[], contextlib.AbstractContextManager[None]]

    @abstractmethod
    def _forget_plans(self) -> None:
        """Make every plan again at its next frame."""

    @abstractmethod
    def reset(self) -> None:
        """Back to the state after construction."""

    @abstractmethod
    def _change(self, **changed: Any) -> None:
        """Bring changed controls to the tensors that a plan reads."""

    def set_context(self, tokens: Tensor, negative: Tensor | None = None) -> None:
        """Conditioning tokens [L, D] or [1, L, D] from the next frame on; the memory stays.

        Another L means other shapes, so the plan is made again.
        """
        tokens = self._tokens(tokens)
        away = self._controls.negative if negative is None else self._tokens(negative)
        if away.shape != tokens.shape:
            away = torch.zeros_like(tokens)
        self._change(context=tokens, negative=away)

    def set_style(self, index: int) -> None:
        """Switch to a learned style of the model from the next frame on."""
        self.set_context(self.denoiser.unet.style(index))

    @property
    def strength(self) -> float:
        """How much is redrawn, in (0, 1]."""
        return self._controls.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.denoiser.sigmas(self.steps, value)  # refuses a bad value also under a schedule
        self._change(strength=value)

    @property
    def history_noise(self) -> float:
        """Sigma of the noise on the memory, from 0 to 10."""
        return self._controls.history_noise

    @history_noise.setter
    def history_noise(self, value: float) -> None:
        self._change(history_noise=float(value))

    @property
    def noise_correlation(self) -> float:
        """Correlation of the start noise of neighbouring frames, from 0 to 1."""
        return self._controls.noise_correlation

    @noise_correlation.setter
    def noise_correlation(self, value: float) -> None:
        self._change(noise_correlation=float(value))

    @property
    def guidance(self) -> float | None:
        """Scale of classifier-free guidance; None: off. On or off makes the plan again."""
        return self._controls.guidance

    @guidance.setter
    def guidance(self, value: float | None) -> None:
        self._change(guidance=None if value is None else float(value))

    @property
    def schedule(self) -> list[float]:
        """The steps + 1 noise levels; None gives them back to `strength`."""
        return self._controls.levels(self.denoiser, self.steps)

    @schedule.setter
    def schedule(self, levels: Iterable[float] | None) -> None:
        self._change(schedule=None if levels is None else tuple(levels))

    def set_deltas(self, deltas: Mapping[str, Delta], scale: float = 1.0) -> None:
        """Weights W + scale * delta from the next frame on, in the place of earlier deltas.

        Args:
            deltas: name of a parameter of the denoiser -> a tensor of its shape, or a pair
                (up [O, r], down [r, I]) whose product it is. {}: the weights as they were.
        Raises:
            ValueError: unknown name (the text has the nearest), or a shape that does not fit.
        """
        with self._lock:
            self._deltas.check(deltas)
            with self._running():
                self._deltas.apply(deltas, scale)
            self.refresh()

    def refresh(self) -> None:
        """Bring all that is made of weights up to date: call it after changing them in place."""
        with self._lock, self._running():
            derived.remake(self.denoiser)
            derived.remake(self.autoencoder)
        self._change()

    def use_fp8(self, frames: Iterable[np.ndarray | Tensor] | None) -> dict[str, float]:
        """Multiply in e4m3, calibrated on a clip; None: in the model's dtype again.

        Where the hand-written kernels of compute capability 9.0 run; elsewhere nothing changes.
        Returns: the scale of each layer (see `fp8`). The plans are made again.
        """
        with self._lock:
            before = fp8.scales(self.denoiser)
            fp8.use(self.denoiser, {})
            try:
                scales = {} if frames is None else fp8.calibrate(self, frames)
                fp8.use(self.denoiser, scales)
                self._change()  # a prompt is folded for the dtype that it is multiplied in
            except BaseException:
                fp8.use(self.denoiser, before)  # a change that is refused changes nothing
                raise
            self._forget_plans()
            self.reset()
            return scales

    def _default_context(self) -> Tensor:
        config = self.denoiser.unet.config
        if config.styles:
            return self.denoiser.unet.style(0)
        return torch.zeros(1, config.context_tokens, config.context_dim)

    def _tokens(self, tokens: Tensor) -> Tensor:
        width = self.denoiser.unet.config.context_dim
        tokens = tokens if tokens.ndim == 3 else tokens[None]
        if tokens.ndim != 3 or tokens.shape[0] != 1 or tokens.shape[2] != width:
            raise ValueError(
                f"FrameStream: context must be [L, {width}] or [1, L, {width}] "
                f"(got {list(tokens.shape)})"
            )
        return tokens.detach().to(self.device, self.dtype)
