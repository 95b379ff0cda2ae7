"""Denoiser: the two parametrisations, their noise schedules and their precision."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mirage_hello.model import Denoiser, DenoiserConfig, UNetConfig, VideoUNet
from mirage_hello.model.denoiser import schedule_sigmas

SMALL = UNetConfig(
    channels=(32, 64), heads=(2, 4), transformers=(True, False), context_dim=24, groups=8
)


def denoiser(parametrisation: str) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(VideoUNet(SMALL), DenoiserConfig(parametrisation)).eval()


def arguments(sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = sigma * torch.randn(2, 4, 8, 8, generator=generator)
    inputs = torch.randn(2, 24, 8, 8, generator=generator)
    return x, torch.full((2,), sigma), inputs, torch.randn(2, 5, 24, generator=generator)


@pytest.mark.parametrize("parametrisation", ["edm", "eps"])
def test_no_noise_means_nothing_to_remove(parametrisation: str) -> None:
    x, sigma, inputs, context = arguments(1e-4)
    x = x * 1e4
    with torch.no_grad():
        torch.testing.assert_close(
            denoiser(parametrisation)(x, sigma, inputs, context), x, atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("sigma", [0.01, 0.5, 5.0])
def test_edm_keeps_the_variance_of_the_network_at_one(sigma: float) -> None:
    """Karras et al. 2022, appendix B.6: c_in x and (clean - c_skip x) / c_out: variance 1."""
    noise = denoiser("edm").noise_condition(torch.tensor([sigma]))
    c_in, c_skip, c_out = noise.scales[:, 0].tolist()
    data = 0.5
    assert c_in**2 * (sigma**2 + data**2) == pytest.approx(1, rel=1e-5)
    target = (1 - c_skip) ** 2 * data**2 + c_skip**2 * sigma**2
    assert target / c_out**2 == pytest.approx(1, rel=1e-5)


def test_eps_schedule_is_stable_diffusions() -> None:
    sigmas = schedule_sigmas()
    assert len(sigmas) == 1000
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-4)


def test_eps_tells_the_network_the_training_step() -> None:
    model, seen = denoiser("eps"), []
    model.unet.time_embedding.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    steps = torch.tensor([0, 1, 500, 998, 999])
    model.noise_condition(schedule_sigmas()[steps].float())
    torch.testing.assert_close(seen[0], steps.float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("parametrisation", ["edm", "eps"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_schedules_fall_to_zero_and_strength_lowers_the_start(parametrisation, steps) -> None:
    model = denoiser(parametrisation)
    full, half = model.sigmas(steps), model.sigmas(steps, strength=0.5)
    assert len(full) == steps + 1 and full[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(full))
    assert full[0] == pytest.approx(5.0 if parametrisation == "edm" else 14.6146, rel=1e-4)
    assert half[0] < full[0]
    assert full[-2] > 0.02  # no step is lost where D is the identity


def test_float32_state_survives_a_bfloat16_network() -> None:
    x, sigma, inputs, context = arguments(5.0)
    with torch.no_grad():
        expected = denoiser("edm")(x, sigma, inputs, context)
        half = denoiser("edm").to(torch.bfloat16)
        got = half(x, sigma, inputs.bfloat16(), context.bfloat16())
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.1 * expected.std()


def test_prepared_noise_and_keys_give_the_same() -> None:
    model, (x, sigma, inputs, context) = denoiser("edm"), arguments(1.0)
    with torch.no_grad():
        prepared = inputs, model.noise_condition(sigma), model.unet.context_keys(context)
        assert torch.equal(model.denoise(x, *prepared), model(x, sigma, inputs, context))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: denoiser("edm").sigmas(0), r"at least 1 \(got 0\)"),
        (lambda: denoiser("edm").sigmas(1, 0.0), r"strength must be above 0"),
        (lambda: denoiser("eps").sigmas(1, math.nan), r"strength must be above 0"),
        (lambda: denoiser("v"), r"'edm' or 'eps' \(got 'v'\)"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
