"""fp8 as a choice of a stream: calibration, the emulated U-Net in e4m3, and the way back."""

from collections import Counter

import numpy as np
import pytest
import torch
from stream_calls import clip, planned, run, stream

from mirage_hello.kernels import conv2d_fp8, use
from mirage_hello.model import fp8


def test_the_emulated_unet_in_e4m3(monkeypatch) -> None:
    """Within a few percent of bfloat16, in the kernels that say so, and back to the same bits."""
    of = stream(dtype=torch.bfloat16, policy="torch")
    unet = of.denoiser.unet
    x = torch.randn(1, 28, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    args = x, torch.tensor([40.0]), torch.randn(1, 3, 24).bfloat16()
    launches: list[str] = []
    convolutions: list[tuple] = []
    original = conv2d_fp8.conv2d_fp8
    monkeypatch.setattr(
        conv2d_fp8, "conv2d_fp8", lambda *a, **kw: convolutions.append(a) or original(*a, **kw)
    )

    def out() -> torch.Tensor:
        from mirage_hello.ptx import loader

        launches.clear()
        with torch.no_grad(), use("ptx-emulated"), loader.watched(lambda *a: launches.append(a[1])):
            return unet(*args).float()

    bf16 = out()
    assert not convolutions and not any("e4m3" in name for name in launches)
    scales = of.use_fp8(clip(2))
    assert all(0 < scale < 1 for scale in scales.values())
    assert any(name.endswith("conv1") for name in scales) and any(".ff." in n for n in scales)
    quantised = out()
    # Both convolutions of every residual block, and the pass before each that rounds for it; the
    # gate and the product of every feed-forward.
    assert len(convolutions) == 2 * 8
    names = Counter(name for name in launches if "e4m3" in name)
    assert names["group_norm_apply_to_e4m3_bf16"] == 2 * 8
    assert names["geglu_norm_to_e4m3_bf16"] == names["linear_e4m3"] == 4, names
    error = ((quantised - bf16).norm() / bf16.norm()).item()
    assert 1e-3 < error < 0.15, error
    of.use_fp8(None)
    assert torch.equal(out(), bf16)


def test_a_stream_plans_again_and_nothing_changes_off_hopper(device: torch.device) -> None:
    frames = clip(2)
    of = planned(device, policy="torch")
    expected = run(of, frames)
    plan = of.plan
    of.use_fp8(frames)
    assert np.array_equal(run(of, frames), expected)  # torch's kernels have no e4m3 here
    assert of.plan is not plan


def test_a_calibration_that_is_refused_keeps_the_scales() -> None:
    of = stream(dtype=torch.bfloat16, policy="torch")
    scales = of.use_fp8(clip(2))
    with pytest.raises(ValueError, match="give at least one frame"):
        of.use_fp8([])
    assert scales and fp8.scales(of.denoiser) == scales
    of.use_fp8(None)
    assert fp8.scales(of.denoiser) == {}


def test_scales_of_another_model_are_refused() -> None:
    of = stream()
    with pytest.raises(ValueError, match=r"no layer unet\.nothing"):
        fp8.use(of.denoiser, {"unet.nothing": 0.1})
    with pytest.raises(ValueError, match="at least one frame"):
        fp8.calibrate(of, [])
