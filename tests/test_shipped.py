"""The weights in the package: whole, checked, loaded by name; and styles by name and mixture."""

import pytest
import torch
from training_driver import add_minute_model

from mirage_hello.model import checkpoint, shipped
from mirage_hello.model.data.city import HELD_OUT
from mirage_hello.model.data.styles import STYLES
from mirage_hello.model.data.worlds import WorldConfig, Worlds
from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.rollout import Rollout, quantised
from mirage_hello.model.stream import FrameStream
from mirage_hello.tools.errors import BadInput
from mirage_hello.tools.run import style_tokens


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with the weights of a minute model."""
    add_minute_model()
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    denoiser, autoencoder = build("minute", 3)
    checkpoint.save(tmp_path / "made.safetensors", denoiser, autoencoder)
    yield shipped.ship(tmp_path / "made.safetensors", "minute"), denoiser
    PRESETS.pop("minute")


def test_shipped_weights_are_loaded_and_trained(weights):
    _, made = weights
    denoiser, autoencoder = shipped.load("minute")
    assert shipped.names() == ["minute"] and denoiser.trained and autoencoder.trained
    assert torch.equal(denoiser.unet.conv_in.weight, made.unet.conv_in.weight)


def test_a_damaged_file_is_named(weights):
    path, _ = weights
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"minute.safetensors is damaged: its SHA-256 is .* again"):
        shipped.load("minute")
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"is damaged: .*\(100 bytes\)"):
        shipped.load("minute")


def test_missing_weights_are_one_sentence(weights):
    with pytest.raises(FileNotFoundError, match=r"no weights of 'large' in .*; give --checkpoint"):
        shipped.load("large")


def test_styles_by_name_number_and_mixture(weights):
    unet = build("minute")[0].unet
    clay = style_tokens("clay", unet)
    assert torch.equal(clay, unet.style(4)) and torch.equal(clay, style_tokens("4", unet))
    mixed = style_tokens("clay:3+snow_night", unet)
    torch.testing.assert_close(mixed, 0.75 * unet.style(4) + 0.25 * unet.style(3))
    for text, message in (("clay:0", "positive number"), ("clay:x", "positive number"),
                          ("clai", "clay"), ("clay+99", "0 to 7")):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            style_tokens(text, unet)


def test_the_package_ships_tiny_within_24_mb():
    file = shipped.path("tiny")  # checks the sum
    assert file.stat().st_size < 24_000_000
    denoiser, autoencoder = shipped.load("tiny")
    assert denoiser.trained and autoencoder.trained
    assert denoiser.unet.config == PRESETS["tiny"].unet
    assert all(torch.isfinite(p).all() for p in denoiser.parameters())
    assert "Limits" in (file.parent / "README.md").read_text()


def test_the_shipped_model_draws_each_style_as_its_truth():
    """A held-out world at 128 x 128, six frames from an empty memory, one step."""
    names = list(STYLES)
    worlds = Worlds(WorldConfig(128, 128, 1, cells=8, motion=False))
    clips = worlds.clips([HELD_OUT + 2] * len(names))
    denoiser, autoencoder = shipped.load("tiny")
    rollout = Rollout(denoiser, autoencoder, list(range(len(names))), 128, 128, steps=1)
    for frame in range(40, 46):
        shot = worlds.render(clips, [frame] * len(names), names)
        output = quantised(rollout.push(shot.view))
    # Of all the truths a style's own is the nearest (watercolour and clay are both pale, and the
    # palette is the clip's secret), and the picture is not merely grey.
    error = (output[:, None] - shot.target[None]).square().mean((2, 3, 4))
    assert (error.argmin(1) == torch.arange(len(names))).sum() >= 4
    grey = (0 * output - shot.target).square().mean((1, 2, 3))
    assert (error.diagonal() / grey).mean() < 0.7


def test_style_switches_live_and_mixes_between_two():
    """From the next frame on, in one stream; a mixture follows its share."""
    add_minute_model()
    denoiser, autoencoder = build("minute", 5)
    PRESETS.pop("minute")
    drawn = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=drawn)

    def second_frame(tokens: torch.Tensor | None) -> torch.Tensor:
        stream = FrameStream(denoiser, autoencoder, steps=2, seed=1, noise_correlation=0)
        stream.push(frame)
        if tokens is not None:
            stream.set_context(tokens)
        return torch.as_tensor(stream.push(frame)).float()

    start, end = second_frame(None), second_frame(denoiser.unet.style(4))
    assert not torch.equal(start, end)
    assert torch.equal(second_frame(denoiser.unet.style(0)), start)  # the default style

    def off(share: float) -> float:
        tokens = style_tokens(f"neon_city:{1 - share}+clay:{share}", denoiser.unet)
        return float((second_frame(tokens) - start).abs().mean())

    whole = float((end - start).abs().mean())
    assert off(0.02) < 0.3 * whole and off(0.98) == pytest.approx(whole, rel=0.3)
