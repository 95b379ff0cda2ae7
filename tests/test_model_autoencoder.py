"""The autoencoder: factor 8, sizes, layout, and that it can learn."""

import pytest
import torch

from mirage_hello.model import PRESETS, Autoencoder, AutoencoderConfig
from mirage_hello.model.autoencoder import depth_to_space, space_to_depth

SMALL = AutoencoderConfig(channels=(8, 16, 16))


def small(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(SMALL).eval()


def frames(*shape: int) -> torch.Tensor:
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (24, 8)])
def test_factor_eight_both_ways(size: tuple[int, int]) -> None:
    auto = small()
    with torch.no_grad():
        latents = auto.encode(frames(2, 3, *size))
        assert latents.shape == (2, 4, size[0] // 8, size[1] // 8)
        decoded = auto.decode(latents)
    assert decoded.shape == (2, 3, *size)
    assert latents.is_contiguous(memory_format=torch.channels_last)
    assert decoded.is_contiguous(memory_format=torch.channels_last)


def test_space_to_depth_keeps_every_pixel_in_place() -> None:
    x = frames(2, 3, 6, 10)
    packed = space_to_depth(x)
    assert torch.equal(depth_to_space(packed), x)
    # channels (dy, dx, c): pixel (2i + 1, 2j) of channel c is channel (1 x 2 + 0) x 3 + c
    assert torch.equal(packed[:, 6 + 2, 1, 3], x[:, 2, 3, 6])


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.2e6, 0.5e6), ("880m", 1e6, 3e6)])
def test_parameters_a_side(name: str, low: float, high: float) -> None:
    with torch.device("meta"):
        auto = Autoencoder(PRESETS[name].autoencoder)
    for side in (auto.encoder, auto.decoder):
        assert low < sum(p.numel() for p in side.parameters()) < high


def test_rescaled_latents_decode_to_the_same_frames() -> None:
    auto, x = small(), frames(1, 3, 32, 32)
    with torch.no_grad():
        latents, decoded = auto.encode(x), auto(x)
        auto.rescale_latents(2.0)
        torch.testing.assert_close(auto.encode(x), latents / 2)
        torch.testing.assert_close(auto(x), decoded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_not_constant(dtype: torch.dtype) -> None:
    with torch.no_grad():
        decoded = small().to(dtype)(frames(1, 3, 32, 32).to(dtype))
    assert decoded.dtype == dtype and decoded.isfinite().all() and decoded.float().std() > 0.01


def test_it_learns_to_copy_a_frame() -> None:
    auto = small().train()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    target = torch.stack([x, y, x * y])[None]
    optimizer = torch.optim.Adam(auto.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (auto(target) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 4, 32, 32), (3, 32, 32)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        small().encode(torch.zeros(shape))
