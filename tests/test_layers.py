"""Fused layers against the same layers op by op, and weights made of weights."""

from collections import Counter

import pytest
import torch
from torch import nn

from mirage_hello.kernels import conv2d_fused, use
from mirage_hello.model import (
    Autoencoder,
    AutoencoderConfig,
    UNetConfig,
    VideoUNet,
    derived,
    layers,
    ways,
)
from mirage_hello.model.layers import Image, convolve
from mirage_hello.ptx import loader

# Groups of 4, 8 and, over two inputs, 12 and 16 channels: sums of 4.
CONFIG = UNetConfig(
    channels=(32, 64), heads=(2, 4), transformers=(True, False), context_dim=24, groups=8
)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def unet_inputs(h: int, w: int) -> tuple[torch.Tensor, ...]:
    return image(1, 28, h, w), torch.tensor([40.0]), torch.randn(1, 5, 24)


@pytest.mark.parametrize("on_load", [(), (1,), (1, 3)])
@pytest.mark.parametrize("size", [(8, 12), (9, 5)])
def test_a_fused_unet_is_the_plain_one(size, on_load, monkeypatch) -> None:
    unet, args, calls = VideoUNet(CONFIG).eval(), unet_inputs(*size), []
    original = conv2d_fused.conv2d_fused
    monkeypatch.setattr(
        conv2d_fused, "conv2d_fused", lambda *a, **kw: calls.append(kw) or original(*a, **kw)
    )
    with torch.no_grad():
        plain = unet(*args)
        assert not calls
        with ways.fusing("torch"), ways.going(ways.Ways(on_load=on_load)):
            fused = unet(*args)
    assert any(kw.get("norm") is not None for kw in calls) == bool(on_load)
    assert any(kw["unit"] for kw in calls)
    assert fused.shape == plain.shape and fused.dtype == plain.dtype
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4 * plain.std().item())


FUSED = ways.Ways(sums_from=0, folds_from=0, folds_q_from=0, merges_from=0)
APART = ways.Ways(*[2**31] * 4)
# Sums at 8 x 8 alone, the products behind a feed-forward of 64 channels merged.
MIXED = ways.Ways(sums_from=64, folds_from=64, folds_q_from=2**31, merges_from=64)
SEEN = ways.Ways(row_sums=False)


@pytest.mark.parametrize("taken", [FUSED, MIXED, APART, SEEN])
def test_the_emulated_kernels_make_the_same_unet(taken: ways.Ways) -> None:
    """Every kernel in the U-Net's own order: error at most twice the plain bfloat16's."""
    unet, args, names = VideoUNet(CONFIG).eval(), unet_inputs(8, 8), Counter()

    def note(name: str, entry: str, *rest) -> None:
        names[entry] += 1

    half = [args[0].bfloat16(), args[1], args[2].bfloat16()]
    with torch.no_grad():
        truth = unet(*args)
        unet = unet.bfloat16()
        plain = unet(*half)
        with use("ptx-emulated"), ways.going(taken), loader.watched(note):
            fused = unet(*half)
    # Of 31 norms 16 read 8 x 8 pixels; only the middle's transformer has a K in blocks of 64.
    assert names["group_norm_apply_bf16"] == {FUSED: 31, MIXED: 16, APART: 0, SEEN: 31}[taken]
    assert names["layer_norm_bf16"] == {FUSED: 15, MIXED: 16, APART: 18, SEEN: 15}[taken]
    assert names["row_statistics_bf16"] == {FUSED: 0, MIXED: 0, APART: 0, SEEN: 3}[taken]
    # Two products of each of six transformers are one where they merge.
    assert names["linear_bf16"] == {FUSED: 50, MIXED: 56, APART: 64, SEEN: 50}[taken]

    def error(out: torch.Tensor) -> float:
        return ((out.float() - truth).norm() / truth.norm()).item()

    assert error(fused) <= 2 * error(plain)


def test_a_fused_autoencoder_is_the_plain_one() -> None:
    autoencoder, frames = Autoencoder(AutoencoderConfig((8, 16, 16))), image(1, 3, 32, 24)
    with torch.no_grad():
        plain = autoencoder(frames)
        with ways.fusing("torch"):
            torch.testing.assert_close(autoencoder(frames), plain, rtol=1e-3, atol=1e-4)


def test_the_networks_compile_without_a_break() -> None:
    """torch.compile(fullgraph=True) is a peer: what chooses kernels must not be in its way."""
    unet, args = VideoUNet(CONFIG).eval(), unet_inputs(8, 8)
    autoencoder, frames = Autoencoder(AutoencoderConfig((8, 16, 16))), image(1, 3, 32, 24)
    with torch.no_grad():
        for function, inputs in ((unet, args), (autoencoder, (frames,))):
            compiled = torch.compile(function, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(*inputs), function(*inputs))


def test_units_of_the_presets() -> None:
    assert UNetConfig().sum_unit == 10
    assert CONFIG.sum_unit == 4
    # 7 channels a group: no pairs, so nothing is summed
    assert UNetConfig(channels=(224, 448, 832, 864), heads=(4, 8, 8, 9)).sum_unit == 0


def test_a_gradient_or_a_policy_keeps_the_ops_apart() -> None:
    with torch.enable_grad(), ways.fusing("torch"):
        assert ways.fused_backend(image(1, 8, 2, 2)) is None
    with torch.no_grad():
        assert ways.fused_backend(image(1, 8, 2, 2)) is None
        assert ways.fused_backend(image(1, 8, 2, 2).bfloat16()) is None  # a CPU


@pytest.mark.parametrize(("c_in", "c_out"), [(28, 32), (32, 4), (5, 3), (16, 16)])
def test_padded_channels_change_nothing(c_in: int, c_out: int) -> None:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1).to(memory_format=torch.channels_last)
    x = Image(image(2, c_in, 6, 5))
    with torch.no_grad():
        plain = convolve(x, conv).pixels
        with ways.fusing("torch"):
            wide = layers.padded(conv)[0]
            assert wide.shape[0] % 8 == 0 and wide.shape[1] % 8 == 0
            torch.testing.assert_close(convolve(x, conv).pixels, plain, rtol=1e-4, atol=1e-5)


def test_derived_weights_follow_their_sources_in_place() -> None:
    conv = nn.Conv2d(12, 4, 3)
    first, bias = layers.padded(conv)
    assert layers.padded(conv)[0] is first
    address = first.data_ptr()
    with torch.no_grad():
        conv.weight.mul_(2)
    derived.remake(nn.Sequential(conv))
    assert first.data_ptr() == address and torch.equal(first[:4, :12], conv.weight)
    assert layers.padded(conv)[0] is first and not first[4:].any() and not bias[4:].any()
    conv.to(torch.float64)
    assert layers.padded(conv)[0].dtype == torch.float64
