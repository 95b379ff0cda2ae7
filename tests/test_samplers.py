"""Samplers against closed forms: for Gaussian data the exact denoiser is known.

With clean data N(mean, s^2) and x = clean + sigma * noise, the posterior mean is
    D(x; sigma) = (s^2 x + sigma^2 mean) / (s^2 + sigma^2),
and the probability-flow ODE from sigma_0 to 0 has the solution
    x(0) = mean + (x_0 - mean) * s / sqrt(s^2 + sigma_0^2).
"""

import itertools

import pytest
import torch
from torch import Tensor

from mirage_hello.model import SAMPLERS, ddim, euler, few_step, guided, one_step

MEAN, S, SIGMA = 0.3, 0.5, 5.0


def exact(x: Tensor, sigma: float | Tensor, step: int) -> Tensor:
    variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1) ** 2
    return (S**2 * x + variance * MEAN) / (S**2 + variance)


def start(batch: int = 2) -> Tensor:
    noise = torch.randn(batch, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    return (MEAN + SIGMA * noise).contiguous(memory_format=torch.channels_last)


def karras(steps: int, rho: float = 7.0) -> list[float]:
    low, high = 2e-3 ** (1 / rho), SIGMA ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


SOLUTION = S / (S**2 + SIGMA**2) ** 0.5


@pytest.mark.parametrize("sampler", [euler, ddim])
def test_ode_samplers_converge_to_the_exact_solution_at_first_order(sampler) -> None:
    x = start()
    expected = MEAN + (x - MEAN) * SOLUTION
    errors = [(sampler(exact, x, karras(n)) - expected).abs().max().item() for n in (20, 40, 80)]
    assert errors[2] < 0.05  # of a start that is up to 4 x 5 away
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 2.5  # half the step, half the error


def test_ddim_is_euler_in_other_coordinates() -> None:
    torch.testing.assert_close(ddim(exact, start(), karras(7)), euler(exact, start(), karras(7)))


def test_one_step_is_the_posterior_mean() -> None:
    x = start()
    assert torch.equal(one_step(exact, x, [SIGMA, 0.0]), exact(x, SIGMA, 0))


def test_few_step_returns_the_right_distribution() -> None:
    """D of x ~ N(mean, s^2 + sigma^2) has deviation s^2 / sqrt(s^2 + sigma^2)."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 64, 4, 32, 32, generator=generator)
    clean = MEAN + S * torch.randn(64, 4, 32, 32, generator=generator)
    # A consistency function that maps everything to the clean data: the last level decides.
    result = few_step(
        lambda x, sigma, step: clean if step == 0 else exact(x, sigma, step),
        clean,
        [SIGMA, 0.5, 0.0],
        noise,
    )
    assert result.mean().item() == pytest.approx(MEAN, abs=5e-3)
    assert result.std().item() == pytest.approx(S**2 / (S**2 + 0.5**2) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sigmas_may_be_floats_or_a_tensor_per_sample(name: str) -> None:
    levels = [SIGMA, 1.0, 0.1, 0.0]
    noise = torch.randn(2, 2, 4, 6, 5, generator=torch.Generator().manual_seed(3))
    per_sample = torch.tensor(levels)[:, None].repeat(1, 2)
    expected = SAMPLERS[name](exact, start(), levels, noise)
    torch.testing.assert_close(SAMPLERS[name](exact, start(), per_sample, noise), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_counted_and_the_input_is_not_changed(name: str) -> None:
    seen = []

    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        seen.append((step, sigma))
        return exact(x, sigma, step)

    x = start()
    kept = x.clone()
    SAMPLERS[name](denoise, x, [SIGMA, 1.0, 0.0], torch.zeros(1, 2, 4, 6, 5))
    assert seen == ([(0, SIGMA)] if name == "one_step" else [(0, SIGMA), (1, 1.0)])
    assert torch.equal(x, kept)


def test_guidance_extrapolates_between_two_denoisers() -> None:
    x = start()
    denoise = guided(lambda x, sigma, step: 2 * x, lambda x, sigma, step: x, 3.0)
    torch.testing.assert_close(one_step(denoise, x, [SIGMA, 0.0]), 4 * x)  # x + 3 (2x - x)


def test_few_step_without_enough_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 steps need noise of shape \[2, ...\] \(got None\)"):
        few_step(exact, start(), [SIGMA, 1.0, 0.5, 0.0])
