"""FrameStream: push(input frame) -> output frame, at constant memory and constant work per frame.

A frame (`frame.frame`) of one size is a plan: recorded once, on a GPU captured as a CUDA graph and
replayed. What may change between two frames is copied into tensors that the graph reads, so nothing
is captured again and nothing is ignored. Across the bus go the frame in and the frame out, nothing
else; `submit` and `collect`, or `run`, let them travel while the neighbours are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.bus import IN_FLIGHT
from mirage_hello.model.controls import Controls
from mirage_hello.model.deltas import Deltas
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.frame_buffers import check_frame
from mirage_hello.model.own_stream import OwnStream
from mirage_hello.model.plans import Plans
from mirage_hello.model.samplers import NOISE_CORRELATION, Sampler, euler, one_step
from mirage_hello.model.settings import Settings, prepare


class FrameStream(Plans):
    """One stream of frames through a model; not shared between streams, safe between threads.

    Args:
        denoiser, autoencoder: moved to `device` and `dtype` in place.
        steps: evaluations of the U-Net a frame.
        sampler: of `samplers`; default `one_step` for 1 step, `euler` for more.
        size: (height, width) in pixels, to build at once; otherwise the first frame's. Any size:
            it is padded to multiples of 8 by repeating the edge, and cropped back.
        dtype, device: default: the model's.
        policy: which kernels (see `kernels.use`); None: what the scope of `push` says.
        graph: make a plan with a CUDA graph; default: on CUDA.
        arena: whether the plan places the kernels' buffers (see `Plan`).
        seed: of the noise. The same seed, frames and settings give the same output.
        strength: in (0, 1]. 1 starts from pure noise; less starts from the input frame with less
            noise (Meng et al., "SDEdit", 2022), so that more of it is kept.
        history_noise: sigma of the noise on the memory, told to the model.
        noise_correlation: of neighbouring frames' start noise, from 0 to 1 (`next_noise`): what the
            model invents flickers less.
        context: [L, D] or [1, L, D] conditioning tokens; default: style 0, or zeros.
        guidance: scale of classifier-free guidance, at twice the work; None: off.
        negative: tokens of what the guidance leads away from; default: zeros.
    Attributes:
        trained: False while any weight is random: the pictures mean nothing then.
    Raises:
        ValueError: settings out of range, or the size does not fit into memory (the text names one
        that does).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        *,
        steps: int = 1,
        sampler: Sampler | None = None,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        policy: Any = None,
        graph: bool | None = None,
        arena: bool = True,
        seed: int = 0,
        strength: float = 1.0,
        history_noise: float = 0.02,
        noise_correlation: float = NOISE_CORRELATION,
        context: Tensor | None = None,
        guidance: float | None = None,
        negative: Tensor | None = None,
    ) -> None:
        weight = denoiser.unet.conv_in.weight
        self.dtype = dtype or weight.dtype
        self.device = torch.device(device or weight.device)
        on_cuda = self.device.type == "cuda"
        if graph and not on_cuda:
            raise ValueError(f"FrameStream: graph=True needs a CUDA device (got {self.device})")
        self.denoiser = denoiser.to(self.device, self.dtype).eval()
        self.autoencoder = autoencoder.to(self.device, self.dtype).eval()
        self.steps = steps
        self.sampler = sampler or (one_step if steps == 1 else euler)
        self._own = OwnStream(self.device)
        super().__init__(policy, on_cuda if graph is None else graph, arena)
        self._seed = seed
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._deltas = Deltas(self.denoiser)
        tokens = self._tokens(self._default_context() if context is None else context)
        away = torch.zeros_like(tokens) if negative is None else self._tokens(negative)
        self._controls = Controls(
            strength, history_noise, noise_correlation, guidance, None, tokens, away
        )
        with self._running():
            self._settings = self._prepare(self._controls)
        if size is not None:
            self.prepare(*size)
            self._buffers = self._sizes[size]

    # The frame

    def push(self, frame: np.ndarray | Tensor) -> Any:
        """The output frame for an input frame.

        Args:
            frame: uint8 [H, W, 3], RGB; a NumPy array, or a tensor on the host or the device. One
                in pinned memory is not copied on the host, and must stay until it is collected.
        Returns:
            uint8 [H, W, 3] of the same kind and place, owned by the caller.
        Raises:
            TypeError: not uint8. ValueError: not [H, W, 3], or too large for the memory.
            RuntimeError: submitted frames are not collected yet.
        """
        with self._lock:
            if self.under_way:
                raise RuntimeError(f"push: collect the {self.under_way} submitted frames first")
            self.submit(frame)
            return self.collect()

    def submit(self, frame: np.ndarray | Tensor) -> None:
        """Begin a frame; its upload, work and download are queued, nothing is waited for.

        Raises: as `push`; RuntimeError: two frames are under way and neither is collected.
        """
        check_frame(frame)
        with self._lock:
            if self.under_way >= IN_FLIGHT:
                raise RuntimeError(f"submit: {IN_FLIGHT} frames are under way; collect one first")
            buffers = self._of_size(frame.shape[0], frame.shape[1])
            # A frame in the host's memory owes nothing to what the caller's stream does.
            on_device = isinstance(frame, Tensor) and frame.is_cuda
            with self._running() if on_device else self._own:
                # While the frame is on its way:
                buffers.draw(self._generator, self._controls.noise_correlation)
                slot = buffers.bus.bring(frame)
                if self._planned and buffers.policy is not self._wanted():
                    if buffers.policy is not None:
                        self._change()  # what is made once for all frames is made for a policy
                    self._plan_again(buffers)  # a graph must not silently keep the old kernels
                if buffers.plan is not None:
                    buffers.plan.run()
                else:
                    with torch.no_grad(), self._scope():
                        self._frame(buffers)
                buffers.bus.take(slot, type(frame))

    def push_eagerly(self, frame: np.ndarray | Tensor) -> None:
        """A frame without a plan, launch by launch, for what must look at values; no output."""
        check_frame(frame)
        with self._lock:
            planned, self._planned = self._planned, False
            try:
                buffers = self._of_size(frame.shape[0], frame.shape[1])
            finally:
                self._planned = planned
            with self._running(), self._scope():
                buffers.bus.bring(frame)
                buffers.draw(self._generator, self._controls.noise_correlation)
                self._frame(buffers)

    def collect(self) -> Any:
        """The oldest submitted frame's output, once it is there. RuntimeError: there is none."""
        with self._lock:
            if not self.under_way:
                raise RuntimeError("collect: no frame is under way; submit one first")
            assert self._buffers is not None
            return self._buffers.bus.collect()

    def run(self, frames: Iterable[np.ndarray | Tensor]) -> Iterator[Any]:
        """The output of each frame, in order; a frame is computed while its neighbours travel.

        The output of a frame comes once the next one is submitted: for latency use `push`.
        """
        try:
            for frame in frames:
                if self.under_way and self._is_new(frame):
                    yield from (self.collect() for _ in range(self.under_way))
                self.submit(frame)
                if self.under_way == IN_FLIGHT:
                    yield self.collect()
            while self.under_way:
                yield self.collect()
        finally:
            while self.under_way:  # the caller left early
                self.collect()

    # State

    def cut(self) -> None:
        """Forget the past outputs, as at a scene cut; the noise goes on."""
        with self._lock, self._running():
            if self._buffers is not None:
                self._buffers.memory.reset()

    def reset(self) -> None:
        """Back to the state after construction: empty memory, the seed's first noise."""
        with self._lock:
            self.cut()
            self._generator.manual_seed(self._seed)
            for buffers in self._sizes.values():
                buffers.begun = False

    @property
    def trained(self) -> bool:
        return self.denoiser.trained and self.autoencoder.trained

    def _change(self, **changed: Any) -> None:
        """Bring changed controls to the tensors that a plan reads."""
        with self._lock, self._running():
            controls = replace(self._controls, **changed)  # refuses before anything changes
            settings = self._prepare(controls)
            self._controls = controls
            if not self._settings.take(settings):
                self._settings = settings
                self._sizes = {}
                if self._buffers is not None:
                    self._sizes[self._buffers.size] = self._buffers
                    self._buffers.policy = None  # planned again at the next frame

    def _prepare(self, controls: Controls) -> Settings:
        with self._scope():
            return prepare(self.denoiser, controls, self.steps)

    def _running(self) -> contextlib.AbstractContextManager[None]:
        return self._own.ordered()
