"""The ends of a frame: each kernel against torch's operations, ragged sizes and extremes."""

import pytest
import torch

from mirage_hello import reference
from mirage_hello.kernels import frame_edges
from mirage_hello.kernels.frame_edges import Shape
from mirage_hello.model.autoencoder import depth_to_space, space_to_depth
from mirage_hello.model.frame_buffers import pad
from mirage_hello.model.memory import ContextMemory
from mirage_hello.ptx import assembler

HALF = [torch.bfloat16, torch.float16]


def image(device, *size: int, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(size, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [(16, 24), (1, 1), (13, 50), (64, 72)])
def test_a_frame_as_patches(device, size, dtype) -> None:
    frame = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, device=device)
    out = frame_edges.frame_patches(frame, Shape(4, 4, dtype))
    # On a CPU: torch's CUDA kernels divide by multiplying, which rounds twice.
    expected = space_to_depth(reference.frame_to_model(pad(frame.cpu()), dtype))
    assert torch.equal(out[:, :12].cpu(), expected) and not out[:, 12:].any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [(16, 24), (1, 1), (13, 50), (64, 72)])
def test_patches_as_a_frame(device, size, dtype) -> None:
    h2, w2 = (-(-n // 8) * 4 for n in size)
    patches = image(device, 1, 16, h2, w2, dtype=dtype)
    patches[0, :4, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    frame = torch.full((1, *size, 3), 77, dtype=torch.uint8, device=device)
    frame_edges.patches_frame(patches[:, :12], frame, Shape(4, 4, dtype))
    whole = depth_to_space(patches[:, :12].contiguous(memory_format=torch.channels_last))
    expected = reference.model_to_frame(whole.double())[:, : size[0], : size[1]]
    # One fused multiply-add before the rounding: exact ties of the two steps may differ.
    difference = (frame.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("latent", [4, 8])
@pytest.mark.parametrize("dtype", HALF)
def test_the_networks_input(device, latent, copies, dtype) -> None:
    shape = Shape(latent, 4, dtype, copies)
    latents = image(device, 1, 8, 5, 7, dtype=dtype)[:, :latent]
    history = image(device, 1, 4 * latent, 5, 7, dtype=dtype)
    sink = image(device, 1, latent, 5, 7, dtype=dtype)
    noise, memory_noise = image(device, 1, latent, 5, 7), image(device, 1, 5 * latent, 5, 7)
    scalars = tuple(torch.tensor([s], device=device) for s in (0.7, 1.9, 0.05, 0.4))
    x, out = frame_edges.network_input(latents, history, sink, noise, memory_noise, scalars, shape)
    start, sigma, level, c_in = scalars
    expected = start * latents.float() + sigma * noise
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    memory = torch.cat([history, sink], 1).float() + level * memory_noise
    whole = torch.cat([c_in * x, latents.float(), memory], 1)
    assert out.shape == (copies, shape.channels, 5, 7)
    for copy in out:
        torch.testing.assert_close(copy[: whole.shape[1]], whole[0].to(dtype))
        assert not copy[whole.shape[1] :].any()
    frame_edges.scale_input(2 * x, c_in, out, shape)
    for copy in out:
        torch.testing.assert_close(copy[:latent], (2 * c_in * x)[0].to(dtype))
        torch.testing.assert_close(copy[latent : whole.shape[1]], whole[0, latent:].to(dtype))


@pytest.mark.parametrize("latent", [4, 8])
@pytest.mark.parametrize("guided", [False, True])
def test_the_denoised_frame(device, latent, guided) -> None:
    shape = Shape(latent, 4, torch.bfloat16, 2 if guided else 1)
    x = image(device, 1, latent, 6, 5)
    prediction = image(device, shape.copies, 8, 6, 5, dtype=torch.bfloat16)[:, :latent]
    c_skip, c_out, g = (torch.tensor([s], device=device) for s in (0.3, -14.6, 4.0))
    out = frame_edges.denoised(x, prediction, c_skip, c_out, g if guided else None, shape)
    network = prediction.float()
    network = network[:1] + g * (network[1:] - network[:1]) if guided else network
    torch.testing.assert_close(out, c_skip * x + c_out * network, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("latent", [4, 8])
@pytest.mark.parametrize("dtype", HALF)
def test_the_memory_moves_as_its_class_does(device, latent, dtype) -> None:
    shape = Shape(latent, 4, dtype)
    ours, plain = (ContextMemory(1, latent, 5, 9, 4, dtype, device) for _ in range(2))
    for i in range(6):
        clean = 4 * image(device, 1, latent, 5, 9)
        latents = frame_edges.remember(clean, ours.count, ours.history, ours.sink, shape)
        ours.count.add_(1)
        plain.push(clean.to(dtype))
        assert torch.equal(latents[:, :latent], clean.to(dtype)) and not latents[:, latent:].any()
        assert torch.equal(ours.history, plain.history), i
        assert torch.equal(ours.sink, plain.sink) and torch.equal(ours.count, plain.count)
    assert (ours.history.abs() == 6).any()  # the clamp was reached


def test_a_wrong_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="8 channels apart"):
        frame_edges.denoised(
            torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), *[torch.zeros(1)] * 2, None,
            Shape(4, 4, torch.bfloat16),
        )  # fmt: skip


@pytest.mark.parametrize("latent", [4, 8])
def test_budget(latent: int) -> None:
    shape = Shape(latent, 4, torch.bfloat16, 2)
    text = assembler.render(
        "frame_edges", dtype="bf16", LATENT=latent, PADDED=shape.channels, COPIES=2
    )
    _, report = assembler.ptxas(text, "sm_90a", ("-v",), "frame_edges")
    used = [int(line.split("Used ")[1].split()[0]) for line in report.split("\n") if "Used" in line]
    assert len(used) == 6 and max(used) <= 64
    assert report.count("0 bytes spill stores") == report.count("spill stores")
