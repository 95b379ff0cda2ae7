"""Measures of pictures and of long runs: distances to truth, statistics that drift, warp error.

Frames are float32 [B, 3, H, W] in [-1, 1]; every measure gives one number a frame, [B], unless its
docstring says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for a range of length 1
BLOCK = 4  # pixels a side, of the blocks whose edges are compared
DEPTH_TOLERANCE = 0.05  # relative: a point whose depth changed by more was hidden
# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom (any statistics table).
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def luma(frames: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, 1, H, W] in [0, 1]."""
    weights = torch.tensor(LUMA, device=frames.device).view(1, 3, 1, 1)
    return ((frames + 1) / 2 * weights).sum(1, keepdim=True)


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """10 log10(1 / mean((a - b)^2)) in dB, for a and b in [0, 1]; at most 100."""
    error = ((frames - truth) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
    return -10 * error.log10()


def ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of the luma with an 11 x 11 Gaussian window, deviation 1.5.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004, equation 13; borders where the window does not fit are left out.
    """
    side = torch.arange(11, device=frames.device, dtype=torch.float32) - 5
    line = torch.exp(-side.square() / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, 1, 11)), line.view(1, 1, 11, 1))

    a, b = luma(frames), luma(truth)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    bottom = (mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2)
    return (top / bottom).mean((1, 2, 3))


def edge_correlation(frames: Tensor, truth: Tensor) -> Tensor:
    """Pearson correlation, over a frame, of the sizes of both lumas' gradients.

    Of means over BLOCK x BLOCK pixels, so that textures do not count: 1 where both have their edges
    in the same places, 0 where a scene has dissolved, or where a frame has no edge. A dissolved
    picture may keep its colours, its contrast, and a PSNR near that of any blur.
    """

    def gradients(x: Tensor) -> Tensor:
        x = F.avg_pool2d(luma(x), BLOCK)
        across = x[..., :-1, 1:] - x[..., :-1, :-1]
        down = x[..., 1:, :-1] - x[..., :-1, :-1]
        size = (across.square() + down.square()).sqrt().flatten(1)
        return size - size.mean(1, keepdim=True)

    a, b = gradients(frames), gradients(truth)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-8)


def statistics(frames: Tensor, previous: Tensor) -> dict[str, Tensor]:
    """What drifts in long runs: name -> [B].

    brightness and contrast: mean and deviation of the luma; red, green, blue: means in [0, 1];
    saturation: mean of the largest minus the smallest channel; clipped: share of channel values
    within 1 % of the ends; sharpness: mean |Laplacian| of the luma; motion: mean |change| since
    `previous`.
    """
    unit, light = (frames + 1) / 2, luma(frames)
    around = F.avg_pool2d(light, 3, 1) * 9 - 9 * light[..., 1:-1, 1:-1]
    red, green, blue = unit.mean((2, 3)).unbind(1)
    return {
        "brightness": light.mean((1, 2, 3)),
        "contrast": light.flatten(1).std(1),
        "red": red,
        "green": green,
        "blue": blue,
        "saturation": (unit.amax(1) - unit.amin(1)).mean((1, 2)),
        "clipped": ((unit < 0.01) | (unit > 0.99)).float().mean((1, 2, 3)),
        "sharpness": around.abs().mean((1, 2, 3)) / 8,
        "motion": (frames - previous).abs().mean((1, 2, 3)) / 2,
    }


def warped(previous: Tensor, motion: Tensor) -> Tensor:
    """`previous` [B, C, H, W] sampled at each pixel plus its motion [B, 2, H, W] (x, y, pixels)."""
    height, width = motion.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=motion.device),
        torch.arange(width, device=motion.device),
        indexing="ij",
    )
    grid_x = (x + motion[:, 0] + 0.5) * 2 / width - 1
    grid_y = (y + motion[:, 1] + 0.5) * 2 / height - 1
    return F.grid_sample(previous, torch.stack((grid_x, grid_y), -1), align_corners=False)


def visible_before(motion: Tensor, depth_before: Tensor, previous_depth: Tensor) -> Tensor:
    """1 where a pixel's point was in the earlier frame: inside it, and at its expected depth.

    Args:
        motion: [B, 2, H, W]; depth_before: [B, 1, H, W], the earlier frame's depth;
        previous_depth: [B, 1, H, W], how far this frame's points were from the earlier camera.
    """
    inside = warped(torch.ones_like(depth_before), motion) > 0.999
    found = warped(depth_before, motion)
    same = (found / previous_depth.clamp_min(1e-3) - 1).abs() < DEPTH_TOLERANCE
    return (inside & same).float()


def warp_error(frames: Tensor, previous: Tensor, motion: Tensor, visible: Tensor) -> Tensor:
    """mean |a_t - warp(a_{t-1})| / 2 over the points visible in both frames; 0 is no flicker."""
    off = (frames - warped(previous, motion)).abs().mean(1, keepdim=True) / 2
    return (off * visible).sum((1, 2, 3)) / visible.sum((1, 2, 3)).clamp_min(1)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: ends that do not exist are null."""
        finite = math.isfinite(self.low)
        return {
            "mean": self.mean,
            "low": self.low if finite else None,
            "high": self.high if finite else None,
        }


def interval(values: Sequence[float]) -> Interval:
    """mean +- t s / sqrt(n): Student's 95 % interval of the mean of independent values.

    One value has no interval: its ends are infinite.
    """
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    half = t * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def slope(frames: Tensor, values: Tensor) -> Tensor:
    """Least-squares slope of values [T, B] over frame numbers [T], per 1000 frames: [B]."""
    x = frames.double() / 1000
    x = x - x.mean()
    y = values.double() - values.double().mean(0)
    return (x[:, None] * y).sum(0) / x.square().sum().clamp_min(1e-12)


def ends(values: Tensor, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Means over the first and the last 15 % of values [T, B]: two [B]."""
    count = max(1, round(share * len(values)))
    return values[:count].mean(0), values[-count:].mean(0)


def recovery(
    errors: Tensor, cuts: Sequence[int], settle: int = 40, within: float = 0.1
) -> list[int]:
    """Frames after each cut until the error is within 10 % of where it settles.

    Args:
        errors: float [T], mean squared error against truth.
        cuts: frame numbers of the cuts, increasing.
        settle: the settled level is the mean of the frames from `settle` to the next cut.

    Returns:
        one int a cut that has at least 1.25 `settle` frames before the next; 0: no frame was worse.
    """
    found = []
    limits = [*cuts, len(errors)]
    for at, end in itertools.pairwise(limits):
        if end - at < settle + settle // 4:
            continue
        level = float(errors[at + settle : end].mean()) * (1 + within)
        # A mean over three frames: one lucky frame is no recovery.
        smooth = F.avg_pool1d(errors[at:end].view(1, 1, -1).float(), 3, 1).flatten()
        below = (smooth <= level).nonzero()
        found.append(int(below[0]) if len(below) else end - at)
    return found
