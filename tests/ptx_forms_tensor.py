"""Tensor-map instruction forms: tiled and im2col loads, stores, reductions, every swizzle."""

from dataclasses import replace

import numpy as np
import torch
from ptx_forms import Form, Map, seed_of
from ptx_forms_pieces import (
    SMEM_BYTES,
    THREADS,
    TO_ASYNC_PROXY,
    blank_shared,
    by_leader,
    dump_shared,
    elements,
    entry,
    fill_shared,
    init_barrier,
    wait_barrier,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KINDS = {BF16: "bf16", F16: "f16", F32: "f32"}

# tensor shape (outermost first), box (innermost first), element strides, swizzle, type, coordinates
TILED = (
    ((256,), (64,), None, 0, F32, ((0,), (-16,), (224,))),
    ((50, 72), (64, 16), None, 128, BF16, ((0, 0), (48, 40), (-8, -3), (72, 0))),
    ((50, 72), (32, 16), None, 64, F16, ((0, 0), (56, 44), (-8, 5))),
    ((50, 72), (16, 16), None, 32, BF16, ((8, 3), (64, 48))),
    ((50, 72), (8, 16), None, 0, BF16, ((8, 3), (64, 48))),
    ((40, 128), (128, 8), None, 128, torch.uint8, ((0, 0), (64, 36))),
    ((40, 64), (16, 8), None, 64, torch.int32, ((4, 2), (60, 36))),
    ((9, 33, 48), (16, 8, 3), None, 32, BF16, ((0, 0, 0), (40, 30, 8), (-8, -2, -1))),
    ((2, 12, 20, 64), (64, 8, 4, 1), None, 128, BF16, ((0, -1, -1, 0), (0, 17, 10, 1))),
    ((2, 12, 20, 64), (64, 8, 8, 1), (1, 2, 2, 1), 128, BF16, ((0, 0, 0, 0), (0, -1, -1, 1))),
    ((2, 12, 20, 64), (64, 7, 5, 1), (1, 3, 2, 1), 128, BF16, ((0, 1, 1, 0),)),
    ((2, 3, 4, 5, 16), (16, 4, 3, 2, 2), None, 0, F32, ((0, 0, 0, 0, 0), (0, 3, 2, 2, 1))),
)
# Boxes narrower than their swizzle.
NARROW = (
    ((50, 72), (32, 16), None, 128, BF16, ((0, 0),)),
    ((50, 72), (16, 16), None, 128, BF16, ((0, 0),)),
    ((50, 72), (16, 16), None, 64, BF16, ((0, 0),)),
    ((50, 72), (8, 16), None, 32, BF16, ((0, 0),)),
)
# Innermost coordinates that are no multiple of 16 bytes, inside and across the edge.
UNALIGNED = (
    ((50, 72), (64, 16), None, 128, BF16, ((1, 2), (-3, 2), (4, 0), (12, 0))),
    ((50, 72), (8, 16), None, 0, BF16, ((1, 3), (4, 3), (66, 3), (70, 48))),
    ((50, 72), (16, 16), None, 32, BF16, ((2, 3),)),
    ((40, 64), (16, 8), None, 64, F32, ((1, 2), (2, 2))),
    ((40, 128), (128, 8), None, 128, torch.uint8, ((1, 2), (8, 2))),
)
MAP_ADDRESS = """
    mov.b64 %map, p_map0;
    cvta.param.u64 %map, %map;
    prefetch.tensormap [%map];"""


def item_bytes(dtype):
    return torch.empty(0, dtype=dtype).element_size()


def tensor(shape, dtype, seed, style="exact"):
    """Raw words of a tensor."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == torch.int32:
        return rng.integers(0, 1 << 31, count).astype(np.uint32)
    return elements(KINDS.get(dtype, "s8"), rng, count, style)


def coordinate_text(coordinates):
    return "{" + ", ".join(str(c) for c in coordinates) + "}"


def tensor_form(name, lines, shape, made, image_bytes, outputs, group, style="exact"):
    """Arguments: the tensor (with its map) and an image of shared memory."""
    dtype = made.dtype

    def arguments():
        data = tensor(shape, dtype, seed_of(name), style)
        kind, rng = KINDS.get(dtype, "s8"), np.random.default_rng(seed_of(name) + 1)
        count = image_bytes // elements(kind, rng, 1).itemsize
        image = elements(kind, rng, count, style).view(np.uint8)
        return [data, image if outputs == (0,) else np.zeros(image_bytes, np.uint8)]

    options = {"block": (THREADS, 1, 1), "smem_bytes": SMEM_BYTES, "target": "sm_90a"}
    body = entry(1, 2, *lines)
    return Form(name, body, arguments, outputs, maps=(made,), group=group, **options)


def load_form(name, at, nbytes, image_bytes, shape, made, group, mode="tile", taps=None):
    """Load a box over blank shared memory; dump all of it."""
    rank = len(shape)
    op = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.{mode}.mbarrier::complete_tx::bytes"
    declare, prepare, offsets = "", "", ""
    if taps:
        declare, offsets = "    .reg .b16 %tap<2>;", ", {%tap0, %tap1}"
        prepare = f"    mov.u16 %tap0, {taps[0]};\n    mov.u16 %tap1, {taps[1]};"
    issue = f"""
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {nbytes};
    {op} [%sm], [%map, {coordinate_text(at)}], [%bar]{offsets};"""
    lines = [declare, blank_shared(image_bytes), init_barrier(), MAP_ADDRESS, prepare]
    lines += [by_leader(issue), wait_barrier(), dump_shared(1, image_bytes)]
    return tensor_form(name, lines, shape, made, image_bytes, (1,), group)


def store_form(name, at, image_bytes, shape, made, group, reduction=None, style="exact"):
    """Fill shared memory; store or reduce a box of it into the tensor."""
    verb = "cp.reduce.async.bulk.tensor" if reduction else "cp.async.bulk.tensor"
    middle = f".{reduction}" if reduction else ""
    op = f"{verb}.{len(shape)}d.global.shared::cta{middle}.tile.bulk_group"
    issue = f"""
    {op} [%map, {coordinate_text(at)}], [%sm];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
    lines = [fill_shared(1, image_bytes), TO_ASYNC_PROXY, "    mov.u32 %sm, smem;", MAP_ADDRESS]
    lines += [by_leader(issue)]
    return tensor_form(name, lines, shape, made, image_bytes, (0,), group, style)


def tiled_forms(cases, label, group):
    """Loads everywhere; stores where no coordinate is negative (the hardware refuses those)."""
    for case, (shape, box, steps, swizzle, dtype, places) in enumerate(cases):
        inner = box[0] * item_bytes(dtype)
        counts = [-(-b // s) for b, s in zip(box, (1, *(steps or box)[1:]), strict=True)]
        counts = list(box) if steps is None else counts
        rows = int(np.prod(counts[1:]))
        # Rows narrower than the swizzle take its whole span.
        image_bytes = -(-rows * max(inner, swizzle) // 512) * 512 + 512
        made = Map(0, shape, dtype, box, swizzle, steps)
        title = str(dtype).split(".")[1]
        for at in places:
            name = f"{len(shape)}d {title} {label} {case} swizzle {swizzle} at {at}"
            args = (image_bytes, shape, made)
            yield load_form(f"tensor load {name}", at, inner * rows, *args, f"{group}_load")
            if min(at) >= 0:
                yield store_form(f"tensor store {name}", at, *args, f"{group}_store")


def reductions():
    cases = [(op, torch.int32) for op in ("add", "min", "max", "and", "or", "xor", "inc", "dec")]
    cases += [(op, dtype) for op in ("add", "min", "max") for dtype in (BF16, F16)]
    cases += [("add", F32)]
    for op, dtype in cases:
        shape, box = (20, 128 // item_bytes(dtype)), (64 // item_bytes(dtype), 16)
        made = Map(0, shape, dtype, box, 64)
        for style in ("exact",) if dtype == torch.int32 else ("exact", "bits"):
            name = f"tensor reduce {op} {str(dtype).split('.')[1]} {style}"
            yield store_form(name, (8, 10), 2048, shape, made, "tensor_reduce", op, style)


# corners lower, upper (W, H); element strides; taps (s, r); first positions (w, h, n)
IM2COL = (
    # padding 1
    ((-1, -1), (-1, -1), None, ((0, 0), (2, 1), (1, 2)), ((-1, -1, 0), (4, 3, 0), (9, 6, 1))),
    # no padding
    ((0, 0), (-2, -2), None, ((0, 0), (2, 2)), ((0, 0, 0), (5, 6, 1))),
    # padding 1, stride 2
    ((-1, -1), (-1, -1), (1, 2, 2, 1), ((0, 0), (2, 1)), ((-1, -1, 0), (3, 5, 1))),
    # padding 2, dilation 2
    ((-2, -2), (-2, -2), None, ((0, 0), (4, 2)), ((-2, -2, 0), (1, 0, 1))),
    # stride 2 from a position off the grid of the strides
    ((-1, -1), (-1, -1), (1, 2, 2, 1), ((1, 1),), ((0, -1, 0), (1, 2, 0))),
)


def im2col_forms():
    """3x3 convolutions; tiles that start anywhere and cross images."""
    shape = (2, 9, 12, 64)  # N, H, W, C
    for case, (lower, upper, steps, taps, starts) in enumerate(IM2COL):
        for channels, pixels, swizzle in ((64, 32, 128), (32, 40, 64), (8, 24, 0)):
            corners = (lower, upper, channels, pixels)
            made = Map(0, shape, BF16, swizzle=swizzle, element_strides=steps, im2col=corners)
            nbytes = channels * pixels * 2
            image_bytes = -(-nbytes // 512) * 512
            for tap in taps:
                for w, h, n in starts:
                    where = f"channels {channels} tap {tap[0]}{tap[1]} at {w} {h} {n}"
                    at = (0 if channels == 64 else 16, w, h, n)
                    args = (at, nbytes, image_bytes, shape, made, "im2col", "im2col", tap)
                    yield load_form(f"im2col case {case} {where}", *args)


def im2col_probes():
    """First channels that are no multiple of 16 bytes, and the 32-byte swizzle."""
    shape, pixels = (2, 9, 12, 64), 24
    cases = (
        ("unaligned at 1", 1, 8, 0),
        ("unaligned at 4", 4, 8, 0),
        ("unaligned at 60", 60, 8, 0),
    )
    for name, first, channels, swizzle in (*cases, ("swizzle 32", 16, 16, 32)):
        made = Map(0, shape, BF16, (), swizzle, None, ((-1, -1), (-1, -1), channels, pixels))
        at, nbytes = (first, 4, 3, 0), channels * pixels * 2
        group = f"im2col_{name.split()[0]}"
        args = (at, nbytes, 1024, shape, made, group, "im2col", (0, 0))
        oracle = im2col_walk(at, shape, channels, pixels, 1024, swizzle)
        yield replace(load_form(f"im2col {name}", *args), oracle=oracle)


def im2col_walk(at, shape, channels, pixels, image_bytes, swizzle):
    """Oracle of a 3x3, padding 1 column from `at` for the first tap.

    A swizzle of 32 bytes exchanges the 16-byte halves of a row where address bit 7 is set.
    """

    def oracle(data):
        values = data.reshape(shape)
        box = np.zeros((pixels, channels), data.dtype)
        first, w, h, n = at
        for pixel in range(pixels):
            for channel in range(channels):
                place = (n, h, w, first + channel)
                if all(0 <= p < extent for p, extent in zip(place, shape, strict=True)):
                    box[pixel, channel] = values[place]
            w += 1
            if w == shape[2] - 1:
                w, h = -1, h + 1
            if h == shape[1] - 1:
                h, n = -1, n + 1
        image = np.full(image_bytes, 0xEE, np.uint8)
        offset = np.arange(box.nbytes)
        image[offset ^ (offset >> 3 & (16 if swizzle else 0))] = box.reshape(-1).view(np.uint8)
        return [image]

    return oracle


def forms():
    """Every form of a tensor map."""
    yield from tiled_forms(TILED, "case", "tensor")
    yield from tiled_forms(NARROW, "narrow", "tensor_narrow")
    yield from tiled_forms(UNALIGNED, "unaligned", "tensor_unaligned")
    yield from reductions()
    yield from im2col_forms()
    yield from im2col_probes()
