"""Instruction forms across lanes and threads, and of memory: shuffles, votes, barriers, ld, st,
atomics, special registers."""

import numpy as np
from ptx_forms import N, Form, Tolerance, operand, parameters, scalar, seed_of

LANES = {"n": 256, "grid": (1, 1, 1), "block": (256, 1, 1)}  # eight warps
FULL = "0xFFFFFFFF"


def lane_forms():
    options = {"group": "warp", **LANES}
    for mode, clamp in (("bfly", 31), ("up", 0), ("down", 31), ("idx", 31)):
        for c in (clamp, {"up": 0x1800, "bfly": 0x181F, "down": 0x101F, "idx": 0x1807}[mode]):
            for amount in (1, 3, 8, 31):
                name = f"shfl.sync.{mode}.b32 {amount} {c:#x}"
                yield scalar(name, ["b32", "pred"], ["b32"], **options,
                             instructions=f"shfl.sync.{mode}.b32 %d0|%d1, %a0, {amount}, {c}, {FULL};")  # fmt: skip
        yield scalar(f"shfl.sync.{mode}.b32 register", ["b32"], ["b32", "u32"], **options,
                     instructions=f"shfl.sync.{mode}.b32 %d0, %a0, %a1, {clamp}, {FULL};")  # fmt: skip
    for mode in ("all", "any", "uni"):
        yield scalar(f"vote.sync.{mode}.pred", ["pred"], ["u32"], **options, adjust=by_warp,
                     instructions=f"setp.gt.u32 %p0, %a0, 999; vote.sync.{mode}.pred %d0, %p0, {FULL};")  # fmt: skip
    yield scalar("vote.sync.ballot.b32", ["b32"], ["u32"], **options, adjust=by_warp,
                 instructions=f"setp.gt.u32 %p0, %a0, 999; vote.sync.ballot.b32 %d0, %p0, {FULL};")  # fmt: skip
    yield scalar("vote.sync.ballot.b32 negated", ["b32"], ["u32"], **options, adjust=by_warp,
                 instructions=f"setp.gt.u32 %p0, %a0, 999; vote.sync.ballot.b32 %d0, !%p0, {FULL};")  # fmt: skip
    for kind in ("b32", "b64"):
        yield scalar(f"match.any.sync.{kind}", ["b32"], [kind], **options, adjust=few_values,
                     instructions=f"match.any.sync.{kind} %d0, %a0, {FULL};")  # fmt: skip
        yield scalar(f"match.all.sync.{kind}", ["b32", "pred"], [kind], **options, adjust=few_values,
                     instructions=f"match.all.sync.{kind} %d0|%d1, %a0, {FULL};")  # fmt: skip
    for op in (
        "add.u32",
        "add.s32",
        "min.u32",
        "min.s32",
        "max.u32",
        "max.s32",
        "and.b32",
        "or.b32",
        "xor.b32",
    ):
        yield scalar(f"redux.sync.{op}", ["b32"], ["b32"], **options,
                     instructions=f"redux.sync.{op} %d0, %a0, {FULL};")  # fmt: skip
    yield scalar(
        "activemask.b32 divergent",
        ["b32"],
        ["u32"],
        **options,
        instructions="""
        mov.b32 %d0, 0;
        setp.gt.u32 %p0, %a0, 999;
        @!%p0 bra DONE_ACTIVE;
        activemask.b32 %d0;
    DONE_ACTIVE:""",
    )
    yield scalar(
        "elect.sync",
        ["b32", "pred"],
        ["u32"],
        f"elect.sync %d0|%d1, {FULL};",
        target="sm_90",
        **options,
    )
    yield scalar(
        "bar.warp.sync exchange",
        ["b32"],
        ["b32"],
        **options,
        instructions=f"""
        .shared .align 4 .b8 cells_warp[1024];
        mov.u32 %t1, cells_warp;
        shl.b32 %t2, %i, 2;
        add.u32 %t1, %t1, %t2;
        st.shared.b32 [%t1], %a0;
        bar.warp.sync {FULL};
        xor.b32 %t2, %t2, 16;
        mov.u32 %t1, cells_warp;
        add.u32 %t1, %t1, %t2;
        ld.shared.b32 %d0, [%t1];""",
    )


def by_warp(arrays, _rng):
    """Warp 0: all true, warp 1: none, warp 2: one; the others as they come."""
    a = arrays[0].copy()
    a[:32], a[32:64], a[64:96] = 5000, 3, 3
    a[77] = 5000
    return [a, *arrays[1:]]


def few_values(arrays, rng):
    """Few distinct values per warp; one value in warp 0."""
    a = rng.integers(0, 5, len(arrays[0])).astype(arrays[0].dtype)
    a[:32] = 3
    return [a, *arrays[1:]]


SPECIALS = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
    "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%lanemask_eq", "%lanemask_le", "%lanemask_lt",
    "%lanemask_ge", "%lanemask_gt",
)  # fmt: skip


def special_registers():
    """One kernel that stores every special register; warps of a 3-D block are linear in x, y, z."""
    lines = [
        f".visible .entry {{entry}}({parameters(1)})",
        "{",
        "    .reg .b32 %t<8>;",
        "    .reg .b64 %g, %w;",
    ]
    lines += ["    mov.u32 %t0, %tid.z;", "    mov.u32 %t1, %ntid.y;", "    mov.u32 %t2, %tid.y;"]
    lines += [
        "    mad.lo.u32 %t0, %t0, %t1, %t2;",
        "    mov.u32 %t1, %ntid.x;",
        "    mov.u32 %t2, %tid.x;",
    ]
    lines += [
        "    mad.lo.u32 %t0, %t0, %t1, %t2;",
        "    mov.u32 %t1, %ctaid.z;",
        "    mov.u32 %t2, %nctaid.y;",
    ]
    lines += [
        "    mov.u32 %t3, %ctaid.y;",
        "    mad.lo.u32 %t1, %t1, %t2, %t3;",
        "    mov.u32 %t2, %nctaid.x;",
    ]
    lines += [
        "    mov.u32 %t3, %ctaid.x;",
        "    mad.lo.u32 %t1, %t1, %t2, %t3;",
        "    mad.lo.u32 %t0, %t1, 64, %t0;",
    ]
    lines += [
        f"    mul.wide.u32 %w, %t0, {4 * len(SPECIALS)};",
        "    ld.param.u64 %g, [p_0];",
        "    add.u64 %g, %g, %w;",
    ]
    for i, name in enumerate(SPECIALS):
        lines += [f"    mov.u32 %t4, {name};", f"    st.global.u32 [%g+{4 * i}], %t4;"]
    body = "\n".join([*lines, "    ret;", "}"])
    words = 2 * 3 * 2 * 64 * len(SPECIALS)
    yield Form("special registers", body, lambda: [np.zeros(words, np.uint32)], (0,), grid=(2, 3, 2),
               block=(8, 4, 2), group="warp")  # fmt: skip


def barriers():
    options = {"group": "barriers", **LANES}
    cells = """
        .shared .align 4 .b8 cells_{tag}[1024];
        mov.u32 %t1, cells_{tag};
        shl.b32 %t2, %i, 2;
        add.u32 %t1, %t1, %t2;
        st.shared.b32 [%t1], %a0;
        {wait}
        xor.b32 %t2, %t2, 0x3F4;
        mov.u32 %t1, cells_{tag};
        add.u32 %t1, %t1, %t2;
        ld.shared.b32 %d0, [%t1];"""
    for tag, wait in (
        ("bar0", "bar.sync 0;"),
        ("bar3", "bar.sync 3, 256;"),
        ("aligned", "barrier.sync.aligned 1;"),
        ("unaligned", "barrier.sync 2, 256;"),
        ("cta", "barrier.cta.sync 4, 256;"),
    ):
        yield scalar(
            f"{wait} exchange", ["b32"], ["b32"], cells.format(tag=tag, wait=wait), **options
        )
    yield scalar(
        "barrier.arrive producer",
        ["b32"],
        ["b32"],
        **options,
        instructions="""
        .shared .align 4 .b8 cells_arrive[1024];
        mov.u32 %t1, cells_arrive;
        shl.b32 %t2, %i, 2;
        and.b32 %t3, %t2, 0x1FF;
        add.u32 %t3, %t3, %t1;
        mov.b32 %d0, 7;
        setp.lt.u32 %p0, %i, 128;
        @%p0 st.shared.b32 [%t3], %a0;
        @%p0 barrier.arrive 5, 256;
        @%p0 bra DONE_ARRIVE;
        barrier.sync 5, 256;
        ld.shared.b32 %d0, [%t3];
    DONE_ARRIVE:""",
    )
    for op in ("and", "or"):
        yield scalar(f"bar.red.{op}.pred", ["pred"], ["u32"], **options,
                     instructions=f"setp.gt.u32 %p0, %a0, 999; bar.red.{op}.pred %d0, 0, %p0;")  # fmt: skip
    yield scalar(
        "barrier.red.or.pred",
        ["pred"],
        ["u32"],
        **options,
        instructions="setp.gt.u32 %p0, %a0, 99999; barrier.red.or.pred %d0, 1, 256, %p0;",
    )
    yield scalar("bar.red.popc.u32", ["b32"], ["u32"], **options,
                 instructions="setp.gt.u32 %p0, %a0, 999; bar.red.popc.u32 %d0, 0, %p0;")  # fmt: skip


LOADS = (
    # instruction, elements, register type, bytes of an element
    ("ld.global.b32", 1, "b32"), ("ld.global.u8", 1, "b32"), ("ld.global.s8", 1, "b32"),
    ("ld.global.u16", 1, "b32"), ("ld.global.s16", 1, "b32"), ("ld.global.b64", 1, "b64"),
    ("ld.global.s32", 1, "b64"), ("ld.global.f64", 1, "f64"), ("ld.global.v2.b32", 2, "b32"),
    ("ld.global.v4.b32", 4, "b32"), ("ld.global.v4.f32", 4, "f32"), ("ld.global.v2.b64", 2, "b64"),
    ("ld.global.v2.u16", 2, "b16"), ("ld.global.v4.u16", 4, "b16"), ("ld.global.v4.u8", 4, "b16"),
    ("ld.global.nc.b32", 1, "b32"), ("ld.global.nc.v4.f32", 4, "f32"), ("ld.global.nc.u16", 1, "b16"),
    ("ld.global.nc.L1::no_allocate.v4.f32", 4, "f32"), ("ld.global.ca.b32", 1, "b32"),
    ("ld.global.nc.L1::no_allocate.L2::128B.v4.b32", 4, "b32"), ("ld.global.cs.v4.b32", 4, "b32"),
    ("ld.global.cg.v2.b32", 2, "b32"), ("ld.global.L2::128B.b32", 1, "b32"), ("ld.global.lu.b32", 1, "b32"),
    ("ld.volatile.global.b32", 1, "b32"), ("ld.relaxed.gpu.global.b32", 1, "b32"),
    ("ld.acquire.gpu.global.b32", 1, "b32"), ("ld.global.nc.L2::256B.v2.f32", 2, "f32"),
    ("ld.b32", 1, "b32"), ("ld.v4.b32", 4, "b32"), ("ld.global.nc.f32", 1, "f32"), ("ld.global.v2.f32", 2, "f32"),
    ("ld.global.nc.v2.b32", 2, "b32"), ("ld.global.nc.v2.f32", 2, "f32"), ("ld.global.nc.v4.b32", 4, "b32"),
)  # fmt: skip


def element_bytes(instruction):
    return int(instruction.rsplit(".", 1)[1][1:]) // 8


def vector(letter, count):
    names = ", ".join(f"%{letter}{i}" for i in range(count))
    return names if count == 1 else "{" + names + "}"


def move_body(load, store, count, kind, load_bytes, store_bytes, through="", scalars=()):
    """Each of 64 threads loads `count` elements from p_0 and stores the registers to p_1."""
    declared = {"f32": ".f32", "f64": ".f64"}.get(kind, f".{kind}")
    extra = ", .param .u32 p_2, .param .f32 p_3" if scalars else ""
    return "\n".join([
        f".visible .entry {{entry}}({parameters(2)}{extra})", "{",
        f"    .reg {declared} %v<4>;", "    .reg .f32 %f;", "    .reg .b32 %i, %t<8>;", "    .reg .b64 %g, %o, %w, %x;",
        "    mov.u32 %i, %tid.x;", "    ld.param.u64 %g, [p_0];", "    ld.param.u64 %o, [p_1];",
        f"    mul.wide.u32 %w, %i, {load_bytes};", "    add.u64 %g, %g, %w;",
        f"    mul.wide.u32 %w, %i, {store_bytes};", "    add.u64 %o, %o, %w;",
        f"    {load} {vector('v', count)}, [%g];", through,
        f"    {store} [%o], {vector('v', count)};", "    ret;", "}"])  # fmt: skip


def move(name, load, store, count, kind, through="", store_bytes=None, **options):
    size = int(kind[1:]) // 8 if kind[0] == "b" else {"f32": 4, "f64": 8}[kind]
    load_bytes, store_bytes = count * element_bytes(load), store_bytes or count * size

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        data = rng.integers(0, 256, 64 * load_bytes).astype(np.uint8)
        return [data, np.zeros(64 * store_bytes, np.uint8)]

    body = move_body(
        load, store, count, kind, load_bytes, store_bytes, through, options.get("scalars")
    )
    return Form(name, body, arguments, (1,), block=(64, 1, 1), **{"group": "memory", **options})


def loads_and_stores():
    for load, count, kind in LOADS:
        suffix = f".v{count}" if count > 1 else ""
        yield move(load, load, f"st.global{suffix}.{kind}", count, kind)
    for store in ("st.global.L1::no_allocate.v4.f32", "st.global.cs.v4.f32", "st.global.wt.v4.f32",
                  "st.global.cg.v4.f32", "st.global.v4.f32"):  # fmt: skip
        yield move(store, "ld.global.v4.f32", store, 4, "f32")
    for store, kind in (("st.volatile.global.b32", "b32"), ("st.relaxed.gpu.global.b32", "b32"),
                        ("st.release.gpu.global.b32", "b32"), ("st.b64", "b64"), ("st.global.b16", "b16")):  # fmt: skip
        yield move(store, f"ld.global.{kind}", store, 1, kind)
    for space, declare in (
        ("shared", ".shared .align 16 .b8 cell_{n}[2048];"),
        ("local", ".local .align 16 .b8 cell_{n}[16];"),
    ):
        for count, kind in (
            (1, "b16"),
            (1, "b32"),
            (2, "b32"),
            (4, "b32"),
            (2, "b64"),
            (2, "f32"),
            (4, "f32"),
        ):
            suffix = (f".v{count}" if count > 1 else "") + f".{kind}"
            tag = f"{space}_{count}_{kind}"
            stride = count * int(kind[1:]) // 8 if space == "shared" else 0
            through = "\n".join([
                f"    {declare.format(n=tag)}", f"    mov.u32 %t0, cell_{tag};", f"    mad.lo.u32 %t0, %i, {stride}, %t0;",
                f"    st.{space}{suffix} [%t0], {vector('v', count)};",
                *(f"    mov.{kind} %v{j}, {'0f00000000' if kind == 'f32' else 0};" for j in range(count)),
                f"    ld.{space}{suffix} {vector('v', count)}, [%t0];"])  # fmt: skip
            yield move(
                f"st, ld.{space}{suffix}",
                f"ld.global{suffix}",
                f"st.global{suffix}",
                count,
                kind,
                through,
            )
    yield move("st.global.u8", "ld.global.u8", "st.global.u8", 1, "b32", store_bytes=1)
    through = """
    cvta.to.global.u64 %o, %o;
    ld.param.u32 %t0, [p_2];
    ld.param.f32 %f, [p_3];
    mov.b32 %t1, %f;
    xor.b32 %v0, %v0, %t0;
    xor.b32 %v0, %v0, %t1;"""
    scalars = (0x1234567, -2.5)
    yield move(
        "cvta, ld.param", "ld.global.b32", "st.global.b32", 1, "b32", through, scalars=scalars
    )
    yield move(
        "generic address of shared",
        "ld.global.b32",
        "st.global.b32",
        1,
        "b32",
        """
    .shared .align 16 .b8 cell_generic[256];
    mov.u64 %x, cell_generic;
    cvta.shared.u64 %x, %x;
    mul.wide.u32 %w, %i, 4;
    add.u64 %x, %x, %w;
    st.b32 [%x], %v0;
    mov.b32 %v0, 0;
    cvta.to.shared.u64 %x, %x;
    ld.shared.b32 %v0, [%x];""",
    )
    yield move(
        "isspacep.shared",
        "ld.global.b32",
        "st.global.b32",
        1,
        "b32",
        """
    .shared .align 16 .b8 cell_space[256];
    .reg .pred %ps<2>;
    mov.u64 %x, cell_space;
    cvta.shared.u64 %x, %x;
    isspacep.shared %ps0, %x;
    isspacep.global %ps1, %g;
    selp.b32 %t0, 1, 0, %ps0;
    selp.b32 %t1, 2, 0, %ps1;
    or.b32 %v0, %t0, %t1;""",
    )


ATOMICS = (
    # operation, type, whether it may collide (its result does not depend on the order)
    ("add.u32", "u32", True), ("add.s32", "s32", True), ("add.u64", "u64", True), ("min.u32", "u32", True),
    ("min.s32", "s32", True), ("max.u32", "u32", True), ("max.s32", "s32", True), ("and.b32", "b32", True),
    ("or.b32", "b32", True), ("xor.b32", "b32", True), ("or.b64", "b64", True), ("max.u64", "u64", True),
    ("add.f32", "f32", False), ("add.f64", "f64", False), ("add.noftz.f16x2", "f16x2", False),
    ("add.noftz.bf16x2", "bf16x2", False), ("add.noftz.f16", "f16", False), ("add.noftz.bf16", "bf16", False),
    ("inc.u32", "u32", False), ("dec.u32", "u32", False), ("exch.b32", "b32", False), ("exch.b64", "b64", False),
)  # fmt: skip

MEMORY_BYTES = {"f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2}


def atomic_body(op, kind, space, returns, collide):
    """64 threads update cells of p_1 with p_0; `returns` stores the old values to p_2."""
    size = MEMORY_BYTES.get(kind) or int(kind[1:]) // 8
    declared = f".{kind}" if kind in ("f32", "f64") else f".b{8 * size}"
    suffix = kind if kind in ("f32", "f64") else f"b{8 * size}"
    verb = "atom" if returns else "red"
    destination = "%d, " if returns else ""
    lines = [
        f".visible .entry {{entry}}({parameters(3)})", "{",
        f"    .reg {declared} %a, %c, %d;", "    .reg .b32 %i, %j, %t;", "    .reg .b64 %x, %g, %o, %w;",
        "    mov.u32 %i, %tid.x;", "    ld.param.u64 %x, [p_0];", "    ld.param.u64 %g, [p_1];",
        "    ld.param.u64 %o, [p_2];", f"    mul.wide.u32 %w, %i, {size};", "    add.u64 %x, %x, %w;",
        "    add.u64 %o, %o, %w;", "    and.b32 %j, %i, 3;" if collide else "    mov.u32 %j, %i;",
        f"    ld.global.{suffix} %a, [%x];", f"    mul.wide.u32 %w, %j, {size};", "    add.u64 %g, %g, %w;",
    ]  # fmt: skip
    if space == "global":
        lines += [f"    {verb}.global.{op} {destination}[%g], %a;"]
    else:
        tag = "cells_" + op.replace(".", "_") + ("_a" if returns else "_r")
        lines += [
            f"    .shared .align 8 .b8 {tag}[512];", f"    mov.u32 %t, {tag};",
            f"    mad.lo.u32 %t, %j, {size}, %t;", f"    ld.global.{suffix} %c, [%g];",
            f"    st.shared.{suffix} [%t], %c;", "    bar.sync 0;", f"    {verb}.shared.{op} {destination}[%t], %a;",
            "    bar.sync 0;", f"    ld.shared.{suffix} %c, [%t];", f"    st.global.{suffix} [%g], %c;",
        ]  # fmt: skip
    if returns:
        # The old value depends on the order of colliding updates; store it only without them.
        lines += [] if collide else [f"    st.global.{suffix} [%o], %d;"]
    return "\n".join([*lines, "    ret;", "}"])


def atomics():
    for op, kind, collide in ATOMICS:
        size = MEMORY_BYTES.get(kind) or int(kind[1:]) // 8
        for space in ("global", "shared"):
            for returns in (True, False):
                if not returns and op.startswith("exch"):
                    continue
                name = f"{'atom' if returns else 'red'}.{space}.{op}"

                def arguments(name=name, kind=kind, size=size):
                    rng = np.random.default_rng(seed_of(name))
                    values, cells = operand(kind, rng, 64), operand(kind, rng, 64)
                    return [values, cells, np.zeros(64, f"u{size}")]

                target = "sm_90" if kind.startswith("bf16") else "sm_80"
                body = atomic_body(op, kind, space, returns, collide)
                yield Form(
                    name, body, arguments, (1, 2), block=(64, 1, 1), group="atomics", target=target
                )
    yield from compare_and_swap()


def compare_and_swap():
    """Each thread adds to one shared counter through a CAS loop; and one plain exchange per cell."""
    body = f""".visible .entry {{entry}}({parameters(2)})
{{
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
}}"""
    rng = np.random.default_rng(9)
    values = operand("u32", rng, 64)
    yield Form("atom.global.cas.b32 loop", body, lambda: [values, np.zeros(1, np.uint32)], (1,),
               block=(64, 1, 1), group="atomics")  # fmt: skip


def forms():
    """Every form of this file."""
    yield from lane_forms()
    yield from special_registers()
    yield from barriers()
    yield from loads_and_stores()
    yield from atomics()
