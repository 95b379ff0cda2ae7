"""Atomic and reduction instruction forms in global and shared memory."""

import numpy as np
from ptx_forms import Form, kernel, operand, parameters, seed_of
from ptx_forms_memory import type_bytes

# (operation, type, may threads collide: its result does not depend on their order)
ATOMICS = (
    ("add.u32", "u32", True),
    ("add.s32", "s32", True),
    ("add.u64", "u64", True),
    ("min.u32", "u32", True),
    ("min.s32", "s32", True),
    ("max.u32", "u32", True),
    ("max.s32", "s32", True),
    ("max.u64", "u64", True),
    ("and.b32", "b32", True),
    ("or.b32", "b32", True),
    ("or.b64", "b64", True),
    ("xor.b32", "b32", True),
    ("add.f32", "f32", False),
    ("add.f64", "f64", False),
    ("add.noftz.f16x2", "f16x2", False),
    ("add.noftz.bf16x2", "bf16x2", False),
    ("add.noftz.f16", "f16", False),
    ("add.noftz.bf16", "bf16", False),
    ("inc.u32", "u32", False),
    ("dec.u32", "u32", False),
    ("exch.b32", "b32", False),
    ("exch.b64", "b64", False),
)

# 64 threads update cells of p_1 with p_0; the old values go to p_2.
ATOMIC = """
.visible .entry {entry}($params)
{
    .reg .$register %a, %c, %d;
    .reg .b32 %i, %j, %t;
    .reg .b64 %x, %g, %o, %w;
    mov.u32 %i, %tid.x;
    ld.param.u64 %x, [p_0];
    ld.param.u64 %g, [p_1];
    ld.param.u64 %o, [p_2];
    mul.wide.u32 %w, %i, $size;
    add.u64 %x, %x, %w;
    add.u64 %o, %o, %w;
    $cell
    ld.global.$register %a, [%x];
    mul.wide.u32 %w, %j, $size;
    add.u64 %g, %g, %w;
    $update
    $keep
    ret;
}"""

UPDATE_SHARED = """
    .shared .align 8 .b8 $tag[512];
    mov.u32 %t, $tag;
    mad.lo.u32 %t, %j, $size, %t;
    ld.global.$register %c, [%g];
    st.shared.$register [%t], %c;
    bar.sync 0;
    $op[%t], %a;
    bar.sync 0;
    ld.shared.$register %c, [%t];
    st.global.$register [%g], %c;"""


def atomic(op, kind, collide, space, returns):
    size, verb = type_bytes(kind), "atom" if returns else "red"
    register = kind if kind in ("f32", "f64") else f"b{8 * size}"
    name = f"{verb}.{space}.{op}"
    instruction = f"{name} {'%d, ' if returns else ''}"
    update = f"{instruction}[%g], %a;"
    if space == "shared":
        tag = "cells_" + op.replace(".", "_") + ("_a" if returns else "_r")
        names = {"tag": tag, "size": size, "register": register, "op": instruction}
        update = kernel(UPDATE_SHARED, **names)
    body = kernel(
        ATOMIC,
        params=parameters(3),
        register=register,
        size=size,
        cell="and.b32 %j, %i, 3;" if collide else "mov.u32 %j, %i;",
        update=update,
        # The old value depends on the order of colliding updates: kept only without collisions.
        keep=f"st.global.{register} [%o], %d;" if returns and not collide else "",
    )

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        values, cells = operand(kind, rng, 64), operand(kind, rng, 64)
        return [values, cells, np.zeros(64, f"u{size}")]

    target = "sm_90" if kind.startswith("bf16") else "sm_80"
    shape = {"block": (64, 1, 1), "group": "atomics", "target": target}
    return Form(name, body, arguments, (1, 2), **shape)


# Each thread adds to one cell through a loop of compare-and-swap.
CAS_LOOP = """
.visible .entry {entry}($params)
{
    .reg .b32 %i, %old, %seen, %next, %x;
    .reg .b64 %g, %a, %w;
    .reg .pred %again;
    mov.u32 %i, %tid.x;
    ld.param.u64 %a, [p_0];
    ld.param.u64 %g, [p_1];
    mul.wide.u32 %w, %i, 4;
    add.u64 %a, %a, %w;
    ld.global.b32 %x, [%a];
    ld.global.b32 %old, [%g];
AGAIN_CAS:
    mov.b32 %seen, %old;
    add.u32 %next, %old, %x;
    atom.global.cas.b32 %old, [%g], %seen, %next;
    setp.ne.u32 %again, %old, %seen;
    @%again bra AGAIN_CAS;
    ret;
}"""


def forms():
    """Every form of an atomic."""
    for op, kind, collide in ATOMICS:
        for space in ("global", "shared"):
            yield atomic(op, kind, collide, space, returns=True)
            if not op.startswith("exch"):
                yield atomic(op, kind, collide, space, returns=False)
    values = operand("u32", np.random.default_rng(9), 64)
    body = kernel(CAS_LOOP, params=parameters(2))
    shape = {"block": (64, 1, 1), "group": "atomics"}
    zero = np.zeros(1, np.uint32)
    yield Form("atom.global.cas.b32 loop", body, lambda: [values, zero], (1,), **shape)
