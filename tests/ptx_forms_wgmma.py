"""wgmma instruction forms: every type, layout, swizzle, operand source and option.

Shared memory is filled with random values of the element types; descriptors pick from it.
"""

from functools import partial

import numpy as np
from ptx_forms import Form, kernel, parameters, seed_of
from ptx_forms_oracle import wgmma_tile
from ptx_forms_pieces import (
    REGISTERS,
    TO_ASYNC_PROXY,
    elements,
    fill_shared,
    load_registers,
    names,
    store_registers,
    words,
)

B_OFFSET = 16384
IMAGE_BYTES = 49152  # A in the first 16 KB, B in the other 32 KB
LAYOUT_CODE = {0: 0, 128: 1, 64: 2, 32: 3}

KERNEL = """
.visible .entry {entry}($params)
.reqntid 128, 1, 1
{
    $registers
    .reg .b32 %a<4>;
    .reg $accumulator %d<$count>;
    .reg .b64 %da, %db;
    mov.u32 %tx, %tid.x;
    mul.wide.u32 %lane4, %tx, 4;
    $fill
    $loads
    $descriptors
    setp.lt.u32 %p0, %tx, 128;
    setp.ge.u32 %p1, %tx, 128;
    wgmma.fence.sync.aligned;
    $instructions
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    $stores
    ret;
}"""

DESCRIPTOR = """
    mov.u32 %t0, smem;
    add.u32 %t0, %t0, $offset;
    shr.u32 %t0, %t0, 4;
    and.b32 %t0, %t0, 0x3FFF;
    cvt.u64.u32 %$register, %t0;
    or.b64 %$register, %$register, $bits;"""


def packed_offsets(span, mn_major, extent):
    """(LBO, SBO) of an operand of `extent` rows (or columns) packed tightly."""
    if not mn_major:
        return (16, 8 * span) if span else (128 * (extent // 8), 128)
    # MN-major: 16 k rows per atom column, 8 k rows per atom; without swizzle the roles swap.
    return (16 * span, 8 * span) if span else (128, 256)


def descriptor(register, offset, span, mn_major, extent, base_offset):
    lbo, sbo = packed_offsets(span, mn_major, extent)
    bits = (lbo >> 4) << 16 | (sbo >> 4) << 32 | base_offset << 49 | LAYOUT_CODE[span] << 62
    return kernel(DESCRIPTOR, register=register, offset=offset, bits=f"{bits:#x}")


def wgmma(name, kinds, n, *, span=128, trans=(0, 0), registers=False, style="exact", scale_d="1",
          scales=(1, 1), chain=1, start=(0, 0), base=(0, 0), **options):  # fmt: skip
    """One wgmma form.

    Args: kinds (d, a, b); span of both operands' swizzle; trans imm-trans bits; registers: A from
    registers; scale_d operand text; scales of a and b; chain: instructions that accumulate in a
    row; start bytes added to the operands' addresses; base the descriptors' base offsets; options
    of Form.
    """
    d, a, b = kinds
    count = n // 4 if d == "f16" else n // 2

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        image = np.concatenate(
            [filled(a, B_OFFSET, rng, style), filled(b, IMAGE_BYTES - B_OFFSET, rng, style)]
        )
        fragments = [words(a, rng, (4, 128), style), words(d, rng, (count, 128), style)]
        return [image, *fragments, np.zeros((count, 128), np.uint32)]

    op = instruction(kinds, n, count, registers, scale_d, scales, trans)
    body = kernel(
        KERNEL,
        params=parameters(4),
        registers=REGISTERS,
        accumulator=".f32" if d == "f32" else ".b32",
        count=count,
        fill=fill_shared(0, IMAGE_BYTES) + TO_ASYNC_PROXY,
        loads=load_registers("a", 4, 1, 128) + "\n" + load_registers("d", count, 2, 128),
        descriptors=descriptor("da", start[0], span, trans[0], 64, base[0])
        + "\n"
        + descriptor("db", B_OFFSET + start[1], span, trans[1], n, base[1]),
        instructions="\n".join([op] * chain),
        stores=store_registers("d", count, 3, 128),
    )
    shape = {"block": (128, 1, 1), "smem_bytes": IMAGE_BYTES, "target": "sm_90a"}
    return Form(name, body, arguments, (3,), **shape, **options)


def filled(kind, nbytes, rng, style):
    """A region of shared memory full of elements."""
    return elements(kind, rng, nbytes // elements(kind, rng, 1).itemsize, style).view(np.uint8)


def instruction(kinds, n, count, registers, scale_d, scales, trans):
    """The text of one wgmma.mma_async."""
    d, a, b = kinds
    sixteen = a in ("f16", "bf16")
    k = 16 if sixteen else 8 if a == "tf32" else 32
    immediates = [scale_d]
    if d != "s32":
        immediates += [str(s) for s in scales]
    if sixteen:
        immediates += [str(trans[1])] if registers else [str(t) for t in trans]
    source = names("a", 4) if registers else "%da"
    operands = f"{names('d', count)}, {source}, %db, {', '.join(immediates)}"
    return f"    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b} {operands};"


BF16 = ("f32", "bf16", "bf16")
FLOATS = (
    BF16,
    ("f32", "f16", "f16"),
    ("f16", "f16", "f16"),
    ("f32", "tf32", "tf32"),
    ("f32", "e4m3", "e4m3"),
    ("f32", "e5m2", "e4m3"),
    ("f16", "e4m3", "e4m3"),
)


def types_and_layouts():
    for kinds in (*FLOATS, ("s32", "s8", "s8"), ("s32", "u8", "s8")):
        options = {"group": "wgmma_types", "version": "8.4" if kinds[1] == "u8" else "8.0"}
        name = f"wgmma {'.'.join(kinds)} n64"
        for span in (0, 32, 64, 128):
            yield wgmma(f"{name} K-major swizzle {span}", kinds, 64, span=span, **options)
        yield wgmma(f"{name} A in registers", kinds, 64, registers=True, **options)
    for n in (8, 16, 24, 40, 80, 96, 112, 128, 160, 176, 256):
        form = partial(wgmma, kinds=BF16, n=n, group="wgmma_n")
        yield form(f"wgmma bf16 n{n} K-major")
        yield form(f"wgmma bf16 n{n} B MN-major", trans=(0, 1), registers=True)
    fp8 = {"group": "wgmma_n", "oracle": wgmma_tile(128, B_OFFSET)}
    yield wgmma("wgmma e4m3 n128 K-major", ("f32", "e4m3", "e4m3"), 128, **fp8)
    for span in (0, 32, 64, 128):
        for trans in ((0, 1), (1, 0), (1, 1)):
            for n in (40, 64):
                name = f"wgmma f16 n{n} trans {trans[0]}{trans[1]} swizzle {span}"
                options = {"span": span, "trans": trans, "group": "wgmma_mn_major"}
                yield wgmma(name, ("f32", "f16", "f16"), n, **options)


def scales_and_steps():
    form = partial(wgmma, kinds=BF16, group="wgmma_options")
    yield form("wgmma scale-d 0", n=16, scale_d="0")
    yield form("wgmma scale-d true", n=16, scale_d="%p0")
    yield form("wgmma scale-d false", n=16, scale_d="%p1")
    yield form("wgmma scale-a -1", n=16, scales=(-1, 1))
    yield form("wgmma scale-b -1", n=16, scales=(1, -1))
    yield form("wgmma scale-a, b -1", n=16, scales=(-1, -1), registers=True)
    for step in (32, 64, 96):
        yield form(f"wgmma K step of {step} bytes", n=32, start=(step, step))
    yield form("wgmma K step in 64-byte rows", n=32, span=64, start=(32, 32))


def accumulation():
    """What tensorcore.py was fitted on, and values at the edges of the formats."""
    for style in ("random", "wide", "bits"):
        options = {"style": style, "group": "wgmma_accumulate"}
        for kinds in FLOATS:
            name = f"wgmma {'.'.join(kinds)} {style}"
            yield wgmma(name, kinds, 64, **options)
            if style != "bits":
                yield wgmma(f"{name} chain", kinds, 32, chain=8, **options)


def unaligned_patterns():
    """B tiles that start `rows` rows into a swizzle pattern, with and without the base offset."""
    for span in (32, 64, 128):
        for rows in (1, 2, 4):
            start = rows * span
            for base in sorted({0, start >> 7 & 7}):
                name = f"wgmma swizzle {span} start at row {rows} base offset {base}"
                options = {"start": (0, start), "base": (0, base), "group": "wgmma_base_offset"}
                yield wgmma(name, BF16, 16, span=span, **options)


SETMAXNREG = """
.visible .entry {entry}($params)
.reqntid 256, 1, 1
.minnctapersm 1
{
    .reg .b32 %tx, %a<1>;
    .reg .b64 %g, %lane4;
    .reg .pred %first;
    mov.u32 %tx, %tid.x;
    mul.wide.u32 %lane4, %tx, 4;
    $load
    setp.lt.u32 %first, %tx, 128;
    @%first bra GIVE;
    setmaxnreg.inc.sync.aligned.u32 240;
    add.u32 %a0, %a0, 7;
    bra JOINED;
GIVE:
    setmaxnreg.dec.sync.aligned.u32 40;
    add.u32 %a0, %a0, 3;
JOINED:
    $store
    ret;
}"""


def setmaxnreg():
    """Two warpgroups: one gives registers up, the other takes them."""
    parts = {"load": load_registers("a", 1, 0, 256), "store": store_registers("a", 1, 1, 256)}
    body = kernel(SETMAXNREG, params=parameters(2), **parts)
    values = np.arange(256, dtype=np.uint32) * np.uint32(2654435761)
    options = {"block": (256, 1, 1), "group": "wgmma_options", "target": "sm_90a"}
    out = np.zeros(256, np.uint32)
    return Form("setmaxnreg.inc, dec", body, lambda: [values, out], (1,), **options)


def forms():
    """Every form of a warpgroup."""
    yield from types_and_layouts()
    yield from scales_and_steps()
    yield from accumulation()
    yield from unaligned_patterns()
    yield setmaxnreg()
