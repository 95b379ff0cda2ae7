"""Matrix instruction forms: ldmatrix, stmatrix, movmatrix, mma.sync, wgmma with every descriptor.

Fragments and shared memory are filled with random values of the element type, whatever position
they have in the matrix: a wrong layout then shows as wrong results.  Three styles of values:
"exact" (small multiples of 1/4: every order of accumulation gives the same bits), "random" (normal)
and "wide" (exponents spread over 2**12), the last two compared within an error bound.
"""

import numpy as np
import torch
from ptx_forms import BITS, Form, Tolerance, parameters, seed_of

IMAGE_BYTES = 49152  # A at 0 (16 KB), B at 16384 (32 KB)
B_OFFSET = 16384
TORCH_TYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
LAYOUT_CODE = {0: 0, 128: 1, 64: 2, 32: 3}


def elements(kind, rng, count, style="exact"):
    """`count` raw elements of a matrix type."""
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, count).astype(np.uint8)
    if style == "exact":
        values = rng.integers(-8, 9, count) / 4
    else:
        uniform = rng.integers(-(1 << 20), 1 << 20, (4, count)).sum(0) / (1 << 20)
        values = uniform * 2.0 ** (rng.integers(-6, 7, count) if style == "wide" else 0)
    if kind in ("f32", "tf32"):
        raw = values.astype(np.float32).view(np.uint32)
        return raw if kind == "f32" or style == "exact" else raw & np.uint32(0xFFFFE000)
    packed = torch.from_numpy(values.astype(np.float32)).to(TORCH_TYPES[kind])
    size = packed.element_size()
    return packed.view({1: torch.uint8, 2: torch.int16}[size]).numpy().view(f"u{size}")


def words(kind, rng, shape, style="exact"):
    """Registers full of elements, uint32 of `shape`."""
    count = int(np.prod(shape))
    if kind == "s32":
        return rng.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32).reshape(shape)
    raw = elements(kind, rng, count * 4 // elements(kind, rng, 1).itemsize, style)
    return raw.view(np.uint32).reshape(shape)


def load_registers(prefix, count, parameter, threads):
    """Lines that load register r of thread t from word r * threads + t of a parameter."""
    lines = [f"    ld.param.u64 %g, [p_{parameter}];", "    add.u64 %g, %g, %lane4;"]
    return lines + [
        f"    ld.global.b32 %{prefix}{r}, [%g+{4 * threads * r}];" for r in range(count)
    ]


def store_registers(prefix, count, parameter, threads):
    lines = [f"    ld.param.u64 %g, [p_{parameter}];", "    add.u64 %g, %g, %lane4;"]
    return lines + [
        f"    st.global.b32 [%g+{4 * threads * r}], %{prefix}{r};" for r in range(count)
    ]


def names(prefix, count):
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"


MMA = (
    # shape, d, a, b types, registers of a, b, c
    ("m16n8k16", "f32", "bf16", "bf16", 4, 2, 4),
    ("m16n8k16", "f32", "f16", "f16", 4, 2, 4),
    ("m16n8k16", "f16", "f16", "f16", 4, 2, 2),
    ("m16n8k8", "f32", "bf16", "bf16", 2, 1, 4),
    ("m16n8k8", "f32", "f16", "f16", 2, 1, 4),
    ("m16n8k8", "f32", "tf32", "tf32", 4, 2, 4),
    ("m16n8k4", "f32", "tf32", "tf32", 2, 1, 4),
    ("m16n8k32", "f32", "e4m3", "e4m3", 4, 2, 4),
    ("m16n8k32", "f32", "e5m2", "e4m3", 4, 2, 4),
    ("m16n8k32", "s32", "s8", "s8", 4, 2, 4),
    ("m16n8k32", "s32", "u8", "s8", 4, 2, 4),
    ("m16n8k16", "s32", "s8", "u8", 2, 1, 4),
)


def mma_forms():
    for shape, d, a, b, ra, rb, rc in MMA:
        k = int(shape.rsplit("k", 1)[1])
        for style in ("exact",) if d == "s32" else ("exact", "random", "wide"):
            for satfinite in ("", ".satfinite") if d == "s32" else ("",):
                op = f"mma.sync.aligned.{shape}.row.col{satfinite}.{d}.{a}.{b}.{d}"
                yield mma_form(f"{op} {style}", op, (d, a, b), (ra, rb, rc), k, style)


def mma_form(name, op, kinds, registers, k, style):
    d, a, b = kinds
    ra, rb, rc = registers

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        parts = [words(kind, rng, (n, 32), style) for kind, n in ((a, ra), (b, rb), (d, rc))]
        return [*parts, np.zeros((rc, 32), np.uint32)]

    lines = [
        f".visible .entry {{entry}}({parameters(4)})", "{",
        f"    .reg .b32 %tx, %a<{ra}>, %b<{rb}>;", "    .reg .b64 %g, %lane4;",
        f"    .reg {'.f32' if d == 'f32' else '.b32'} %c<{rc}>;",
        "    mov.u32 %tx, %tid.x;", "    mul.wide.u32 %lane4, %tx, 4;",
        *load_registers("a", ra, 0, 32), *load_registers("b", rb, 1, 32), *load_registers("c", rc, 2, 32),
        f"    {op} {names('c', rc)}, {names('a', ra)}, {names('b', rb)}, {names('c', rc)};",
        *store_registers("c", rc, 3, 32), "    ret;", "}",
    ]  # fmt: skip
    fp8 = a in ("e4m3", "e5m2")
    return Form(name, "\n".join(lines), arguments, (3,), group="mma", target="sm_89" if fp8 else "sm_80",
                version="8.4" if fp8 else "8.0")  # fmt: skip


def fill_shared(parameter, nbytes, threads):
    """Lines that copy `nbytes` of a parameter to `smem`."""
    return copy_lines(
        "FILL",
        parameter,
        nbytes,
        threads,
        "ld.global.v4.b32 {Q}, [%g]",
        "st.shared.v4.b32 [%s], {Q}",
    )


def dump_shared(parameter, nbytes, threads):
    """Lines that copy `nbytes` of `smem` to a parameter."""
    return copy_lines(
        "DUMP",
        parameter,
        nbytes,
        threads,
        "ld.shared.v4.b32 {Q}, [%s]",
        "st.global.v4.b32 [%g], {Q}",
    )


def copy_lines(label, parameter, nbytes, threads, load, store):
    """A loop that moves 16 bytes per thread and step, `load` then `store`."""
    registers = "{%q0, %q1, %q2, %q3}"
    return [
        f"    ld.param.u64 %g, [p_{parameter}];",
        "    mul.wide.u32 %w, %tx, 16;",
        "    add.u64 %g, %g, %w;",
        "    mov.u32 %sm, smem;",
        "    mad.lo.u32 %s, %tx, 16, %sm;",
        "    mov.u32 %i, %tx;",
        f"{label}:",
        f"    setp.ge.u32 %more, %i, {nbytes // 16};",
        f"    @%more bra {label}_DONE;",
        f"    {load.replace('{Q}', registers)};",
        f"    {store.replace('{Q}', registers)};",
        f"    add.u64 %g, %g, {16 * threads};",
        f"    add.u32 %s, %s, {16 * threads};",
        f"    add.u32 %i, %i, {threads};",
        f"    bra {label};",
        f"{label}_DONE:",
    ]


SHARED_REGISTERS = [
    "    .reg .b32 %tx, %sm, %s, %i, %q<4>, %t<4>;", "    .reg .b64 %g, %w, %lane4;", "    .reg .pred %more, %p<4>;",
]  # fmt: skip


def ldmatrix_forms():
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            for verb, target in (("ldmatrix", "sm_80"), ("stmatrix", "sm_90")):
                op = f"{verb}.sync.aligned.m8n8.x{count}{trans}.shared.b16"
                yield ldmatrix_form(op, op, verb, count, target)
    name = "movmatrix.sync.aligned.m8n8.trans.b16"
    body = "\n".join([
        f".visible .entry {{entry}}({parameters(2)})", "{", "    .reg .b32 %tx, %a<1>, %d<1>;", "    .reg .b64 %g, %lane4;",
        "    mov.u32 %tx, %tid.x;", "    mul.wide.u32 %lane4, %tx, 4;", *load_registers("a", 1, 0, 32),
        f"    {name} %d0, %a0;", *store_registers("d", 1, 1, 32), "    ret;", "}"])  # fmt: skip
    rng = np.random.default_rng(3)
    values = rng.integers(0, 1 << 32, 32, dtype=np.uint64).astype(np.uint32)
    yield Form(name, body, lambda: [values, np.zeros(32, np.uint32)], (1,), group="ldmatrix")


def ldmatrix_form(name, op, verb, count, target):
    """Row addresses are a permutation of 64 rows; stmatrix dumps all of shared memory."""

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        rows = rng.permutation(64)[:32].astype(np.uint32) * 16
        registers = rng.integers(0, 1 << 32, (count, 32), dtype=np.uint64).astype(np.uint32)
        data = rng.integers(0, 256, 1024).astype(np.uint8)
        out = np.zeros((count, 32) if verb == "ldmatrix" else 256, np.uint32)
        return [data, rows, registers, out]

    registers, address = names("r", count), "[%s]"
    lines = [
        f".visible .entry {{entry}}({parameters(4)})", "{", *SHARED_REGISTERS, f"    .reg .b32 %r<{count}>, %row<1>;",
        "    mov.u32 %tx, %tid.x;", "    mul.wide.u32 %lane4, %tx, 4;", *fill_shared(0, 1024, 32), "    bar.sync 0;",
        *load_registers("row", 1, 1, 32), *load_registers("r", count, 2, 32), "    add.u32 %s, %sm, %row0;",
    ]  # fmt: skip
    if verb == "ldmatrix":
        lines += [f"    {op} {registers}, {address};", *store_registers("r", count, 3, 32)]
    else:
        lines += [f"    {op} {address}, {registers};", "    bar.sync 0;", *dump_shared(3, 1024, 32)]
    return Form(name, "\n".join([*lines, "    ret;", "}"]), arguments, (3,), group="ldmatrix", target=target,
                smem_bytes=1024)  # fmt: skip


def constants(lbo, sbo, span, base_offset=0):
    """Descriptor bits above the start address."""
    return (lbo >> 4) << 16 | (sbo >> 4) << 32 | base_offset << 49 | LAYOUT_CODE[span] << 62


def layout(span, mn_major, extent):
    """(lbo, sbo) of an operand with `extent` rows (or columns) packed tightly."""
    if not mn_major:
        return (16, 8 * span) if span else (128 * (extent // 8), 128)
    if span:
        return 16 * span, 8 * span  # 16 k rows per atom column; 8 k rows
    return 128, 256  # next 8 k; next 8 elements of MN


def wgmma(name, kinds, n, *, span=128, trans=(0, 0), registers=False, style="exact", scale_d="1",
          scales=(1, 1), chain=1, start=(0, 0), base=(0, 0), **options):  # fmt: skip
    """One wgmma form.

    Args: kinds (d, a, b); span of both operands' swizzle; trans imm-trans bits; registers: A from
    registers; scale_d operand text; scales of a and b; chain: instructions that accumulate in a
    row; start bytes added to the operands' addresses; base the descriptors' base offsets; options
    of Form.
    """
    d, a, b = kinds
    k = 32 // (4 if a == "tf32" else 2 if a in ("f16", "bf16") else 1)
    count = n // 4 if d == "f16" else n // 2
    lbo_a, sbo_a = layout(span, trans[0], 64)
    lbo_b, sbo_b = layout(span, trans[1], n)

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        image = elements_image(a, b, rng, style)
        return [image, words(a, rng, (4, 128), style), words(d, rng, (count, 128), style),
                np.zeros((count, 128), np.uint32)]  # fmt: skip

    signs = ", ".join(str(s) for s in scales) if d != "s32" else ""
    sixteen = a in ("f16", "bf16")
    immediates = [scale_d, signs] if signs else [scale_d]
    if sixteen:
        immediates.append(f"{trans[1]}" if registers else f"{trans[0]}, {trans[1]}")
    source = names("a", 4) if registers else "%da"
    op = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b}"
    instruction = f"    {op} {names('d', count)}, {source}, %db, {', '.join(immediates)};"
    lines = [
        f".visible .entry {{entry}}({parameters(4)})", ".reqntid 128, 1, 1", "{", *SHARED_REGISTERS,
        "    .reg .b32 %a<4>;", f"    .reg {'.f32' if d == 'f32' else '.b32'} %d<{count}>;", "    .reg .b64 %da, %db;",
        "    mov.u32 %tx, %tid.x;", "    mul.wide.u32 %lane4, %tx, 4;", *fill_shared(0, IMAGE_BYTES, 128),
        "    fence.proxy.async.shared::cta;", "    bar.sync 0;",
        *load_registers("a", 4, 1, 128), *load_registers("d", count, 2, 128),
        *descriptor("da", start[0], constants(lbo_a, sbo_a, span, base[0])),
        *descriptor("db", B_OFFSET + start[1], constants(lbo_b, sbo_b, span, base[1])),
        "    setp.lt.u32 %p0, %tx, 128;", "    setp.ge.u32 %p1, %tx, 128;",
        "    wgmma.fence.sync.aligned;", *[instruction] * chain, "    wgmma.commit_group.sync.aligned;",
        "    wgmma.wait_group.sync.aligned 0;", *store_registers("d", count, 3, 128), "    ret;", "}",
    ]  # fmt: skip
    return Form(name, "\n".join(lines), arguments, (3,), block=(128, 1, 1), smem_bytes=IMAGE_BYTES,
                target="sm_90a", **options)  # fmt: skip


def elements_image(a, b, rng, style):
    """Shared memory: A's region full of A elements, B's of B elements."""
    parts = []
    for kind, nbytes in ((a, B_OFFSET), (b, IMAGE_BYTES - B_OFFSET)):
        size = elements(kind, rng, 1).itemsize
        parts.append(elements(kind, rng, nbytes // size, style).view(np.uint8))
    return np.concatenate(parts)


def descriptor(register, offset, bits):
    return [
        "    mov.u32 %t0, smem;", f"    add.u32 %t0, %t0, {offset};", "    shr.u32 %t0, %t0, 4;",
        "    and.b32 %t0, %t0, 0x3FFF;", f"    cvt.u64.u32 %{register}, %t0;", f"    or.b64 %{register}, %{register}, {bits:#x};",
    ]  # fmt: skip


def wgmma_forms():
    bf16 = ("f32", "bf16", "bf16")
    kinds = (bf16, ("f32", "f16", "f16"), ("f16", "f16", "f16"), ("f32", "tf32", "tf32"), ("f32", "e4m3", "e4m3"),
             ("f32", "e5m2", "e4m3"), ("f16", "e4m3", "e4m3"), ("s32", "s8", "s8"), ("s32", "u8", "s8"))  # fmt: skip
    for triple in kinds:
        options = {"group": "wgmma_types", "version": "8.4" if triple[1] == "u8" else "8.0"}
        for span in (0, 32, 64, 128):
            yield wgmma(
                f"wgmma {'.'.join(triple)} n64 K-major swizzle {span}",
                triple,
                64,
                span=span,
                **options,
            )
        yield wgmma(
            f"wgmma {'.'.join(triple)} n64 A in registers", triple, 64, registers=True, **options
        )
    for n in (8, 16, 24, 40, 80, 96, 112, 128, 160, 176, 256):
        yield wgmma(f"wgmma bf16 n{n} K-major", bf16, n, group="wgmma_n")
        yield wgmma(
            f"wgmma bf16 n{n} B MN-major", bf16, n, trans=(0, 1), registers=True, group="wgmma_n"
        )
    for span in (0, 32, 64, 128):
        for trans in ((0, 1), (1, 0), (1, 1)):
            for n in (40, 64):
                name = f"wgmma f16 n{n} trans {trans[0]}{trans[1]} swizzle {span}"
                yield wgmma(
                    name, ("f32", "f16", "f16"), n, span=span, trans=trans, group="wgmma_mn_major"
                )
    yield from wgmma_options(bf16)
    for style in ("random", "wide"):
        options = {"style": style, "group": "wgmma_accumulate"}
        for triple in kinds[:7]:
            yield wgmma(f"wgmma {'.'.join(triple)} {style}", triple, 64, **options)
            yield wgmma(f"wgmma {'.'.join(triple)} {style} chain", triple, 32, chain=8, **options)


def wgmma_options(bf16):
    options = {"group": "wgmma_options"}
    yield wgmma("wgmma scale-d 0", bf16, 16, scale_d="0", **options)
    yield wgmma("wgmma scale-d true", bf16, 16, scale_d="%p0", **options)
    yield wgmma("wgmma scale-d false", bf16, 16, scale_d="%p1", **options)
    yield wgmma("wgmma scale-a -1", bf16, 16, scales=(-1, 1), **options)
    yield wgmma("wgmma scale-b -1", bf16, 16, scales=(1, -1), **options)
    yield wgmma("wgmma scale-a, b -1", bf16, 16, scales=(-1, -1), registers=True, **options)
    for step in (32, 64, 96):
        yield wgmma(f"wgmma K step of {step} bytes", bf16, 32, start=(step, step), **options)
    yield wgmma("wgmma K step in 64-byte rows", bf16, 32, span=64, start=(32, 32), **options)


def setmaxnreg_form():
    """Two warpgroups: one gives registers up, the other takes them."""
    name = "setmaxnreg.inc, dec"
    body = "\n".join([
        f".visible .entry {{entry}}({parameters(2)})", ".reqntid 256, 1, 1", ".minnctapersm 1", "{",
        "    .reg .b32 %tx, %a<1>;", "    .reg .b64 %g, %lane4;", "    .reg .pred %first;", "    mov.u32 %tx, %tid.x;",
        "    mul.wide.u32 %lane4, %tx, 4;", *load_registers("a", 1, 0, 256), "    setp.lt.u32 %first, %tx, 128;",
        "    @%first bra GIVE;", "    setmaxnreg.inc.sync.aligned.u32 240;", "    add.u32 %a0, %a0, 7;", "    bra JOINED;",
        "GIVE:", "    setmaxnreg.dec.sync.aligned.u32 40;", "    add.u32 %a0, %a0, 3;", "JOINED:",
        *store_registers("a", 1, 1, 256), "    ret;", "}"])  # fmt: skip
    values = np.arange(256, dtype=np.uint32) * np.uint32(2654435761)
    return Form(name, body, lambda: [values, np.zeros(256, np.uint32)], (1,), block=(256, 1, 1),
                group="wgmma_options", target="sm_90a")  # fmt: skip


def unaligned_patterns():
    """B tiles that start `rows` rows into a swizzle pattern, with and without the base offset."""
    for span in (32, 64, 128):
        for rows in (1, 2, 4):
            start = rows * span
            for base in sorted({0, start >> 7 & 7}):
                name = f"wgmma swizzle {span} start at row {rows} base offset {base}"
                yield wgmma(name, ("f32", "bf16", "bf16"), 16, span=span, start=(0, start), base=(0, base),
                            group="wgmma_base_offset")  # fmt: skip


def forms():
    """Every matrix form."""
    yield from ldmatrix_forms()
    yield from mma_forms()
    yield from wgmma_forms()
    yield setmaxnreg_form()
    yield from unaligned_patterns()
