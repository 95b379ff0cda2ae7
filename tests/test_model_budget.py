"""The predicted memory against the memory that a CPU run really holds."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirage_hello.kernels import use
from mirage_hello.model import (
    Autoencoder,
    AutoencoderConfig,
    Denoiser,
    DenoiserConfig,
    FrameStream,
    UNetConfig,
    VideoUNet,
    budget,
    build,
)
from mirage_hello.model.budget import MIB


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still alive; `peak` is the most."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if storage.nbytes() and address not in self.sizes and address not in self.known:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def measure(stream: FrameStream, size: tuple[int, int]) -> tuple[int, int, int]:
    """(weights, buffers, activations) bytes of a frame."""
    modules = (stream.denoiser, stream.autoencoder)
    parameters = [p for module in modules for p in module.parameters()]
    frame = np.zeros((*size, 3), np.uint8)
    with use("torch"):
        stream.push(frame)
        buffers = stream._buffers
        assert buffers is not None
        memory = buffers.memory
        own = [buffers.frame_in, buffers.frame_out, buffers.draws, buffers.kept]
        known = [*parameters, *own, memory.history, memory.sink, memory.count]
        with LiveBytes([*known, *stream._settings.tensors()]) as live:
            stream.push(frame)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return weights, buffers.nbytes, live.peak


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((128, 128), torch.float32), ((256, 192), torch.float32), ((256, 256), torch.bfloat16)],
)
def test_tiny_is_predicted_within_15_percent(size: tuple[int, int], dtype: torch.dtype) -> None:
    predicted = budget.predict("tiny", size, dtype)
    weights, buffers, activations = measure(FrameStream(*build("tiny", dtype=dtype)), size)
    assert predicted.weights == weights
    assert predicted.buffers == pytest.approx(buffers, rel=0.01)
    assert predicted.activations == pytest.approx(activations, rel=0.15)
    assert predicted.total == pytest.approx(weights + buffers + activations, rel=0.15)


def test_the_unet_of_stable_diffusions_shape_is_predicted_within_15_percent() -> None:
    """A tenth of the width, and an autoencoder so small that the U-Net decides the peak."""
    unet = UNetConfig(channels=(64, 128, 256, 256), context_dim=64, context_tokens=8)
    denoiser = Denoiser(VideoUNet(unet), DenoiserConfig("eps"))
    autoencoder = Autoencoder(AutoencoderConfig(channels=(8, 8, 8)))
    predicted = budget.predict(budget.of(denoiser, autoencoder), (128, 128))
    measured = measure(FrameStream(denoiser, autoencoder), (128, 128))
    assert "transformer" in predicted.moment
    assert predicted.activations == pytest.approx(measured[2], rel=0.15)


def test_terms_add_up_and_follow_their_causes() -> None:
    small = budget.predict("880m", (512, 512), torch.bfloat16)
    assert small.total == small.weights + small.buffers + small.activations + small.workspace
    # 861,640,644 + 2 x 1.34 million parameters of 2 bytes
    assert small.weights == pytest.approx(861_640_644 * 2, rel=0.005)
    double = budget.predict("880m", (512, 512), torch.float32)
    assert double.weights == 2 * small.weights
    assert double.activations == pytest.approx(2 * small.activations, rel=0.01)
    wide = budget.predict("880m", (512, 1024), torch.bfloat16)
    assert wide.activations == pytest.approx(2 * small.activations, rel=0.01)
    many = budget.predict("880m", (512, 512), torch.bfloat16, batch=3, steps=4)
    assert many.activations == 3 * small.activations and many.buffers > 3 * small.buffers
    cuda = budget.predict("880m", (512, 512), torch.bfloat16, device="cuda")
    # 12 + 5 + 4 C^2 elements of 2 B in 5, 5 and 6 transformers of 320, 640 and 1280 channels
    folded = 2 * 21 * (5 * 320**2 + 5 * 640**2 + 6 * 1280**2)
    assert cuda.workspace == 64 * MIB + folded
    assert str(small).startswith(f"{small.total / MIB:.1f} MiB = weights")


@pytest.mark.parametrize("free_mib", [100, 300])
def test_the_size_that_it_names_would_fit(monkeypatch, free_mib: int) -> None:
    monkeypatch.setattr(budget, "available", lambda device: free_mib * MIB)
    with pytest.raises(ValueError, match="would fit") as error:
        budget.check("tiny", (2160, 3840), torch.float32, 1, "cpu", weights_loaded=False)
    width, height = map(int, str(error.value).rsplit("; ", 1)[1].split()[0].split("x"))
    assert budget.check("tiny", (height, width), torch.float32, 1, "cpu", weights_loaded=False)
    assert width / height == pytest.approx(3840 / 2160, rel=0.05)


def test_guidance_is_refused_where_one_prompt_fits(monkeypatch) -> None:
    one = budget.predict("tiny", (256, 256))
    monkeypatch.setattr(budget, "available", lambda device: one.buffers + one.activations + MIB)
    pair = build("tiny")
    FrameStream(*pair, size=(256, 256))
    with pytest.raises(ValueError, match=r"256x256 needs .* would fit"):
        FrameStream(*pair, size=(256, 256), guidance=3.0)


def test_nothing_fits_into_nothing(monkeypatch) -> None:
    monkeypatch.setattr(budget, "available", lambda device: 0)
    with pytest.raises(ValueError, match="smaller preset"):
        budget.check("tiny", (64, 64), torch.float32, 1, "cpu")


def test_this_machine_has_memory() -> None:
    assert budget.available("cpu") > 16 * MIB
