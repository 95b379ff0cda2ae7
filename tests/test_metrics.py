"""Measures of pictures and of runs, against their definitions."""

import math

import pytest
import torch

from mirage_hello.model import metrics


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 8, 8)
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert metrics.psnr(a, b).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    assert metrics.psnr(a, a).tolist() == [100.0, 100.0]


def test_ssim_of_equal_noisy_and_inverted(seed):
    torch.manual_seed(seed)
    a = torch.rand(1, 3, 32, 32) * 2 - 1
    assert metrics.ssim(a, a).item() == pytest.approx(1.0, abs=1e-5)
    assert metrics.ssim(a, -a).item() < 0
    noisy = metrics.ssim((a + 0.3 * torch.randn_like(a)).clamp(-1, 1), a).item()
    assert 0.1 < noisy < 0.95


def test_ssim_formula_on_constant_pictures():
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)
    x, y = 0.4, 0.7  # their lumas in [0, 1]; variances are 0
    expected = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    assert metrics.ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_edge_correlation_follows_edges_and_not_colours_or_textures(seed):
    torch.manual_seed(seed)
    a = torch.full((1, 3, 64, 64), -0.5)
    a[..., 16:40, 12:52] = 0.4
    a[..., 28:36, 20:32] = 0.8
    texture = 0.3 * (torch.rand(1, 3, 64, 64) - 0.5)
    tint = torch.tensor([0.2, -0.1, 0.3]).view(3, 1, 1)
    assert metrics.edge_correlation(a, a).item() == pytest.approx(1.0, abs=1e-5)
    assert metrics.edge_correlation(-0.5 * a + tint, a).item() > 0.95
    assert metrics.edge_correlation(a + texture, a).item() > 0.8
    moved = metrics.edge_correlation(a.roll((30, 30), (2, 3)), a).item()
    assert abs(moved) < 0.3
    assert abs(metrics.edge_correlation(texture, a).item()) < 0.3
    assert metrics.edge_correlation(torch.zeros_like(a), a).item() == 0


def test_statistics_move_the_way_they_are_named(seed):
    torch.manual_seed(seed)
    a = (torch.rand(1, 3, 32, 32) - 0.5) * 1.2
    base = metrics.statistics(a, a)
    assert metrics.statistics(a + 0.2, a)["brightness"] > base["brightness"]
    assert metrics.statistics(a * 0.5, a)["contrast"] < base["contrast"]
    assert metrics.statistics(a * 9, a)["clipped"].clamp_min(0) >= base["clipped"]
    grey = a.mean(1, keepdim=True).expand_as(a)
    assert metrics.statistics(grey, a)["saturation"].item() == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert metrics.statistics(blurred, a)["sharpness"] < base["sharpness"]
    assert base["motion"].item() == 0


def test_warp_undoes_a_shift_and_sees_flicker():
    picture = torch.rand(1, 3, 16, 16)
    shifted = picture.roll(2, 3)
    motion = torch.zeros(1, 2, 16, 16)
    motion[:, 0] = -2  # two pixels to the left it was, one frame earlier
    depth = torch.full((1, 1, 16, 16), 5.0)
    visible = metrics.visible_before(motion, depth, depth)
    assert visible[..., :2].sum() == 0 and visible[..., 2:].min() == 1
    assert metrics.warp_error(shifted, picture, motion, visible).item() == pytest.approx(
        0, abs=1e-5
    )
    flicker = metrics.warp_error(shifted + 0.1, picture, motion, visible)
    assert flicker.item() == pytest.approx(0.05, abs=1e-4)
    hidden = metrics.visible_before(motion, depth, depth * 2)
    assert hidden.sum() == 0


def test_interval_is_students():
    found = metrics.interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert metrics.interval([5.0]).as_dict() == {"mean": 5.0, "low": None, "high": None}


def test_interval_covers_the_truth_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        found = metrics.interval((1 + torch.randn(8, generator=generator)).tolist())
        hits += found.low <= 1 <= found.high
    assert 930 <= hits <= 970


def test_slope_and_ends():
    frames = torch.arange(0, 1000, 10)
    values = torch.stack((20 - 0.002 * frames, 0.0 * frames + 7), 1)
    assert metrics.slope(frames, values).tolist() == pytest.approx([-2.0, 0.0], abs=1e-6)
    early, late = metrics.ends(values)
    assert early[0] > late[0] and early[1] == late[1] == 7


def test_recovery_counts_frames_above_the_settled_level():
    errors = torch.ones(300)
    errors[100:107] = 5.0
    errors[200:230] = 5.0
    assert metrics.recovery(errors, [100, 200], settle=40) == [7, 30]
    assert metrics.recovery(errors, [290], settle=40) == []  # too close to the end to settle
