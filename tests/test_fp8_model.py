"""fp8 as a choice of a stream: calibration, the emulated U-Net in e4m3, and the way back."""

from collections import Counter

import numpy as np
import pytest
import torch
from stream_calls import clip, planned, run, stream

from mirage_hello.kernels import conv2d_fp8, use
from mirage_hello.model import FrameStream, fp8
from mirage_hello.model.ways import Ways, going
from mirage_hello.ptx import loader

MERGED = Ways(e4m3_raw=False)
NEVER = Ways(e4m3_rows=False, e4m3_raw=False)
SPLIT = Ways(e4m3_merges=False, e4m3_raw=False)
RAW = Ways(e4m3_raw=True)
FOLDED = Ways(e4m3_raw=True, shortcuts=True)


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        # 4 transformers and 8 residual blocks; a merged product is a convolution.
        (MERGED, {"group_norm_apply": 20, "linear": 8, "qkv": 4, "softmax": 4, "conv2d": 20}),
        (SPLIT, {"group_norm_apply": 20, "linear": 12, "qkv": 4, "softmax": 4, "conv2d": 16}),
        (RAW, {"group_norm_apply": 20, "linear": 8, "qkv": 4, "softmax": 4, "conv2d": 26}),
        (FOLDED, {"group_norm_apply": 20, "linear": 8, "qkv": 4, "softmax": 4, "conv2d": 22}),
        (NEVER, {"group_norm_apply": 16, "linear": 4, "qkv": 0, "softmax": 0, "conv2d": 16}),
    ],
)
def test_the_emulated_unet_in_e4m3(taken, expected, monkeypatch) -> None:
    """Within a few percent of bfloat16, in the kernels that say so, and back to the same bits."""
    of = stream(dtype=torch.bfloat16, policy="torch")
    unet = of.denoiser.unet
    x = torch.randn(1, 28, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    level, context = torch.tensor([40.0]), torch.randn(1, 3, 24).bfloat16()
    launches: list[str] = []
    convolutions: list[tuple] = []
    original = conv2d_fp8.conv2d_fp8
    monkeypatch.setattr(
        conv2d_fp8, "conv2d_fp8", lambda *a, **kw: convolutions.append(a) or original(*a, **kw)
    )

    def out() -> torch.Tensor:
        launches.clear()
        with torch.no_grad(), use("ptx-emulated"), going(taken):
            keys = unet.context_keys(context, lasting=True)
            with loader.watched(lambda *a: launches.append(a[1])):
                return unet(x, level, keys).float()

    bf16 = out()
    assert not convolutions and not any("e4m3" in name for name in launches)
    scales = of.use_fp8(clip(2))
    assert all(0 < scale < 1 for scale in scales.values())
    quantised = out()
    names = Counter(name for name in launches if "e4m3" in name)
    found = {
        "group_norm_apply": names["group_norm_apply_to_e4m3_bf16"],
        "linear": names["linear_e4m3"] + names["linear_with_e4m3_e4m3"],
        "qkv": names["linear_norm_e4m3"],
        "softmax": names["linear_norm_softmax_to_e4m3_e4m3"],
        "conv2d": len(convolutions),
    }
    assert found == expected, names
    assert names["geglu_norm_to_e4m3_e4m3"] + names["geglu_norm_to_e4m3_bf16"] == 4
    error = ((quantised - bf16).norm() / bf16.norm()).item()
    assert 1e-3 < error < 0.15, error
    of.use_fp8(None)
    assert torch.equal(out(), bf16)


def test_every_layer_that_can_is_calibrated() -> None:
    """And the same ones from torch's kernels as from those here."""
    found = [
        set(stream(dtype=torch.bfloat16, policy=policy).use_fp8(clip(1)))
        for policy in ("torch", "ptx-emulated")
    ]
    assert found[0] >= found[1]  # proj_out reads no rows where it is merged
    for part in (".conv1", ".conv2", ".to_qkv", ".to_q", ".proj_in", "net.0.proj", "net.2"):
        assert any(name.endswith(part) for name in found[1]), part


@pytest.mark.parametrize("taken", [MERGED, RAW, FOLDED], ids=["products", "raw", "folded"])
def test_live_changes_in_e4m3(taken) -> None:
    """Prompt and deltas, in place: what a fresh stream with those scales computes, bit by bit."""
    with going(taken):
        live_changes()


def live_changes() -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"
    x = torch.randn(1, 28, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)

    def change(of: FrameStream) -> None:
        weights = dict(of.denoiser.named_parameters())
        of.set_deltas({name: torch.ones_like(weights[name]) for name in names}, 0.1)
        of.set_style(2)

    def out(of: FrameStream) -> torch.Tensor:
        with torch.no_grad(), use("ptx-emulated"):
            return of.denoiser.unet(x, of._settings.conditions[0].biases, of._settings.keys)

    live, fresh = (stream(dtype=torch.bfloat16, policy="ptx-emulated") for _ in range(2))
    names = [name, name.replace("to_out.0", "to_q"), name.replace("attn2", "attn1")]
    names += [f"unet.up_blocks.0.resnets.0.{conv}.weight" for conv in ("conv2", "conv_shortcut")]
    names += [
        "unet.mid_block.attentions.0.proj_out.weight",
        "unet.mid_block.resnets.0.conv1.weight",
    ]
    scales = live.use_fp8(clip(1))
    before = out(live)
    places = [t.data_ptr() for t in live._settings.tensors()]
    change(live)
    assert [t.data_ptr() for t in live._settings.tensors()] == places
    fp8.use(fresh.denoiser, scales)
    change(fresh)
    assert torch.equal(out(live), out(fresh)) and not torch.equal(out(live), before)
    live.set_deltas({})
    live.set_style(0)
    assert torch.equal(out(live), before)


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
