"""FrameStream: push(input frame) -> output frame, at constant memory and constant work per frame.

The frame's main path is `_frame`. It touches only buffers that live as long as the size does, so on
a GPU it is captured once as a CUDA graph and replayed; what may change between two frames (context,
strength, noise level) is copied into those buffers. Across the bus go the frame in and the frame
out, nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_hello.kernels import Policy, ops, policy, use
from mirage_hello.kernels.policy import current
from mirage_hello.model import budget
from mirage_hello.model.autoencoder import Autoencoder
from mirage_hello.model.denoiser import Denoiser
from mirage_hello.model.frame_buffers import FrameBuffers, Settings, check_frame, pad, to_host
from mirage_hello.model.samplers import Sampler, euler, one_step

WARM_UP_FRAMES = 2  # builds kernels and lets libraries choose algorithms, outside the capture


class FrameStream:
    """One stream of frames through a model; not shared between streams, safe between threads.

    Args:
        denoiser, autoencoder: moved to `device` and `dtype` in place.
        steps: evaluations of the U-Net a frame.
        sampler: of `samplers`; default `one_step` for 1 step, `euler` for more.
        size: (height, width) in pixels, to build at once; otherwise the first frame's. Any size:
            it is padded to multiples of 8 by repeating the edge, and cropped back.
        dtype, device: default: the model's.
        policy: which kernels (see `kernels.use`); None: what the scope of `push` says.
        graph: capture a CUDA graph; default: on CUDA.
        seed: of the noise. The same seed, frames and settings give the same output.
        strength: in (0, 1]. 1 starts from pure noise; less starts from the input frame with less
            noise (Meng et al., "SDEdit", 2022), so that more of it is kept.
        history_noise: sigma of the noise on the memory, told to the model.
        context: [L, D] or [1, L, D] conditioning tokens; default: style 0, or zeros.
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
        seed: int = 0,
        strength: float = 1.0,
        history_noise: float = 0.05,
        context: Tensor | None = None,
    ) -> None:
        weight = denoiser.unet.conv_in.weight
        self.dtype = dtype or weight.dtype
        self.device = torch.device(device or weight.device)
        if graph and self.device.type != "cuda":
            raise ValueError(f"FrameStream: graph=True needs a CUDA device (got {self.device})")
        self.denoiser = denoiser.to(self.device, self.dtype).eval()
        self.autoencoder = autoencoder.to(self.device, self.dtype).eval()
        self.steps = steps
        self.sampler = sampler or (one_step if steps == 1 else euler)
        self._graph = self.device.type == "cuda" if graph is None else graph
        self._policy = policy
        self._seed = seed
        self._strength = strength
        self._history_noise = _noise_level(history_noise)
        self._context = self._tokens(self._default_context() if context is None else context)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._lock = threading.RLock()
        self._buffers: FrameBuffers | None = None
        self._settings = self._prepare()
        if size is not None:
            self._buffers = self._build(*size)

    # The frame

    def push(self, frame: np.ndarray | Tensor) -> Any:
        """The output frame for an input frame.

        Args:
            frame: uint8 [H, W, 3], RGB; a NumPy array, or a tensor on the host or the device.
        Returns:
            uint8 [H, W, 3] of the same kind and place, owned by the caller.
        Raises:
            TypeError: not uint8. ValueError: not [H, W, 3], or too large for the memory.
        """
        check_frame(frame)
        with self._lock, torch.no_grad(), self._on_device():
            height, width, _ = frame.shape
            buffers = self._buffers
            if buffers is None or buffers.frame_in.shape[1:3] != (height, width):
                self._buffers = None  # free the old ones first
                buffers = self._buffers = self._build(height, width)
            on_device = isinstance(frame, Tensor) and frame.device == buffers.frame_in.device
            if on_device:
                buffers.frame_in[0].copy_(torch.as_tensor(frame))
            else:
                to_host(frame, buffers.host_in[0])
                if buffers.host_in is not buffers.frame_in:
                    buffers.frame_in.copy_(buffers.host_in, non_blocking=True)

            if self._graph and buffers.policy is not self._wanted():
                self._recapture()  # a graph must not silently keep the old kernels
            buffers.draws.normal_(generator=self._generator)
            if buffers.graph is not None:
                buffers.graph.replay()
            else:
                with self._scope():
                    self._frame(buffers)

            if on_device:
                return buffers.frame_out[0].clone()
            if buffers.host_out is not buffers.frame_out:
                buffers.host_out.copy_(buffers.frame_out, non_blocking=True)
                torch.cuda.current_stream(self.device).synchronize()
            result = buffers.host_out[0].clone()
            return result if isinstance(frame, Tensor) else result.numpy()

    def _frame(self, buffers: FrameBuffers) -> None:
        """Input buffer -> output buffer; captured as it stands, so nothing here waits or grows."""
        settings = self._settings
        frames = pad(buffers.frame_in)
        latents = self.autoencoder.encode(ops.frame_to_model(frames, dtype=self.dtype))
        memory_noise = buffers.memory_noise.to(self.dtype)
        memory = buffers.memory.read(memory_noise, settings.history_noise)
        inputs = torch.cat([latents, memory], 1)

        def denoise(x: Tensor, sigma: Any, step: int) -> Tensor:
            return self.denoiser.denoise(x, inputs, settings.conditions[step], settings.keys)

        # The sampler's state is float32 in every dtype: sigma 14.6 would swallow the latents.
        x = ops.axpby(settings.start, latents.float(), settings.sigmas[0], buffers.noise[0])
        latents = self.sampler(denoise, x, settings.sigmas, buffers.noise[1:]).to(self.dtype)
        buffers.memory.push(latents)
        frames = ops.model_to_frame(self.autoencoder.decode(latents))
        height, width = buffers.frame_out.shape[1:3]
        buffers.frame_out.copy_(frames[:, :height, :width])

    # Settings, effective on the next frame

    def set_context(self, tokens: Tensor) -> None:
        """Conditioning tokens [L, D] or [1, L, D] from the next frame on; the memory stays.

        Another L means other shapes, so a captured graph is captured again.
        """
        with self._lock:
            self._context = self._tokens(tokens)
            self._apply()

    def set_style(self, index: int) -> None:
        """Switch to a learned style of the model from the next frame on."""
        self.set_context(self.denoiser.unet.style(index))

    @property
    def strength(self) -> float:
        """How much is redrawn, in (0, 1]."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        with self._lock:
            self.denoiser.sigmas(self.steps, value)  # refuses a bad value before anything changes
            self._strength = value
            self._apply()

    @property
    def history_noise(self) -> float:
        """Sigma of the noise on the memory, at least 0."""
        return self._history_noise

    @history_noise.setter
    def history_noise(self, value: float) -> None:
        with self._lock:
            self._history_noise = _noise_level(value)
            self._apply()

    @property
    def policy(self) -> Any:
        """The kernel policy; None: that of the scope in which `push` is called."""
        return self._policy

    @policy.setter
    def policy(self, value: Any) -> None:
        if value is not None:
            policy(value)  # refuses unknown names now, not at the next frame
        self._policy = value

    def cut(self) -> None:
        """Forget the past outputs, as at a scene cut; the noise goes on."""
        with self._lock:
            if self._buffers is not None:
                self._buffers.memory.reset()

    def reset(self) -> None:
        """Back to the state after construction: empty memory, the seed's first noise."""
        with self._lock:
            self.cut()
            self._generator.manual_seed(self._seed)

    @property
    def trained(self) -> bool:
        return self.denoiser.trained and self.autoencoder.trained

    # Buffers, settings, capture

    def _build(self, height: int, width: int) -> FrameBuffers:
        unet = self.denoiser.unet.config
        model = budget.of(self.denoiser, self.autoencoder)
        budget.check(model, (height, width), self.dtype, self.steps, self.device)
        buffers = FrameBuffers.allocate((height, width), self.steps, unet, self.dtype, self.device)
        self._capture(buffers)
        return buffers

    def _capture(self, buffers: FrameBuffers) -> None:
        if not self._graph:
            return
        with self._scope(), torch.no_grad(), self._on_device():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_FRAMES):
                    self._frame(buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another stream's thread may go on allocating meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._frame(buffers)
        buffers.graph, buffers.policy = graph, self._wanted()
        buffers.memory.reset()  # the warm-up was no part of the stream

    def _recapture(self) -> None:
        """Capture again; the memory stays. After a failure the next frame tries again."""
        buffers = self._buffers
        if buffers is None or not self._graph:
            return
        memory = buffers.memory
        state = (memory.history, memory.sink, memory.count)
        kept = [t.clone() for t in state]
        buffers.graph = buffers.policy = None
        try:
            self._capture(buffers)
        finally:
            for buffer, value in zip(state, kept, strict=True):
                buffer.copy_(value)

    @torch.no_grad()
    def _prepare(self) -> Settings:
        """The settings as tensors: everything of a frame that no frame changes, computed once."""
        levels = self.denoiser.sigmas(self.steps, self._strength)
        sigmas = torch.tensor(levels, device=self.device)[:, None]
        history_noise = torch.tensor([self._history_noise], device=self.device)
        start = torch.tensor([0.0 if self._strength == 1 else 1.0], device=self.device)
        with self._scope():
            keys = self.denoiser.unet.context_keys(self._context)
            conditions = [
                self.denoiser.noise_condition(sigma, history_noise) for sigma in sigmas[:-1]
            ]
        return Settings(start, sigmas, history_noise, conditions, keys)

    @torch.no_grad()
    def _apply(self) -> None:
        """Bring changed settings to the buffers that a captured graph reads."""
        changed = self._prepare()
        old, new = self._settings.tensors(), changed.tensors()
        if any(a.shape != b.shape for a, b in zip(old, new, strict=True)):
            self._settings = changed
            self._recapture()
            return
        for a, b in zip(old, new, strict=True):
            a.copy_(b)

    def refresh(self) -> None:
        """Compute the settings again: call it after changing the weights of the model in place."""
        with self._lock:
            self._apply()

    def _wanted(self) -> Policy:
        return current.get() if self._policy is None else policy(self._policy)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device) if cuda else contextlib.nullcontext()

    def _scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._policy is None else use(self._policy)

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


def _noise_level(value: float) -> float:
    if not 0 <= value <= 10:
        raise ValueError(f"FrameStream: history_noise must be from 0 to 10 (got {value})")
    return float(value)
