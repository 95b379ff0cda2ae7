"""Memory instruction forms: loads and stores of every space and width."""

from functools import partial

import numpy as np
from ptx_forms import Form, kernel, parameters, seed_of

# (instruction, elements, type of the register)
LOADS = (
    ("ld.global.b32", 1, "b32"),
    ("ld.global.u8", 1, "b32"),
    ("ld.global.s8", 1, "b32"),
    ("ld.global.u16", 1, "b32"),
    ("ld.global.s16", 1, "b32"),
    ("ld.global.b64", 1, "b64"),
    ("ld.global.s32", 1, "b64"),
    ("ld.global.f64", 1, "f64"),
    ("ld.global.v2.b32", 2, "b32"),
    ("ld.global.v2.f32", 2, "f32"),
    ("ld.global.v4.b32", 4, "b32"),
    ("ld.global.v4.f32", 4, "f32"),
    ("ld.global.v2.b64", 2, "b64"),
    ("ld.global.v2.u16", 2, "b16"),
    ("ld.global.v4.u16", 4, "b16"),
    ("ld.global.v4.u8", 4, "b16"),
    ("ld.global.nc.b32", 1, "b32"),
    ("ld.global.nc.f32", 1, "f32"),
    ("ld.global.nc.u16", 1, "b16"),
    ("ld.global.nc.v2.b32", 2, "b32"),
    ("ld.global.nc.v2.f32", 2, "f32"),
    ("ld.global.nc.v4.b32", 4, "b32"),
    ("ld.global.nc.v4.f32", 4, "f32"),
    ("ld.global.nc.L1::no_allocate.v4.f32", 4, "f32"),
    ("ld.global.nc.L1::no_allocate.L2::128B.v4.b32", 4, "b32"),
    ("ld.global.nc.L2::256B.v2.f32", 2, "f32"),
    ("ld.global.L2::128B.b32", 1, "b32"),
    ("ld.global.ca.b32", 1, "b32"),
    ("ld.global.cg.v2.b32", 2, "b32"),
    ("ld.global.cs.v4.b32", 4, "b32"),
    ("ld.global.lu.b32", 1, "b32"),
    ("ld.volatile.global.b32", 1, "b32"),
    ("ld.relaxed.gpu.global.b32", 1, "b32"),
    ("ld.acquire.gpu.global.b32", 1, "b32"),
    ("ld.b32", 1, "b32"),
    ("ld.v4.b32", 4, "b32"),
)
STORES = (
    ("st.global.v4.f32", 4, "f32"),
    ("st.global.L1::no_allocate.v4.f32", 4, "f32"),
    ("st.global.cs.v4.f32", 4, "f32"),
    ("st.global.wt.v4.f32", 4, "f32"),
    ("st.global.cg.v4.f32", 4, "f32"),
    ("st.global.cs.v4.b32", 4, "b32"),
    ("st.global.cs.v2.b32", 2, "b32"),
    ("st.global.cs.b32", 1, "b32"),
    ("st.global.cs.u16", 1, "u16"),
    ("st.global.b16", 1, "b16"),
    ("st.global.u16", 1, "u16"),
    ("st.b64", 1, "b64"),
    ("st.volatile.global.b32", 1, "b32"),
    ("st.relaxed.gpu.global.b32", 1, "b32"),
    ("st.release.gpu.global.b32", 1, "b32"),
)

# Each of 64 threads loads from p_0, does `through`, and stores to p_1.
MOVE = """
.visible .entry {entry}($params)
{
    .reg .$kind %v<4>;
    .reg .f32 %f;
    .reg .b32 %i, %t<8>;
    .reg .b64 %g, %o, %w, %x;
    mov.u32 %i, %tid.x;
    ld.param.u64 %g, [p_0];
    ld.param.u64 %o, [p_1];
    mul.wide.u32 %w, %i, $load_bytes;
    add.u64 %g, %g, %w;
    mul.wide.u32 %w, %i, $store_bytes;
    add.u64 %o, %o, %w;
    $load $values, [%g];
    $through
    $store [%o], $values;
    ret;
}"""


def type_bytes(kind):
    """Bytes of b8..b64, u8..s64, f32, f64, and of f16, bf16 and their pairs."""
    special = {"f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2}
    return special.get(kind) or int(kind[1:]) // 8


def vector(count):
    names = ", ".join(f"%v{i}" for i in range(count))
    return names if count == 1 else "{" + names + "}"


def unchanged(data):
    """Oracle of a move that keeps every byte."""
    return [data]


def move(name, load, store, count, kind, through="", store_bytes=None, scalars=(), oracle=None):
    load_bytes = count * type_bytes(load.rsplit(".", 1)[1])
    store_bytes = store_bytes or count * type_bytes(kind)

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        data = rng.integers(0, 256, 64 * load_bytes).astype(np.uint8)
        return [data, np.zeros(64 * store_bytes, np.uint8)]

    extra = ", .param .u32 p_2, .param .f32 p_3" if scalars else ""
    body = kernel(
        MOVE,
        params=parameters(2) + extra,
        kind=kind,
        load_bytes=load_bytes,
        store_bytes=store_bytes,
        load=load,
        store=store,
        values=vector(count),
        through=through,
    )
    options = {"block": (64, 1, 1), "group": "memory", "scalars": scalars, "oracle": oracle}
    return Form(name, body, arguments, (1,), **options)


THROUGH_SPACE = """
    .$space .align 16 .b8 cell_$tag[$nbytes];
    mov.u32 %t0, cell_$tag;
    mad.lo.u32 %t0, %i, $stride, %t0;
    st.$space$suffix [%t0], $values;
    $clear
    ld.$space$suffix $values, [%t0];"""

THROUGH_GENERIC = """
    .shared .align 16 .b8 cell_generic[256];
    mov.u64 %x, cell_generic;
    cvta.shared.u64 %x, %x;
    mul.wide.u32 %w, %i, 4;
    add.u64 %x, %x, %w;
    st.b32 [%x], %v0;
    mov.b32 %v0, 0;
    cvta.to.shared.u64 %x, %x;
    ld.shared.b32 %v0, [%x];"""

SPACE_OF_ADDRESS = """
    .shared .align 16 .b8 cell_space[256];
    .reg .pred %ps<2>;
    mov.u64 %x, cell_space;
    cvta.shared.u64 %x, %x;
    isspacep.shared %ps0, %x;
    isspacep.global %ps1, %g;
    selp.b32 %t0, 1, 0, %ps0;
    selp.b32 %t1, 2, 0, %ps1;
    or.b32 %v0, %t0, %t1;"""

SCALAR_PARAMETERS = """
    cvta.to.global.u64 %o, %o;
    ld.param.u32 %t0, [p_2];
    ld.param.f32 %f, [p_3];
    mov.b32 %t1, %f;
    xor.b32 %v0, %v0, %t0;
    xor.b32 %v0, %v0, %t1;"""


SIGNED_PARAMETERS = """
    ld.param.s32 %t0, [p_2];
    xor.b32 %v0, %v0, %t0;
    ld.param.s64 %x, [p_1];
    add.s64 %o, %x, %w;"""


def changed(data):
    """Oracle of SIGNED_PARAMETERS."""
    return [(data.view(np.uint32) ^ np.uint32(0x1234567)).view(np.uint8)]


def loads_and_stores():
    for load, count, kind in LOADS:
        suffix = f".v{count}" if count > 1 else ""
        yield move(load, load, f"st.global{suffix}.{kind}", count, kind)
    for store, count, kind in STORES:
        suffix = f".v{count}" if count > 1 else ""
        yield move(store, f"ld.global{suffix}.{kind}", store, count, kind, oracle=unchanged)
    yield move("st.global.u8", "ld.global.u8", "st.global.u8", 1, "b32", store_bytes=1)
    words = partial(move, load="ld.global.b32", store="st.global.b32", count=1, kind="b32")
    yield words("cvta, ld.param", through=SCALAR_PARAMETERS, scalars=(0x1234567, -2.5))
    signed = {"through": SIGNED_PARAMETERS, "scalars": (0x1234567, -2.5)}
    yield words("ld.param.s32, ld.param.s64", oracle=changed, **signed)
    yield words("generic address of shared", through=THROUGH_GENERIC)
    yield words("isspacep.shared", through=SPACE_OF_ADDRESS)
    widths = ((1, "b16"), (1, "b32"), (2, "b32"), (4, "b32"), (2, "b64"), (2, "f32"), (4, "f32"))
    widths += ((1, "u16"),)
    for space in ("shared", "local"):
        for count, kind in widths:
            yield through_space(space, count, kind)


def through_space(space, count, kind):
    """Registers go through shared or local memory and back."""
    suffix = (f".v{count}" if count > 1 else "") + f".{kind}"
    zero = "0f00000000" if kind == "f32" else 0
    through = kernel(
        THROUGH_SPACE,
        space=space,
        tag=f"{space}_{count}_{kind}",
        nbytes=2048 if space == "shared" else 16,
        stride=count * type_bytes(kind) if space == "shared" else 0,
        suffix=suffix,
        values=vector(count),
        clear="\n".join(f"    mov.{kind} %v{j}, {zero};" for j in range(count)),
    )
    name = f"st, ld.{space}{suffix}"
    load, store = f"ld.global{suffix}", f"st.global{suffix}"
    return move(name, load, store, count, kind, through, oracle=unchanged)


def forms():
    """Every form of loads and stores."""
    return loads_and_stores()
