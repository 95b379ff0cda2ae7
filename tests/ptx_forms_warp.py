"""Instruction forms across threads: shuffles, votes, matches, barriers, special registers."""

from functools import partial

import numpy as np
from ptx_forms import Form, kernel, scalar

LANES = {"n": 256, "grid": (1, 1, 1), "block": (256, 1, 1)}  # eight warps
FULL = "0xFFFFFFFF"
# mode: the clamp of the whole warp, and one of segments of 8 or 16 lanes
SHUFFLES = {"bfly": (31, 0x181F), "up": (0, 0x1800), "down": (31, 0x101F), "idx": (31, 0x1807)}
REDUCTIONS = (
    *("add.u32", "add.s32", "min.u32", "min.s32", "max.u32", "max.s32"),
    *("and.b32", "or.b32", "xor.b32"),
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


def shuffles():
    form = partial(scalar, group="warp", **LANES)
    for mode, clamps in SHUFFLES.items():
        op = f"shfl.sync.{mode}.b32"
        for clamp in clamps:
            for amount in (1, 3, 8, 31):
                text = f"{op} %d0|%d1, %a0, {amount}, {clamp}, {FULL};"
                yield form(f"{op} {amount} {clamp:#x}", ["b32", "pred"], ["b32"], text)
        text = f"{op} %d0, %a0, %a1, {clamps[0]}, {FULL};"
        yield form(f"{op} register", ["b32"], ["b32", "u32"], text)


def votes():
    form = partial(scalar, sources=["u32"], group="warp", adjust=by_warp, **LANES)
    test = "setp.gt.u32 %p0, %a0, 999;"
    for mode in ("all", "any", "uni"):
        op = f"vote.sync.{mode}.pred"
        yield form(op, ["pred"], instructions=f"{test} {op} %d0, %p0, {FULL};")
    op = "vote.sync.ballot.b32"
    yield form(op, ["b32"], instructions=f"{test} {op} %d0, %p0, {FULL};")
    yield form(f"{op} negated", ["b32"], instructions=f"{test} {op} %d0, !%p0, {FULL};")


def matches():
    form = partial(scalar, group="warp", **LANES)
    for kind in ("b32", "b64"):
        op = f"match.any.sync.{kind}"
        yield form(op, ["b32"], [kind], f"{op} %d0, %a0, {FULL};", adjust=few_values)
        op = f"match.all.sync.{kind}"
        yield form(op, ["b32", "pred"], [kind], f"{op} %d0|%d1, %a0, {FULL};", adjust=few_values)
    for reduction in REDUCTIONS:
        op = f"redux.sync.{reduction}"
        yield form(op, ["b32"], ["b32"], f"{op} %d0, %a0, {FULL};")
    text = f"elect.sync %d0|%d1, {FULL};"
    yield form("elect.sync", ["b32", "pred"], ["u32"], text, target="sm_90")
    text = """
        mov.b32 %d0, 0;
        setp.gt.u32 %p0, %a0, 999;
        @!%p0 bra DONE_ACTIVE;
        activemask.b32 %d0;
    DONE_ACTIVE:"""
    yield form("activemask.b32 divergent", ["b32"], ["u32"], text)


# Each thread stores a word, waits, and loads the word of another thread.
EXCHANGE = """
    .shared .align 4 .b8 cells_{tag}[1024];
    mov.u32 %t1, cells_{tag};
    shl.b32 %t2, %i, 2;
    add.u32 %t1, %t1, %t2;
    st.shared.b32 [%t1], %a0;
    {wait}
    xor.b32 %t2, %t2, {other};
    mov.u32 %t1, cells_{tag};
    add.u32 %t1, %t1, %t2;
    ld.shared.b32 %d0, [%t1];"""

# Four warps store and arrive; the other four wait for them.
PRODUCER = """
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
DONE_ARRIVE:"""

WAITS = {
    "bar0": "bar.sync 0;",
    "bar3": "bar.sync 3, 256;",
    "aligned": "barrier.sync.aligned 1;",
    "unaligned": "barrier.sync 2, 256;",
    "cta": "barrier.cta.sync 4, 256;",
}


def barriers():
    wait = f"bar.warp.sync {FULL};"
    text = EXCHANGE.format(tag="warp", wait=wait, other=16)
    yield scalar("bar.warp.sync exchange", ["b32"], ["b32"], text, group="warp", **LANES)
    form = partial(scalar, group="barriers", **LANES)
    for tag, wait in WAITS.items():
        text = EXCHANGE.format(tag=tag, wait=wait, other="0x3F4")
        yield form(f"{wait} exchange", ["b32"], ["b32"], text)
    yield form("barrier.arrive producer", ["b32"], ["b32"], PRODUCER)
    test = "setp.gt.u32 %p0, %a0, 999;"
    for op in ("and", "or"):
        text = f"{test} bar.red.{op}.pred %d0, 0, %p0;"
        yield form(f"bar.red.{op}.pred", ["pred"], ["u32"], text)
    text = f"{test} bar.red.popc.u32 %d0, 0, %p0;"
    yield form("bar.red.popc.u32", ["b32"], ["u32"], text)
    text = "setp.gt.u32 %p0, %a0, 99999; barrier.red.or.pred %d0, 1, 256, %p0;"
    yield form("barrier.red.or.pred", ["pred"], ["u32"], text)


SPECIALS = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt"),
)

# Thread t of block b stores its special registers at row 64 b + t.
SPECIAL_REGISTERS = """
.visible .entry {entry}(.param .u64 p_0)
{
    .reg .b32 %t<8>;
    .reg .b64 %g, %w;
    mov.u32 %t0, %tid.z;
    mov.u32 %t1, %ntid.y;
    mov.u32 %t2, %tid.y;
    mad.lo.u32 %t0, %t0, %t1, %t2;
    mov.u32 %t1, %ntid.x;
    mov.u32 %t2, %tid.x;
    mad.lo.u32 %t0, %t0, %t1, %t2;
    mov.u32 %t1, %ctaid.z;
    mov.u32 %t2, %nctaid.y;
    mov.u32 %t3, %ctaid.y;
    mad.lo.u32 %t1, %t1, %t2, %t3;
    mov.u32 %t2, %nctaid.x;
    mov.u32 %t3, %ctaid.x;
    mad.lo.u32 %t1, %t1, %t2, %t3;
    mad.lo.u32 %t0, %t1, 64, %t0;
    mul.wide.u32 %w, %t0, $pitch;
    ld.param.u64 %g, [p_0];
    add.u64 %g, %g, %w;
    $stores
    ret;
}"""


def special_registers():
    stores = "\n".join(
        f"    mov.u32 %t4, {name};\n    st.global.u32 [%g+{4 * i}], %t4;"
        for i, name in enumerate(SPECIALS)
    )
    body = kernel(SPECIAL_REGISTERS, pitch=4 * len(SPECIALS), stores=stores)
    words = 2 * 3 * 2 * 64 * len(SPECIALS)
    shape = {"grid": (2, 3, 2), "block": (8, 4, 2), "group": "warp"}
    yield Form("special registers", body, lambda: [np.zeros(words, np.uint32)], (0,), **shape)


def forms():
    """Every form across lanes and threads of a block."""
    yield from shuffles()
    yield from votes()
    yield from matches()
    yield from barriers()
    yield from special_registers()
