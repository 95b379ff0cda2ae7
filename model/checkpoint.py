"""Checkpoints: safetensors with the configuration in the metadata; and Stable Diffusion's U-Net.

A file holds `unet.<diffusers name>` and `autoencoder.<name>`, so that the U-Net's part is what
other tools expect: separate to_q, to_k, to_v. In memory they are packed (see `blocks`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mirage_hello.model.autoencoder import Autoencoder, AutoencoderConfig
from mirage_hello.model.blocks import channels_last
from mirage_hello.model.denoiser import Denoiser, DenoiserConfig
from mirage_hello.model.unet import UNetConfig, VideoUNet

FORMAT = "mirage-hello-1"


def pack_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """attn1's to_q, to_k, to_v -> to_qkv [3C, C]; attn2's to_k, to_v -> to_kv [2C, context]."""
    packed = dict(state)
    for name in state:
        if name.endswith("attn1.to_q.weight"):
            stem, parts, whole = name.removesuffix("to_q.weight"), "qkv", "to_qkv.weight"
        elif name.endswith("attn2.to_k.weight"):
            stem, parts, whole = name.removesuffix("to_k.weight"), "kv", "to_kv.weight"
        else:
            continue
        names = [f"{stem}to_{part}.weight" for part in parts]
        missing = [n for n in names if n not in packed]
        if missing:
            raise ValueError(f"pack_attention: the checkpoint has {name} but not {missing[0]}")
        packed[stem + whole] = torch.cat([packed.pop(n) for n in names])
    return packed


def unpack_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack_attention`: diffusers' names."""
    unpacked = {}
    for name, tensor in state.items():
        if name.endswith(("attn1.to_qkv.weight", "attn2.to_kv.weight")):
            stem, parts = name.removesuffix(".weight").rsplit("to_", 1)
            for part, matrix in zip(parts, tensor.chunk(len(parts)), strict=True):
                unpacked[f"{stem}to_{part}.weight"] = matrix
        else:
            unpacked[name] = tensor
    return unpacked


def widen_conv_in(weight: Tensor, channels: int) -> Tensor:
    """[O, c, R, S] -> [O, channels, R, S], the extra input channels 0: the same function at first.

    The new inputs (input frame, history, sink) get their influence by training, as in
    "Adding Conditional Control to Text-to-Image Diffusion Models" (Zhang et al. 2023).
    """
    extra = channels - weight.shape[1]
    if extra < 0:
        raise ValueError(
            f"widen_conv_in: the weight has {weight.shape[1]} input channels, more than {channels}"
        )
    return torch.cat([weight, weight.new_zeros(weight.shape[0], extra, *weight.shape[2:])], 1)


def load_stable_diffusion(unet: VideoUNet, state: Mapping[str, Tensor]) -> None:
    """Load a Stable Diffusion 1.5 U-Net (diffusers' names) into a `VideoUNet` of its shape.

    The widened input channels and the last layer of the history-noise embedding become 0, so that
    the network computes what Stable Diffusion does until it is trained further.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape; the text names it.
    """
    packed = pack_attention(state)
    own = unet.state_dict()
    if "conv_in.weight" in packed:
        packed["conv_in.weight"] = widen_conv_in(packed["conv_in.weight"], unet.config.in_channels)
    for name, tensor in own.items():
        if name.startswith("history_embedding."):
            packed[name] = torch.zeros_like(tensor) if "linear_2" in name else tensor
        elif name in ("style_table",):
            packed.setdefault(name, tensor)
        elif name in packed and packed[name].ndim == 2 and tensor.ndim == 4:
            packed[name] = packed[name][:, :, None, None]  # a linear proj_in, saved by newer tools
    _load(unet, packed, "Stable Diffusion U-Net")
    unet.trained = True


def save(
    path: str | os.PathLike[str],
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    trained: bool = True,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write both networks to one safetensors file; an old file stays until the new is whole.

    Args:
        trained: False marks weights whose pictures mean nothing yet.
        notes: more metadata, such as steps trained and data used.
    """
    path = Path(path)
    unet = denoiser.unet
    tensors = {f"unet.{k}": v for k, v in unpack_attention(unet.state_dict()).items()}
    tensors |= {f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    config = {
        "unet": asdict(unet.config),
        "autoencoder": asdict(autoencoder.config),
        "denoiser": asdict(denoiser.config),
    }
    metadata = {
        **(notes or {}),
        "format": FORMAT,
        "config": json.dumps(config),
        "trained": json.dumps(trained),
    }
    # Beside the target, so that the rename stays within one file system and is atomic.
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, beside, metadata)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Denoiser, Autoencoder]:
    """(denoiser, autoencoder) from a file that `save` wrote, in eval mode.

    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint of ours, cut short, or a
        tensor is missing, unknown or has another shape; the text names it, got and expected.
    """
    metadata, tensors = _read(path, dtype, device)
    try:
        config = json.loads(metadata["config"])
        with torch.device("meta"):  # no memory and no random numbers: every tensor is replaced
            unet = VideoUNet(UNetConfig(**_tuples(config["unet"])))
            autoencoder = Autoencoder(AutoencoderConfig(**_tuples(config["autoencoder"])))
        denoiser = Denoiser(unet, DenoiserConfig(**config["denoiser"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint {path}: its configuration cannot be read ({error}); expected the format "
            f"{FORMAT}, save the model again with this version"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "autoencoder": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ValueError(f"checkpoint {path}: unexpected tensor {name}")
        parts[part][rest] = tensor
    _load(unet, pack_attention(parts["unet"]), f"checkpoint {path}: unet", assign=True)
    _load(autoencoder, parts["autoencoder"], f"checkpoint {path}: autoencoder", assign=True)
    unet.trained = autoencoder.trained = json.loads(metadata.get("trained", "false")) is True
    return denoiser.eval(), autoencoder.eval()


def _read(
    path: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            # A copy: the file is mapped, and would crash us if somebody truncated it later.
            names = file.keys()
            tensors = {name: file.get_tensor(name).to(dtype, copy=True) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path}: not a whole safetensors file ({error}); it may have been cut "
            "short, copy or save it again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path}: format is {metadata.get('format')!r}, expected {FORMAT!r}; "
            "for Stable Diffusion weights use load_stable_diffusion"
        )
    return metadata, tensors


def _load(module: nn.Module, state: Mapping[str, Tensor], where: str, assign: bool = False) -> None:
    """load_state_dict with one sentence about the first tensor that does not fit."""
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise ValueError(f"{where}: tensor {name} is missing, expected {list(tensor.shape)}")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {list(state[name].shape)}, "
                f"expected {list(tensor.shape)}; the checkpoint belongs to another preset"
            )
    unknown = [name for name in state if name not in own]
    if unknown:
        raise ValueError(f"{where}: {len(unknown)} unknown tensors, the first is {unknown[0]}")
    module.load_state_dict(dict(state), assign=assign)
    channels_last(module)


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the configurations have no lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
