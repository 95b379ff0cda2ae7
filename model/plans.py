"""The plans of a stream: one a size of frames, each made for a policy of kernels."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.kernels import Policy, policy, use
from mirage_hello.kernels.policy import current
from mirage_hello.model import budget
from mirage_hello.model.controls import LiveControls
from mirage_hello.model.frame import frame as run_frame
from mirage_hello.model.frame_buffers import FrameBuffers
from mirage_hello.model.own_stream import OwnStream
from mirage_hello.model.plan import Plan, Record, recorded
from mirage_hello.model.samplers import Sampler
from mirage_hello.model.settings import Settings

SIZES = 2  # plans kept: the one in use, and one that was used before or prepared


class Plans(LiveControls):
    """The part of a stream that makes plans, keeps them and chooses one.

    Args:
        policy: which kernels; None: what the scope of `push` says.
        planned: False: a frame runs launch by launch.
        arena: see `Plan`.
    """

    sampler: Sampler
    _own: OwnStream
    _settings: Settings

    def __init__(self, policy: Any, planned: bool, arena: bool) -> None:
        self.policy = policy
        self._planned, self._arena = planned, arena
        self._lock, self._building = threading.RLock(), threading.RLock()
        self._sizes: dict[tuple[int, int], FrameBuffers] = {}  # the last is the latest used
        self._buffers: FrameBuffers | None = None

    @property
    def policy(self) -> Any:
        """The kernel policy; None: that of the scope in which `push` is called."""
        return self._policy

    @policy.setter
    def policy(self, value: Any) -> None:
        # Unknown names are refused now, not at the next frame.
        self._chosen = None if value is None else policy(value)
        self._policy = value

    @property
    def under_way(self) -> int:
        """Frames submitted and not collected."""
        return 0 if self._buffers is None else self._buffers.bus.under_way

    @abstractmethod
    def cut(self) -> None:
        """Forget the past outputs."""

    def prepare(self, height: int, width: int) -> None:
        """Build the plan of a size ahead, also while another thread pushes frames of another size;
        the first frame of the new size then finds it ready.

        Raises: ValueError: it does not fit into memory. What else a build raises; the plan in use
        goes on.
        """
        with self._building:
            if (height, width) in self._sizes:
                return
            model = budget.of(self.denoiser, self.autoencoder)
            while len(self._sizes) >= SIZES:  # make room first
                del self._sizes[next(s for s in self._sizes if self._sizes[s] is not self._buffers)]
            batch = 1 if self.guidance is None else 2
            size = (height, width)
            budget.check(model, size, self.dtype, self.steps, self.device, batch=batch)
            unet = self.denoiser.unet.config
            settings = self._settings
            aside = torch.cuda.Stream(self.device) if self._own.cuda else None
            with self._own.ordered(aside):
                buffers = FrameBuffers.allocate(
                    (height, width), self.steps, unet, self.dtype, self.device, self._own.cuda
                )
                if self._planned:
                    self._make_plan(buffers)
                if aside is not None:  # frames come on another stream and do not wait
                    aside.synchronize()
            if self._settings is not settings:
                buffers.policy = None  # they were replaced meanwhile: planned again at first use
            self._sizes[(height, width)] = buffers

    @property
    def plan(self) -> Plan | None:
        """The plan of the current size; None before the first frame, and without a graph."""
        return None if self._buffers is None else self._buffers.plan

    def record(self) -> Record:
        """Every launch and buffer of a frame of the current size: the plan's, or one run's."""
        with self._lock:
            buffers = self._buffers
            if buffers is None:
                raise RuntimeError("record: the size is not known yet; give size=, or push a frame")
            if buffers.plan is not None:
                return buffers.plan.record
            modules = {"denoiser": self.denoiser, "autoencoder": self.autoencoder}
            with self._running(), self._scope(), buffers.memory.kept():
                self._frame(buffers)  # builds kernels and fills caches
                return recorded(lambda: self._frame(buffers), self.device, modules)

    def _of_size(self, height: int, width: int) -> FrameBuffers:
        size = (height, width)
        if self._buffers is None or self._buffers.size != size:
            if self.under_way:
                raise RuntimeError(
                    f"submit: collect the {self.under_way} frames of the old size first"
                )
            self.prepare(*size)  # while it fails, the old plan stays
            self._buffers = self._sizes[size]
            self.cut()  # a new size starts afresh
        return self._buffers

    def _is_new(self, frame: np.ndarray | Tensor) -> bool:
        return self._buffers is not None and self._buffers.size != tuple(frame.shape[:2])

    def _make_plan(self, buffers: FrameBuffers) -> None:
        modules = {"denoiser": self.denoiser, "autoencoder": self.autoencoder}
        with self._scope():
            buffers.plan = Plan(
                lambda: self._frame(buffers), self.device, modules, arena=self._arena
            )
        buffers.policy = self._wanted()
        buffers.memory.reset()  # the runs that made the plan were no part of the stream

    def _plan_again(self, buffers: FrameBuffers) -> None:
        """Another plan for the same buffers; the memory stays. After a failure the next frame
        tries again."""
        buffers.plan = buffers.policy = None
        with buffers.memory.kept():
            self._make_plan(buffers)

    def _forget_plans(self) -> None:
        for buffers in self._sizes.values():
            buffers.plan = buffers.policy = None

    def _frame(self, buffers: FrameBuffers) -> None:
        run_frame(self.denoiser, self.autoencoder, self.sampler, buffers, self._settings)

    def _wanted(self) -> Policy:
        return self._chosen or current.get()

    def _scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._chosen is None else use(self._chosen)
