"""fp8 as a choice: products in e4m3 in the convolutions and feed-forwards that were calibrated.

    scales = calibrate(stream, frames)      the largest value each layer reads, over a clip
    use(stream.denoiser, scales)            those layers multiply e4m3 from now on; {}: none does

A layer's activations share one scale, its weight has one for each output channel, or one in all
where a LayerNorm is folded into it. Taken are the convolutions behind a GroupNorm and what a
transformer multiplies but for attention itself and the projection behind self-attention; the first
and the last convolution, those without a norm and the autoencoder stay in bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 448.0  # of e4m3
# Later frames may be larger than the clip's: past 448 scales values saturate. e4m3 has exponents of
# its own, so headroom costs no mantissa: of 448 / 2 a value is normal down to 1 / 14,000.
HEADROOM = 2.0
OUTPUT = ":output"  # after a layer's name: the scale of what it makes, where that is read raw
Maxima = dict[tuple[nn.Module, str], Tensor]  # (layer, "" for what it reads, or OUTPUT)
_maxima: ContextVar[Maxima | None] = ContextVar("fp8 maxima", default=None)


def scale_of(layer: nn.Module) -> float | None:
    """The scale of the layer's input in e4m3; None: it multiplies in the model's dtype."""
    return layer.__dict__.get("_fp8_scale")


def output_scale_of(layer: nn.Module) -> float | None:
    """The scale of the layer's output in e4m3; None: no convolution without a norm reads it."""
    return layer.__dict__.get("_fp8_output_scale")


def scales(denoiser: nn.Module) -> dict[str, float]:
    """The scale of what each layer reads in e4m3, by its name, and of what it makes."""
    found = {name: scale_of(layer) for name, layer in denoiser.named_modules()}
    found |= {name + OUTPUT: output_scale_of(m) for name, m in denoiser.named_modules()}
    return {name: scale for name, scale in found.items() if scale is not None}


def in_use(layer: nn.Module) -> bool:
    """Whether any layer of its network multiplies in e4m3."""
    return bool(layer.__dict__.get("_fp8_in_use"))


def note(layer: nn.Conv2d | nn.Linear, x: Tensor) -> None:
    """While a clip is calibrated: the largest value of what the layer reads."""
    if layer.weight.shape[0] % 8 == 0:  # the last convolution has 4 outputs
        _note((layer, ""), x)


def note_output(layer: nn.Module, x: Tensor) -> None:
    """The same of what the layer made, by what reads it without a norm."""
    _note((layer, OUTPUT), x)


def _note(what: tuple[nn.Module, str], x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    maxima = _maxima.get()
    if maxima is not None:
        largest = x.detach().abs().amax().float()
        before = maxima.get(what)
        maxima[what] = largest if before is None else torch.maximum(before, largest)


@contextlib.contextmanager
def noted() -> Iterator[Maxima]:
    """Within the block layers that could multiply in e4m3 note the largest value they read."""
    maxima: Maxima = {}
    token = _maxima.set(maxima)
    try:
        yield maxima
    finally:
        _maxima.reset(token)


def calibrate(stream: Any, frames: Iterable[Any]) -> dict[str, float]:
    """Scales by the layer's name in the denoiser, from frames pushed in closed loop.

    stream: a FrameStream, whose layers multiply in its own dtype now.

    Raises:
        ValueError: no frames.
    """
    with noted() as maxima:
        for frame in frames:
            stream.push_eagerly(frame)
    if not maxima:
        raise ValueError("calibrate: no layer was read; give at least one frame")
    return scales_for(stream.denoiser, maxima)


def scales_for(network: nn.Module, maxima: Maxima) -> dict[str, float]:
    """Scales by the layer's name in the network, of what `noted` found of its layers."""
    names = {module: name for name, module in network.named_modules()}
    return {
        names[layer] + what: max(HEADROOM * float(largest), 1e-6) / LARGEST
        for (layer, what), largest in maxima.items()
        if layer in names
    }


def use(denoiser: nn.Module, scales: Mapping[str, float]) -> None:
    """Multiply in e4m3 with these scales in these layers, and in no other.

    Raises:
        ValueError: a name that the denoiser does not have.
    """
    layers = dict(denoiser.named_modules())
    unknown = sorted({name.removesuffix(OUTPUT) for name in scales} - set(layers))
    if unknown:
        raise ValueError(f"fp8.use: the denoiser has no layer {unknown[0]}; calibrate it again")
    for name, layer in layers.items():
        layer.__dict__["_fp8_in_use"] = bool(scales)
        for key, kept in ((name, "_fp8_scale"), (name + OUTPUT, "_fp8_output_scale")):
            layer.__dict__.pop(kept, None)
            if key in scales:
                layer.__dict__[kept] = float(scales[key])
