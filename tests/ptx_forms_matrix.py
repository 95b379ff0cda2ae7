"""Warp matrix instruction forms: ldmatrix, stmatrix, movmatrix, mma.sync.

Fragments are filled with random values of the element type, whatever position they have in the
matrix: a wrong layout then shows as wrong results.
"""

import numpy as np
from ptx_forms import Form, kernel, parameters, seed_of
from ptx_forms_oracle import mma_tile
from ptx_forms_pieces import (
    REGISTERS,
    dump_shared,
    fill_shared,
    load_registers,
    names,
    raw_bits,
    store_registers,
    words,
)

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

MMA_KERNEL = """
.visible .entry {entry}($params)
{
    .reg .b32 %tx, %a<$ra>, %b<$rb>;
    .reg .b64 %g, %lane4;
    .reg $accumulator %c<$rc>;
    mov.u32 %tx, %tid.x;
    mul.wide.u32 %lane4, %tx, 4;
    $loads
    $op $c, $a, $b, $c;
    $stores
    ret;
}"""


# Where f32 ends: powers of two around which a, b and c lie.
EDGES = {
    "sums near 2**-126": (-64, -64, -127),
    "subnormal a": (-130, 2, -128),
    "sums near 2**128": (61, 61, 124),
}


def mma_forms():
    for shape, d, a, b, *registers in MMA:
        styles = ("exact",) if d == "s32" else ("exact", "random", "wide", "bits")
        for style in styles:
            for satfinite in ("", ".satfinite") if d == "s32" else ("",):
                op = f"mma.sync.aligned.{shape}.row.col{satfinite}.{d}.{a}.{b}.{d}"
                yield mma_form(f"{op} {style}", op, (d, a, b), registers, style)
    yield from edge_forms()


def edge_forms():
    for shape, d, a, b, *registers in (MMA[0], MMA[5]):
        op = f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d}"
        for edge in EDGES:
            oracle = mma_tile((d, a, b))
            yield mma_form(f"{op} {edge}", op, (d, a, b), registers, edge, oracle=oracle)


def near(kind, rng, shape, exponent):
    """Registers full of elements within a factor of 16 of 2**exponent."""
    count = int(np.prod(shape)) * (2 if kind == "bf16" else 1)
    values = rng.uniform(-2, 2, count) * 2.0 ** (exponent + rng.integers(-3, 4, count))
    return raw_bits(kind, values).view(np.uint32).reshape(shape)


def mma_form(name, op, kinds, registers, style, **options):
    d, a, b = kinds
    ra, rb, rc = registers

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        wanted = [(kind, rng, (n, 32)) for kind, n in ((a, ra), (b, rb), (d, rc))]
        if style in EDGES:
            parts = [near(*w, at) for w, at in zip(wanted, EDGES[style], strict=True)]
        else:
            parts = [words(*w, style) for w in wanted]
        return [*parts, np.zeros((rc, 32), np.uint32)]

    loads = [
        load_registers(p, n, i, 32) for i, (p, n) in enumerate(zip("abc", registers, strict=True))
    ]
    body = kernel(
        MMA_KERNEL,
        params=parameters(4),
        accumulator=".f32" if d == "f32" else ".b32",
        op=op,
        ra=ra,
        rb=rb,
        rc=rc,
        a=names("a", ra),
        b=names("b", rb),
        c=names("c", rc),
        loads="\n".join(loads),
        stores=store_registers("c", rc, 3, 32),
    )
    if a in ("e4m3", "e5m2"):
        options = {"target": "sm_89", "version": "8.4"}
    return Form(name, body, arguments, (3,), group="mma", **options)


LDMATRIX_KERNEL = """
.visible .entry {entry}($params)
{
    $registers
    .reg .b32 %r<$count>, %row<1>;
    mov.u32 %tx, %tid.x;
    mul.wide.u32 %lane4, %tx, 4;
    $fill
    bar.sync 0;
    $loads
    add.u32 %s, %sm, %row0;
    $execute
    ret;
}"""

MOVMATRIX_KERNEL = """
.visible .entry {entry}($params)
{
    .reg .b32 %tx, %a<1>, %d<1>;
    .reg .b64 %g, %lane4;
    mov.u32 %tx, %tid.x;
    mul.wide.u32 %lane4, %tx, 4;
    $load
    movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;
    $store
    ret;
}"""


def ldmatrix_forms():
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            yield ldmatrix_form("ldmatrix", count, trans, "sm_80")
            yield ldmatrix_form("stmatrix", count, trans, "sm_90")
    parts = {"load": load_registers("a", 1, 0, 32), "store": store_registers("d", 1, 1, 32)}
    body = kernel(MOVMATRIX_KERNEL, params=parameters(2), **parts)
    rng = np.random.default_rng(3)
    values = rng.integers(0, 1 << 32, 32, dtype=np.uint64).astype(np.uint32)
    name, out = "movmatrix.sync.aligned.m8n8.trans.b16", np.zeros(32, np.uint32)
    yield Form(name, body, lambda: [values, out], (1,), group="ldmatrix")


def ldmatrix_form(verb, count, trans, target):
    """Row addresses are a permutation of 64 rows; stmatrix dumps all of shared memory."""
    op = f"{verb}.sync.aligned.m8n8.x{count}{trans}.shared.b16"

    def arguments():
        rng = np.random.default_rng(seed_of(op))
        rows = rng.permutation(64)[:32].astype(np.uint32) * 16
        registers = rng.integers(0, 1 << 32, (count, 32), dtype=np.uint64).astype(np.uint32)
        data = rng.integers(0, 256, 1024).astype(np.uint8)
        out = np.zeros((count, 32) if verb == "ldmatrix" else 256, np.uint32)
        return [data, rows, registers, out]

    registers = names("r", count)
    if verb == "ldmatrix":
        execute = f"    {op} {registers}, [%s];\n{store_registers('r', count, 3, 32)}"
    else:
        execute = f"    {op} [%s], {registers};\n    bar.sync 0;\n{dump_shared(3, 1024, 32)}"
    body = kernel(
        LDMATRIX_KERNEL,
        params=parameters(4),
        registers=REGISTERS,
        count=count,
        fill=fill_shared(0, 1024, 32),
        loads=load_registers("row", 1, 1, 32) + "\n" + load_registers("r", count, 2, 32),
        execute=execute,
    )
    options = {"group": "ldmatrix", "target": target, "smem_bytes": 1024}
    return Form(op, body, arguments, (3,), **options)


def forms():
    """Every matrix form of one warp."""
    yield from ldmatrix_forms()
    yield from mma_forms()
