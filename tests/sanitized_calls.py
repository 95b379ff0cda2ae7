"""Small calls of every hand-written kernel, family by family: what sanitize.py runs.

The registry's own samples, and for kernels with tiles a few tiles that between them have every
value of every field. Inputs are drawn on the CPU and copied: torch launches no kernel of its own.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any

import sanitized_e4m3
import sanitizer_witnesses
import torch
from sanitized_call import ALLOWED, ALLOWED_FP8, BF16, SanitizedCall, draw
from torch import Tensor

from mirage_hello import reference
from mirage_hello.kernels import (
    attention_fp8,
    attention_mma,
    attention_sm90a,
    conv2d_fused,
    conv2d_sm90a,
    group_norm_apply,
    group_norm_launch,
    group_norm_plan,
    layer_norm_linear,
    linear_fp8,
    linear_sm90a,
    ops,
    product_sm80,
    prompt_attention,
)


def covering(choices: Iterable[Any], names: tuple[str, ...] = ()) -> list[Any]:
    """A few of the choices (dataclasses) with every value of every field, or of those named."""
    values = {
        c: {(f.name, getattr(c, f.name)) for f in fields(c) if not names or f.name in names}
        for c in choices
    }
    missing, found = set().union(*values.values()), []
    while missing:
        best = max(values, key=lambda c: len(values[c] & missing))
        missing -= values[best]
        found.append(best)
    return found


def samples(*names: str, backends: tuple[str, ...] = ("ptx", "cuda")) -> Iterator[SanitizedCall]:
    """Every PTX and CUDA C++ kernel of these ops on the op's samples."""
    for name in names:
        op = getattr(ops, name)
        for kernel in op.kernels:
            for dtype in (torch.float32, BF16):
                if kernel.backend not in backends or dtype not in kernel.dtypes:
                    continue
                for i, (args, kwargs) in enumerate(op.samples(torch.device("cpu"), dtype)):
                    bound = inspect.signature(op.reference).bind(*args, **kwargs)
                    bound.apply_defaults()
                    values = tuple(bound.arguments.values())
                    if kernel.supports and kernel.supports(op.describe(values, {})):
                        continue
                    label = f"{kernel.name} {str(dtype).removeprefix('torch.')} sample {i}"
                    out = torch.uint8 if name == "model_to_frame" else dtype
                    yield SanitizedCall(label, kernel.run, op.reference, values, ALLOWED[out])


def attention_hopper() -> Iterator[SanitizedCall]:
    """Every tile that choose_tile knows, with a ragged last one; some that it chooses."""
    page = attention_sm90a
    shapes: list[tuple[int, int, int, int, attention_sm90a.Tile | None]] = [
        (1, 1, 1, 64, None), (2, 7, 1000, 64, None), (3, 65, 129, 64, None), (8, 70, 200, 80, None),
    ]  # fmt: skip
    for d, m in product((40, 64, 80, 128, 160, 256), (77, 300)):
        for tile in page.candidates(m, d, BF16):
            # Two rows of tiles; 100 heads fill the card once, so that the second is a shorter one.
            heads, n = 100 if tile.short else 2, 64 * tile.warpgroups + 7
            shapes.append((heads, n, m, d, tile))
    for heads, n, m, d, tile in shapes:
        args = (draw(1, n, heads, d), draw(1, m, heads, d), draw(1, m, heads, d))
        args = tuple(a.contiguous() for a in args)
        run = partial(page.attention_sm90a, tile=tile)
        yield SanitizedCall(f"h{heads} {n}x{m} d{d} {tile}", run, reference.attention, args)


def attention_fp8_hopper() -> Iterator[SanitizedCall]:
    """Whole tiles as they are chosen, then tiles split along the keys."""
    tile, split = attention_fp8.Tile, partial(attention_fp8.attention_fp8, multiprocessors=4)
    tall = partial(split, tile=tile(3, 32, 2, 4, sums_in_shared=True))
    for n, m, h, d, run in [
        (130, 300, 2, 128, attention_fp8.attention_fp8),
        (70, 300, 2, 64, attention_fp8.attention_fp8),
        (1, 1, 1, 16, attention_fp8.attention_fp8),
        (20, 77, 1, 80, attention_fp8.attention_fp8),
        (130, 520, 1, 128, tall),
        (70, 520, 1, 64, partial(split, tile=tile(1, 32, 2, 4))),
    ]:
        (q, q_scale), (k, k_scale) = (
            attention_fp8.quantize(torch.randn(1, length, h, d)) for length in (n, m)
        )
        v, v_scale, v_mean = attention_fp8.quantize_values(torch.randn(1, m, h, d))
        args = (q, k, v, q_scale, k_scale, v_scale, v_mean)
        name = f"h{h} {n}x{m} d{d}"
        yield SanitizedCall(name, run, attention_fp8.reference, args, ALLOWED_FP8)


def attention_ampere() -> Iterator[SanitizedCall]:
    for run in (attention_mma.attention_sm80, attention_mma.attention_cuda):
        for h, n, m, d in [(2, 130, 300, 40), (2, 65, 77, 64), (2, 70, 129, 128), (1, 70, 70, 160)]:
            args = tuple(draw(1, length, h, d).contiguous() for length in (n, m, m))
            name = f"{run.__name__} h{h} {n}x{m} d{d}"
            yield SanitizedCall(name, run, reference.attention, args)


def conv2d_hopper() -> Iterator[SanitizedCall]:
    for window, stride in [(3, 1), (3, 2), (1, 1)]:
        pad, p, q = window // 2, -(-17 // stride), -(-13 // stride)
        weight = draw(88, 136, window, window, scale=(136 * window**2) ** -0.5)
        args = (draw(2, 136, 17, 13), weight, draw(88), stride, pad)
        args += (draw(2, 88), draw(2, 88, p, q))
        tiles = conv2d_sm90a.candidates(window**2 * 3, window, window, stride)
        for tile in covering(tiles):
            run = partial(conv2d_sm90a.conv2d_sm90a, tile=tile)
            name = f"{window}x{window} stride {stride} {tile}"
            yield SanitizedCall(name, run, reference.conv2d, args)
    for upsample in (False, True):
        args = (draw(1, 72, 9, 10), draw(88, 96, 3, 3, scale=0.034), None, 1, 1, None, None)
        args += (draw(1, 24, 9, 10), upsample)
        run = conv2d_sm90a.conv2d_sm90a
        yield SanitizedCall(f"skip upsample={upsample}", run, reference.conv2d, args)


def conv2d_normalising() -> Iterator[SanitizedCall]:
    """Normalised while it is read, of one input and two; sums and SiLU on the way out."""
    for skip, upsample in [(False, False), (True, False), (True, True)]:
        x, more = draw(2, 64, 10, 12) + 1, draw(2, 32, 10, 12) if skip else None
        channels = 96 if skip else 64
        sums, skip_sums = (conv2d_fused.sums_torch(t, 2) if t is not None else None
                           for t in (x, more))  # fmt: skip
        norm = conv2d_fused.Norm(sums, 16, draw(channels), draw(channels), skip_sums)
        weight = draw(80, channels, 3, 3, scale=(9 * channels) ** -0.5)
        args = (x, weight, draw(80), 1, 1, draw(2, 80), None, more, upsample, norm, 10, "silu")
        truth = first_of(conv2d_fused.conv2d_fused_torch)
        run = first_of(conv2d_sm90a.conv2d_fused_sm90a)
        name = f"skip={skip} upsample={upsample}"
        yield SanitizedCall(name, run, truth, args)


def conv2d_beside_a_shortcut() -> Iterator[SanitizedCall]:
    """K blocks of another window and of one or two more tensors, split before, at and past them."""
    for split, second in [(1, 0), (2, 40), (5, 128)]:
        x, short = draw(2, 72, 9, 11), draw(2, 128, 9, 11)
        skip = draw(2, second, 9, 11) if second else None
        weight = draw(80, 72, 3, 3, scale=648**-0.5)
        beside = draw(80, 128 + second, 1, 1, scale=(128 + second) ** -0.5)
        tile = conv2d_sm90a.Tile(2, 80, split, patch=True)
        run = first_of(partial(with_a_shortcut, conv2d_sm90a.conv2d_fused_sm90a, tile=tile))
        truth = first_of(partial(with_a_shortcut, conv2d_fused.conv2d_fused_torch))
        args = (x, weight, draw(80), short, beside, skip)
        yield SanitizedCall(f"shortcut split {split}, {second} of skip", run, truth, args)


def with_a_shortcut(
    run: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor, *short: Any, **options: Any
) -> Any:
    shortcut = conv2d_fused.Shortcut(*short)
    return run(x, weight, bias, 1, 1, unit=10, shortcut=shortcut, **options)


def first_of(run: Callable[..., tuple]) -> Callable[..., Tensor]:
    return lambda *args: run(*args)[0]


def given_sums() -> Iterator[SanitizedCall]:
    for skip in (None, draw(2, 32, 10, 12)):
        x = draw(2, 64, 10, 12) + 1
        found = [conv2d_fused.sums_torch(t, 2) for t in (x, skip) if t is not None]
        channels = 64 if skip is None else 96
        rest = dict(skip_sums=found[1]) if skip is not None else {}
        norm = conv2d_fused.Norm(found[0], 16, draw(channels), draw(channels), **rest)
        run, truth = group_norm_apply.group_norm_apply, group_norm_apply.torch_form
        yield SanitizedCall(f"skip={skip is not None}", run, truth, (x, norm, skip))
        rounded = partial(in_e4m3, unit=1 / 16)  # 3 mantissa bits: 2^-4 of a value at most
        name = f"to e4m3 skip={skip is not None}"
        yield SanitizedCall(name, rounded, truth, (x, norm, skip), ALLOWED_FP8)


def in_e4m3(x: Tensor, norm: conv2d_fused.Norm, skip: Tensor | None, unit: float) -> Tensor:
    return unit * group_norm_apply.group_norm_apply(x, norm, skip, out_scale=unit).float()


def folded_linear() -> Iterator[SanitizedCall]:
    """layer_norm in the product, by its own statistics and by sums of the linear before; a softmax
    in its epilogue; e4m3 products."""
    x, weight = draw(300, 640) + 1, draw(176, 640, scale=0.04)
    folded = layer_norm_linear.fold(draw(640), draw(640), weight, draw(176))
    run, truth = layer_norm_linear.layer_norm_linear, layer_norm_linear.layer_norm_linear_torch
    yield SanitizedCall("layer_norm linear", run, truth, (x, folded, draw(300, 176)))
    run, truth = layer_norm_linear.layer_norm_geglu, layer_norm_linear.layer_norm_geglu_torch
    yield SanitizedCall("layer_norm geglu", run, truth, (x, folded))
    yield SanitizedCall(
        "sums", behind_linear, behind_torch, (x, draw(640, 640, scale=0.04), folded)
    )
    weights = draw(640), draw(640), draw(640, 640, scale=0.04), draw(77, 1280)
    prompt = prompt_attention.fold(*weights, draw(640, 640, scale=0.04), heads=8)
    run, truth = prompt_attention.probabilities, prompt_attention.probabilities_torch
    yield SanitizedCall("prompt's softmax", run, truth, (x, prompt, 1e-5))
    packed = linear_fp8.pack(weight, linear_fp8.calibrate([x]), draw(176))
    q, truth = linear_fp8.quantize(x, packed.x_scale), linear_fp8.linear_fp8_torch
    yield SanitizedCall("e4m3", linear_fp8.linear_fp8, truth, (q, packed, draw(300, 176)))


def behind_linear(x: Tensor, first: Tensor, folded: layer_norm_linear.FoldedLinear) -> Tensor:
    made, sums = linear_sm90a.linear_summed(x, first, None, x)
    return layer_norm_linear.layer_norm_linear(made, folded, sums=sums)


def behind_torch(x: Tensor, first: Tensor, folded: layer_norm_linear.FoldedLinear) -> Tensor:
    return layer_norm_linear.layer_norm_linear_torch(x + x @ first.T, folded)


def linear_hopper() -> Iterator[SanitizedCall]:
    x, weight = draw(300, 712), draw(176, 712, scale=712**-0.5)
    for gated in (False, True):
        args = (x, weight, draw(176)) if gated else (x, weight, draw(176), draw(300, 176))
        for tile in covering(linear_sm90a.candidates(12, gated)):
            run = linear_sm90a.geglu_sm90a if gated else linear_sm90a.linear_sm90a
            truth = reference.geglu if gated else reference.linear
            name = f"{'geglu' if gated else 'linear'} {tile}"
            yield SanitizedCall(name, partial(run, tile=tile), truth, args)


def product_ampere() -> Iterator[SanitizedCall]:
    convolutions = [
        (draw(2, 72, 17, 13), draw(88, 72, 3, 3, scale=0.04), draw(88), stride, 1)
        for stride in (1, 2)
    ]
    linear = (draw(150, 600), draw(88, 600, scale=0.04), draw(88), draw(150, 88))
    for source, tile in product(
        (product_sm80.cuda_source, product_sm80.ptx_source), product_sm80.TILES
    ):
        for run, truth, args in [
            (product_sm80.linear_with(source), reference.linear, linear),
            (product_sm80.geglu_with(source), reference.geglu, linear[:3]),
            *((product_sm80.conv2d_with(source), reference.conv2d, c) for c in convolutions),
        ]:
            name = f"{source.__name__} {truth.__name__} {tile}"
            yield SanitizedCall(name, partial(run, tile=tile), truth, args)


def group_norm_plans() -> Iterator[SanitizedCall]:
    """Both layouts, one pass and two, every cluster size and staging."""
    names = ("passes", "cluster", "staging", "blocks_per_sm")
    for channels_last in (True, False):
        x = draw(2, 64, 24, 16) if channels_last else draw(2, 64, 24, 16).contiguous()
        weight, bias = draw(64), draw(64)
        shape = group_norm_plan.Shape(2, 64, 384, 8, 2, channels_last)
        for plan in covering(group_norm_plan.plans(shape), names):
            for program_of in (group_norm_launch.ptx_program, group_norm_launch.cuda_program):
                if plan.staging == "shared" and program_of is group_norm_launch.cuda_program:
                    continue

                def run(
                    x: Tensor,
                    weight: Tensor,
                    bias: Tensor,
                    shape: Any = shape,
                    plan: Any = plan,
                    program_of: Any = program_of,
                ) -> Tensor:
                    out = torch.empty_like(x)
                    group_norm_launch.launch(
                        program_of, "group_norm_silu", shape, plan, (x, weight, bias, out), 1e-5
                    )
                    return out

                name = f"{program_of.__name__} {plan}"
                yield SanitizedCall(name, run, group_norm_silu_of_8, (x, weight, bias))


def group_norm_silu_of_8(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.group_norm_silu(x, 8, weight, bias, 1e-5)


def witnesses() -> Iterator[SanitizedCall]:
    for name in sanitizer_witnesses.PARTS:
        run = partial(sanitizer_witnesses.run, name)
        args = (torch.zeros(32, dtype=torch.int32),)
        yield SanitizedCall(name, run, lambda out: 131 - torch.arange(32), args)


ELEMENTWISE = (
    "add_noise", "axpby", "ddim_step", "euler_step", "frame_to_model", "guidance",
    "model_to_frame", "residual_add", "silu",
)  # fmt: skip

FAMILIES: dict[str, tuple[Callable[..., Iterator[SanitizedCall]], ...]] = {
    "attention sm_90a": (lambda: samples("attention", backends=("ptx",)), attention_hopper),
    "attention fp8": (attention_fp8_hopper,),
    "attention sm_80": (lambda: samples("attention", backends=("cuda",)), attention_ampere),
    "conv2d sm_90a": (lambda: samples("conv2d", backends=("ptx",)), conv2d_hopper),
    "conv2d fused": (conv2d_normalising, conv2d_beside_a_shortcut),
    "group_norm apply": (given_sums,),
    "linear folded": (folded_linear,),
    "e4m3": (sanitized_e4m3.convolutions, sanitized_e4m3.rows),
    "linear sm_90a": (lambda: samples("linear", "geglu", backends=("ptx",)), linear_hopper),
    "product sm_80": (
        lambda: samples("conv2d", "linear", "geglu", backends=("cuda",)),
        product_ampere,
    ),
    "group_norm": (lambda: samples("group_norm", "group_norm_silu"), group_norm_plans),
    "layer_norm": (lambda: samples("layer_norm"),),
    "elementwise": (lambda: samples(*ELEMENTWISE),),
    "witnesses": (witnesses,),
}


def calls(family: str) -> list[SanitizedCall]:
    """The calls of a family, from one seed: the processes of every tool run the same."""
    torch.manual_seed(0)
    return [call for part in FAMILIES[family] for call in part()]
