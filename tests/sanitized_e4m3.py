"""Small calls of what multiplies in e4m3, alone and as the layers of a network hand it on.

Truths read the tensors before they were rounded between two kernels: each rounding costs 2^-4 of a
value at most, about 2.6 % of the norm, so a call with n of them is allowed n times ALLOWED_FP8.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sanitized_call import ALLOWED_FP8, SanitizedCall, draw
from torch import Tensor

from mirage_hello.kernels import (
    conv2d_fp8,
    conv2d_fused,
    layer_norm_linear,
    linear_fp8,
    linear_sm90a,
    prompt_attention,
)
from mirage_hello.kernels.conv2d_tiles import Tile

UNIT = 1 / 64  # what 448 of e4m3 stand for: 7
PATCH = Tile(1, 80, patch=True, promote=2)
TILES = [
    PATCH,
    Tile(2, 80, split=2, patch=True, promote=9),
    Tile(1, 48, split=3, patch=True, promote=1, stages=3),
    Tile(1, 80, patch=True, persistent=True, promote=0),
    Tile(2, 32, promote=3),
]


def eight(*shape: int) -> Tensor:
    return conv2d_fp8.quantise(draw(*shape), UNIT)


def convolutions() -> Iterator[SanitizedCall]:
    """By tiles, with a copy of the output; beside a shortcut; merged products; down and up."""
    x, residual = eight(2, 144, 9, 11), draw(2, 80, 9, 11)
    weight = conv2d_fp8.quantise_weight(draw(80, 144, 3, 3, scale=1296**-0.5))
    given = (draw(80), 1, 1, draw(2, 80), residual)
    for tile in TILES:
        yield copied(f"copy {tile}", x, weight, *given, tile=tile)
    for split, patches in [(1, 6), (2, 2), (5, 4)]:
        tile = Tile(1, 80, split, patch=True, promote=2, patches=patches)
        wide = conv2d_fp8.quantise_weight(draw(80, 288, 1, 1, scale=1 / 17)).values
        args = (x, weight, draw(80), eight(2, 256, 9, 11), wide, eight(2, 32, 9, 11))
        run = partial(beside, tile=tile)
        yield SanitizedCall(f"shortcut {tile}", run, beside_torch, args, ALLOWED_FP8)
    products = conv2d_fp8.quantise_weight(draw(80, 160, 1, 1, scale=1 / 13))
    merged = (None, 1, 0, None, residual, eight(2, 32, 9, 11))
    yield copied("merged products", eight(2, 128, 9, 11), products, *merged)
    yield copied("down", x, weight, draw(80), 2, 1)
    yield copied("up", x, weight, draw(80), 1, 1, None, None, None, True)


def copied(name: str, x: Tensor, weight: conv2d_fp8.Weight, *args: Any, **options: Any) -> Any:
    """The convolution with sums and a copy in e4m3; the copy is what is judged."""
    run, truth = partial(with_a_copy, **options), conv2d_fp8.conv2d_fp8_torch
    return SanitizedCall(name, run, truth, (x, weight, UNIT, *args), ALLOWED_FP8)


def with_a_copy(x: Tensor, weight: conv2d_fp8.Weight, *args: Any, **options: Any) -> Tensor:
    stride, enlarged = args[2], 1 + (len(args) > 7 and args[7])
    p, q = (-(-n * enlarged // stride) for n in x.shape[2:])
    shape, layout = (len(x), len(weight.values), p, q), torch.channels_last
    copy = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    out, _ = conv2d_fp8.conv2d_fp8(x, weight, *args, unit=10, copy=(copy, UNIT), **options)
    assert torch.equal(copy.float(), conv2d_fp8.quantise(out, UNIT).float())
    return UNIT * copy.float()


def beside(x: Tensor, weight: Any, bias: Tensor, *short: Tensor, tile: Tile) -> Tensor:
    shortcut = conv2d_fused.Shortcut(*short)
    return conv2d_fp8.conv2d_fp8(
        x, weight, UNIT, bias, 1, 1, unit=10, shortcut=shortcut, tile=tile
    )[0]


def beside_torch(x: Tensor, weight: Any, bias: Tensor, first: Tensor, w: Tensor, skip: Any) -> Any:
    short = conv2d_fp8.Weight(w, weight.scales)
    out = conv2d_fp8.conv2d_fp8_torch(x, weight, UNIT, bias, 1, 1)
    return out + conv2d_fp8.conv2d_fp8_torch(torch.cat([first, skip], 1), short, UNIT)


def rows() -> Iterator[SanitizedCall]:
    """Rows with sums and a copy, by a linear in bfloat16 and one in e4m3; of the copy q, k and v, a
    gate and the softmax of a prompt; what reads the last two."""
    x, weight, residual = draw(300, 320), draw(320, 320, scale=0.06), draw(300, 320)
    packed = linear_fp8.pack(weight, UNIT, draw(320))
    gamma, beta = 1 + draw(320, scale=0.2), draw(320)
    folded = [layer_norm_linear.fold(gamma, beta, draw(n, 320, scale=0.06)) for n in (240, 512)]
    qkv, gate = (linear_fp8.fold(f, UNIT) for f in folded)
    out = linear_fp8.pack(draw(320, 256, scale=0.06), 4 * UNIT)
    weights = draw(320, 320, scale=0.06), draw(77, 640), draw(320, 320, scale=0.06)
    prompt = prompt_attention.quantise(
        prompt_attention.fold(gamma, beta, *weights, heads=4), UNIT, None
    )
    q = linear_fp8.quantize(x, UNIT)
    for name, first, args in [
        ("bf16", behind_bf16, (x, weight, residual)),
        ("e4m3", behind_e4m3, (q, packed, residual)),
    ]:
        for layer, more, count in [(qkv, None, 2), (gate, out, 4), (prompt, None, 4)]:
            run, truth = partial(first, exact=False), partial(first, exact=True)
            kind = "softmax" if layer is prompt else "gate" if more else "q, k, v"
            given = (*args, layer, more)
            yield SanitizedCall(f"{kind} of {name}", run, truth, given, count * ALLOWED_FP8)


def behind_bf16(x: Tensor, weight: Tensor, residual: Tensor, *layer: Any, exact: bool) -> Tensor:
    if exact:
        return reading(x @ weight.T + residual, None, *layer)
    made, sums = linear_sm90a.linear_summed(x, weight, None, residual, copy_scale=UNIT)
    return reading(made, sums, *layer)


def behind_e4m3(x: Tensor, packed: Any, residual: Tensor, *layer: Any, exact: bool) -> Tensor:
    if exact:
        out = linear_fp8.linear_fp8_torch(x, packed).double() + residual
        return reading(out, None, *layer)
    made, sums = linear_fp8.linear_fp8_summed(x, packed, residual, UNIT)
    return reading(made, sums, *layer)


def reading(x: Tensor, sums: Any, layer: Any, out: Any) -> Tensor:
    """What a layer makes of the rows x, by the kernels of their sums' copy, or exactly."""
    is_prompt = isinstance(layer, prompt_attention.Fp8Prompt)
    folded = layer.scores if is_prompt else layer
    if sums is None:
        made = linear_fp8.layer_norm_linear_fp8_torch(x, x / UNIT, folded)
    if is_prompt:
        if sums is not None:
            return linear_fp8.linear_fp8(
                prompt_attention.probabilities_fp8(sums, layer), layer.values
            )
        heads = made.unflatten(-1, (-1, layer.width)) * 0.6931471805599453
        return times(torch.softmax(heads, -1).flatten(-2), layer.values)
    if out is None:
        return made if sums is None else linear_fp8.layer_norm_linear_fp8(sums, folded)
    if sums is not None:
        return linear_fp8.linear_fp8(
            linear_fp8.layer_norm_geglu_fp8(sums, folded, out.x_scale), out
        )
    h, gate = made.chunk(2, -1)
    return times(h * torch.nn.functional.gelu(gate), out)


def times(x: Tensor, packed: linear_fp8.Fp8Linear) -> Tensor:
    """A linear in e4m3 of an x that is not rounded."""
    sums = x / packed.x_scale @ packed.weight.double().T
    return sums * packed.columns[:, 0].double() + packed.columns[:, 1].double()
