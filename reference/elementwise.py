"""Elementwise ops: SiLU, and the linear combinations of two tensors that diffusion is made of.

A coefficient is a float, or a tensor [B] with one value per sample (first dimension).
"""

import torch
from torch import Tensor

Coefficient = float | Tensor


def per_sample(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """A [B] coefficient shaped to broadcast against x [B, ...] in x's dtype; a float as it is."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return coefficient


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) = x / (1 + exp(-x)). Any shape; result as x. -inf gives NaN, as in torch.

    Source: Elfwing, Uchibe and Doya 2017, "Sigmoid-Weighted Linear Units".
    """
    return x * torch.sigmoid(x)


def axpby(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """a x + b y. x, y: the same shape and dtype, which the result has."""
    return per_sample(a, x) * x + per_sample(b, y) * y


def residual_add(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual, same shape and dtype."""
    return x + residual


def add_noise(x: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """alpha x + sigma noise: the forward process x_t = alpha_t x_0 + sigma_t eps.

    Source: Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models", equation 4.
    """
    return axpby(alpha, x, sigma, noise)


def euler_coefficients(
    sigma: Coefficient, sigma_next: Coefficient
) -> tuple[Coefficient, Coefficient]:
    """(a, b) with euler_step = a x + b denoised: a = sigma_next / sigma, b = 1 - a."""
    a = sigma_next / sigma
    return a, 1 - a


def euler_step(x: Tensor, denoised: Tensor, sigma: Coefficient, sigma_next: Coefficient) -> Tensor:
    """x + (sigma_next - sigma) d with the slope d = (x - denoised) / sigma.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
    Models", algorithm 1 with the Euler step only.
    """
    sigma, sigma_next = per_sample(sigma, x), per_sample(sigma_next, x)
    return x + (sigma_next - sigma) * ((x - denoised) / sigma)


def ddim_coefficients(
    alpha_bar: Coefficient, alpha_bar_next: Coefficient
) -> tuple[Coefficient, Coefficient]:
    """(a, b) with ddim_step = a x + b eps.

    a = sqrt(ab' / ab), b = sqrt(1 - ab') - a sqrt(1 - ab).
    """
    a = (alpha_bar_next / alpha_bar) ** 0.5
    return a, (1 - alpha_bar_next) ** 0.5 - a * (1 - alpha_bar) ** 0.5


def ddim_step(
    x: Tensor, eps: Tensor, alpha_bar: Coefficient, alpha_bar_next: Coefficient
) -> Tensor:
    """sqrt(ab') x_0 + sqrt(1 - ab') eps with x_0 = (x - sqrt(1 - ab) eps) / sqrt(ab).

    Source: Song, Meng and Ermon 2020, "Denoising Diffusion Implicit Models", equation 12, eta 0.
    """
    alpha_bar, alpha_bar_next = per_sample(alpha_bar, x), per_sample(alpha_bar_next, x)
    x_0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    return alpha_bar_next**0.5 * x_0 + (1 - alpha_bar_next) ** 0.5 * eps


def guidance(uncond: Tensor, cond: Tensor, scale: Coefficient) -> Tensor:
    """uncond + scale (cond - uncond).

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance".
    """
    return uncond + per_sample(scale, uncond) * (cond - uncond)
