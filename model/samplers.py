"""Samplers: free functions `sampler(denoise, x, sigmas, noise=None) -> clean latents`.

Args of all of them:
    denoise: callable (x, sigma, step) -> D(x; sigma), the clean latents. `step` counts from 0, so
        that the caller can use what it prepared for this step.
    x: [B, C, h, w] = clean + sigmas[0] * noise.
    sigmas: steps + 1 decreasing noise levels, the last 0: floats, or a float32 tensor
        [steps + 1, B] on the device (then a captured graph follows when its content changes).
    noise: [steps - 1, B, C, h, w] standard normal, read by `few_step` only.
Returns: [B, C, h, w], the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mirage_hello.kernels import ops

NOISE_CORRELATION = 0.5  # of the start noise of neighbouring frames: see `next_noise`
Level = float | Tensor  # a Python float, or float32 [B]
Denoise = Callable[[Tensor, Level, int], Tensor]
Sampler = Callable[..., Tensor]


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float] | Tensor, noise: Tensor | None = None
) -> Tensor:
    """x <- x + (sigma' - sigma) (x - D(x; sigma)) / sigma, a step of the probability-flow ODE.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
    2022, algorithm 1 without the second-order correction. The last step, to 0, is D itself.
    """
    for step in range(len(sigmas) - 2):
        denoised = denoise(x, sigmas[step], step)
        x = ops.euler_step(x, denoised, sigmas[step], sigmas[step + 1])
    return denoise(x, sigmas[-2], len(sigmas) - 2)


def ddim(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float] | Tensor, noise: Tensor | None = None
) -> Tensor:
    """z <- sqrt(ab') x0 + sqrt(1 - ab') eps, in z = sqrt(ab) x with ab = 1 / (sigma^2 + 1).

    Source: Song et al., "Denoising Diffusion Implicit Models", 2021, equation 12 with eta = 0.
    Equal to `euler` in exact arithmetic; the state z keeps unit variance at every noise level.
    """
    alpha_bars = [1.0 / (sigmas[i] * sigmas[i] + 1.0) for i in range(len(sigmas))]
    z = ops.axpby(alpha_bars[0] ** 0.5, x, 0.0, x)
    for step in range(len(sigmas) - 1):
        sigma, alpha_bar = sigmas[step], alpha_bars[step]
        x = ops.axpby(alpha_bar**-0.5, z, 0.0, z)
        denoised = denoise(x, sigma, step)
        if step == len(sigmas) - 2:
            return denoised  # ab' = 1: the step's result is x0
        eps = ops.axpby(1.0 / sigma, x, -1.0 / sigma, denoised)
        z = ops.ddim_step(z, eps, alpha_bar, alpha_bars[step + 1])
    raise ValueError(f"ddim: sigmas needs at least 2 levels (got {len(sigmas)})")


def few_step(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float] | Tensor, noise: Tensor | None = None
) -> Tensor:
    """x <- D(x; sigma) + sigma' noise: predict the clean frame, add fresh noise, repeat.

    Source: Luo et al., "Latent Consistency Models", 2023, algorithm 1 (multistep consistency
    sampling of Song et al. 2023). For networks trained or distilled to few steps.
    """
    steps = len(sigmas) - 1
    if steps > 1 and (noise is None or len(noise) < steps - 1):
        raise ValueError(
            f"few_step: {steps} steps need noise of shape [{steps - 1}, ...] "
            f"(got {None if noise is None else list(noise.shape)})"
        )
    for step in range(steps - 1):
        denoised = denoise(x, sigmas[step], step)
        assert noise is not None  # checked above
        x = ops.add_noise(denoised, noise[step], 1.0, sigmas[step + 1])
    return denoise(x, sigmas[-2], steps - 1)


def one_step(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float] | Tensor, noise: Tensor | None = None
) -> Tensor:
    """D(x; sigmas[0]): one evaluation, whatever the schedule.

    Source: Song et al., "Consistency Models", 2023, section 3.
    """
    return denoise(x, sigmas[0], 0)


def next_noise(noise: Tensor, fresh: Tensor, correlation: float) -> Tensor:
    """r noise + sqrt(1 - r^2) fresh: the start noise of the next frame, standard normal again.

    What a model must invent it draws from its start noise: drawn anew for each frame it flickers
    (docs/training.md has how much).

    Args:
        noise: the last frame's, fresh: independent of it, both standard normal of one shape.
        correlation: r, from 0 (independent frames) to 1 (the same noise for all frames).

    Source: the progressive noise of Ge et al., "Preserve Your Own Correlation", 2023, section 4.
    """
    return correlation * noise + (1 - correlation**2) ** 0.5 * fresh


def guided(conditional: Denoise, unconditional: Denoise, scale: Level) -> Denoise:
    """uncond + scale (cond - uncond), two evaluations a step: classifier-free guidance.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6.
    """

    def denoise(x: Tensor, sigma: Level, step: int) -> Tensor:
        return ops.guidance(unconditional(x, sigma, step), conditional(x, sigma, step), scale)

    return denoise


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "few_step": few_step,
    "one_step": one_step,
}
