"""Checkpoints: round trip, names, errors that name the tensor, atomic writes, Stable Diffusion."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mirage_hello.model import (
    Autoencoder,
    AutoencoderConfig,
    Denoiser,
    DenoiserConfig,
    UNetConfig,
    VideoUNet,
    checkpoint,
)

UNET = UNetConfig(
    channels=(32, 64), heads=(2, 2), transformers=(True, True), context_dim=24, groups=8, styles=2
)


def model(seed: int = 0, unet: UNetConfig = UNET) -> tuple[Denoiser, Autoencoder]:
    torch.manual_seed(seed)
    denoiser = Denoiser(VideoUNet(unet), DenoiserConfig("eps", sigma_data=1.0))
    return denoiser, Autoencoder(AutoencoderConfig(channels=(8, 16, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype: torch.dtype) -> None:
    path, saved = tmp_path / "model.safetensors", model()
    checkpoint.save(path, *saved, notes={"steps": "7"})
    loaded = checkpoint.load(path, dtype)
    for before, after in zip(saved, loaded, strict=True):
        expected = before.to(dtype).state_dict()
        got = after.state_dict()
        assert list(got) == list(expected)
        assert all(torch.equal(got[k], expected[k]) for k in expected)
        assert after.config == before.config and after.trained
    assert loaded[0].unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_file_has_diffusers_names_and_the_configuration(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, *model(), trained=False, notes={"steps": "7"})
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert {f"{stem}.attn1.to_q.weight", f"{stem}.attn2.to_v.weight"} <= names
    assert not any("to_qkv" in name or "to_kv" in name for name in names)
    assert json.loads(metadata["config"])["unet"]["channels"] == [32, 64]
    assert metadata["steps"] == "7"
    assert not checkpoint.load(path)[0].trained


def test_packing_keeps_the_order_and_has_an_inverse() -> None:
    state = model()[0].unet.state_dict()
    unpacked = checkpoint.unpack_attention(state)
    packed = checkpoint.pack_attention(unpacked)
    assert set(packed) == set(state) and all(torch.equal(packed[k], state[k]) for k in state)
    stem = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert torch.equal(unpacked[f"{stem}.to_k.weight"], state[f"{stem}.to_qkv.weight"][64:128])
    with pytest.raises(ValueError, match=r"has a.attn1.to_q.weight but not a.attn1.to_k.weight"):
        checkpoint.pack_attention({"a.attn1.to_q.weight": torch.zeros(2, 2)})


def stable_diffusion(unet: VideoUNet) -> dict[str, torch.Tensor]:
    """What a Stable Diffusion checkpoint of this size would hold."""
    state = checkpoint.unpack_attention(unet.state_dict())
    state["conv_in.weight"] = state["conv_in.weight"][:, :4]
    extra = ("history_embedding.", "style_table")
    return {name: t.clone() for name, t in state.items() if not name.startswith(extra)}


def test_stable_diffusion_weights_load_and_ignore_the_added_inputs() -> None:
    unet = model(1)[0].unet
    state = stable_diffusion(unet)
    checkpoint.load_stable_diffusion(unet, state)
    assert unet.trained
    x, t, context = torch.randn(1, 28, 8, 8), torch.tensor([5.0]), torch.randn(1, 3, 24)
    other = torch.cat([x[:, :4], torch.randn(1, 24, 8, 8)], 1)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, context), unet(other, t, context, t))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv_out.bias", None, "tensor conv_out.bias is missing, expected \\[4\\]"),
        ("conv_out.bias", torch.zeros(5), "conv_out.bias has shape \\[5\\], expected \\[4\\]"),
        ("extra.weight", torch.zeros(1), "1 unknown tensors, the first is extra.weight"),
        ("conv_in.weight", torch.zeros(32, 29, 3, 3), "29 input channels, more than 28"),
    ],
)
def test_a_foreign_checkpoint_is_refused_by_tensor_name(name, value, message: str) -> None:
    unet = model()[0].unet
    state = stable_diffusion(unet)
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(ValueError, match=message):
        checkpoint.load_stable_diffusion(unet, state)


def copies(path) -> dict[str, torch.Tensor]:
    """The tensors of a file, not mapped to it: the tests overwrite it in place."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def test_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoint.load(path)
    checkpoint.save(path, *model())
    whole, tensors = path.read_bytes(), copies(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        checkpoint.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="format is None, expected 'mirage-hello-1'"):
        checkpoint.load(path)
    save_file(tensors, path, {"format": checkpoint.FORMAT, "config": "{"})
    with pytest.raises(ValueError, match="configuration cannot be read"):
        checkpoint.load(path)


def test_a_wrong_shape_names_the_tensor(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, *model())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = copies(path)
    tensors["unet.conv_in.bias"] = torch.zeros(3)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"conv_in.bias has shape \[3\], expected \[32\]"):
        checkpoint.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, *model())
    before = path.read_bytes()

    def full(tensors, name, metadata) -> None:
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, *model(1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
