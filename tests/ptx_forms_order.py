"""Instruction forms that order, hint, wait or stop: the data must pass them unchanged.

Fences, cache hints and prefetches, griddepcontrol (nothing to wait for in a plain launch), exit,
the spellings of barriers and asynchronous copies that the other tables do not use, and carries.
"""

from dataclasses import replace
from functools import partial

import numpy as np
from ptx_forms import scalar
from ptx_forms_async import ARRIVE, OUTPUT, bulk_form, probe
from ptx_forms_cluster import COMMON, LOAD_OWN, NEXT, NEXT_BARRIER, RANK, STORE_WORD, WAIT, WORD
from ptx_forms_memory import move, unchanged
from ptx_forms_oracle import integers
from ptx_forms_pieces import (
    THREADS,
    blank_shared,
    by_leader,
    dump_shared,
    init_barrier,
    wait_barrier,
)
from ptx_forms_warp import LANES, PRODUCER

# %g is this thread's word, %x the first one; both are loaded before.
BETWEEN = (
    *(f"fence.{s}.{scope};" for s in ("acq_rel", "sc") for scope in ("cta", "gpu", "cluster")),
    *(f"membar.{scope};" for scope in ("cta", "gl", "sys")),
    *("fence.proxy.alias;", "fence.proxy.tensormap::generic.release.gpu;"),
    "fence.proxy.tensormap::generic.acquire.gpu [%x], 128;",
    *("griddepcontrol.wait;", "griddepcontrol.launch_dependents;"),
    *("nanosleep.u32 20;", "pmevent 1;"),
    *("prefetch.global.L2 [%g];", "prefetch.global.L2::evict_last [%g];", "prefetchu.L1 [%g];"),
    "applypriority.global.L2::evict_normal [%x], 128;",
    "cp.async.bulk.prefetch.L2.global [%x], 128;",
    "bar.sync 0; discard.global.L2 [%x], 128;",
)
RESTRICTED = (
    "fence.acquire.gpu;",
    "fence.release.sync_restrict::shared::cta.cluster;",
    "fence.acquire.sync_restrict::shared::cluster.cluster;",
)
POLICY = """
    createpolicy.fractional.L2::evict_last.b64 %x, 1.0;
    ld.global.L2::cache_hint.b32 %v0, [%g], %x;
    st.global.L2::cache_hint.b32 [%o], %v0, %x;"""
EXIT = """
    .reg .pred %late;
    setp.ge.u32 %late, %i, 40;
    @%late exit;"""


def passed():
    """64 words go from p_0 to p_1 with the instruction between load and store."""
    form = partial(move, load="ld.global.b32", store="st.global.b32", count=1, kind="b32")
    new = {"group": "order", "target": "sm_90", "version": "8.3"}
    for line in BETWEEN:
        through = f"    ld.param.u64 %x, [p_0];\n    {line}"
        yield replace(form(f"passing {line}", through=through, oracle=unchanged), **new)
    later = {**new, "group": "order_86", "version": "8.6"}
    for line in RESTRICTED:
        through = f"    {line}"
        yield replace(form(f"passing {line}", through=through, oracle=unchanged), **later)
    yield replace(form("cache policy", through=POLICY, oracle=unchanged), **new)
    yield replace(form("exit of some threads", through=EXIT, oracle=first_forty), **new)
    ldu = move("ldu.global.b32", "ldu.global.b32", "st.global.b32", 1, "b32", oracle=unchanged)
    yield replace(ldu, **new)


def first_forty(data):
    """Oracle: the other threads stored nothing."""
    return [np.where(np.arange(256) < 160, data, 0).astype(np.uint8)]


def above(data):
    """Oracle: every thread knows how many of the block have a value above 999."""
    return [np.full(256, (data > 999).sum(), np.uint32)]


def received(data):
    """Oracle of PRODUCER: the second half of the block has what the first half stored."""
    return [np.concatenate([np.full(128, 7, np.uint32), data[:128]])]


def block_barriers():
    form = partial(scalar, group="barriers", **LANES)
    for family in ("bar", "bar.cta", "barrier.cta"):
        text = PRODUCER.replace("barrier.", f"{family}.")
        yield form(f"{family}.arrive producer", ["b32"], ["b32"], text, oracle=received)
    for family in ("bar.cta", "barrier.cta"):
        text = f"setp.gt.u32 %p0, %a0, 999; {family}.red.popc.u32 %d0, 1, 256, %p0;"
        yield form(f"{family}.red.popc.u32", ["b32"], ["u32"], text, oracle=above)


def drops():
    """Half of the threads leave an mbarrier: its next phase completes without them."""
    drop = """
    .reg .b64 %state;
    setp.lt.u32 %p0, %tx, 64;
    @%p0 mbarrier.arrive_drop.shared::cta.b64 %state, [%bar];
    @!%p0 mbarrier.arrive.shared::cta.b64 _, [%bar];"""
    again = ARRIVE.replace("mbarrier", "@!%p0 mbarrier", 1)
    lines = [init_barrier(THREADS), "    mov.b32 %t3, 0;", drop, wait_barrier(0, "W0")]
    lines += ["    bar.sync 0;", probe(0, 1), probe(1, 2), again, wait_barrier(1, "W1")]
    lines += ["    bar.sync 0;", probe(1, 4), OUTPUT]
    five = np.full(128, 5, np.uint32).view(np.uint8)
    yield bulk_form("mbarrier.arrive_drop", lines, 512, "order", oracle=lambda data: [five])


def copies():
    """Copies whose destination is spelled shared::cta."""
    address = """
    ld.param.u64 %g, [p_0];
    mul.wide.u32 %w, %tx, 16;
    add.u64 %g, %g, %w;
    mad.lo.u32 %s, %tx, 16, %sm;"""
    for cache in ("ca", "cg"):
        op = f"cp.async.{cache}.shared::cta.global"
        copy = f"{address}\n    {op} [%s], [%g], 16;\n    cp.async.wait_all;\n    bar.sync 0;"
        lines = [blank_shared(2048), copy, dump_shared(1, 2048)]
        yield bulk_form(op, lines, 2048, "order", oracle=unchanged)
    op = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
    issue = f"""
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 2048;
    ld.param.u64 %g, [p_0];
    {op} [%sm], [%g], 2048, [%bar];"""
    lines = [blank_shared(2048), init_barrier(), by_leader(issue), wait_barrier()]
    lines += [dump_shared(1, 2048)]
    yield bulk_form(op, lines, 2048, "order_86", oracle=unchanged, version="8.6")


def of_clusters():
    form = partial(bulk_form, **{**COMMON, "group": "order"})
    rank = f"{NEXT}\n    getctarank.shared::cluster.u32 %t3, %remote;"
    ranks = np.repeat([1, 2, 3, 0], 128).astype(np.uint32).view(np.uint8)
    lines = [RANK, WORD, rank, STORE_WORD]
    yield form("getctarank.shared::cluster", lines, oracle=lambda data: [ranks])
    add = """
    mapa.shared::cluster.u32 %dst, %s, %t1;
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32
        [%dst], %q0, [%remote];"""
    expect = "    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;"
    hundred = "    st.shared.u32 [%s], 100;\n    fence.proxy.async.shared::cta;"
    lines = [RANK, WORD, hundred, init_barrier(1), by_leader(expect), WAIT, NEXT_BARRIER, add]
    lines += [wait_barrier(), LOAD_OWN, STORE_WORD, WAIT]

    def sums(data):
        words = np.roll(data.view(np.uint32).reshape(4, -1), 1, axis=0)
        return [(words + np.uint32(100)).reshape(-1).view(np.uint8)]

    yield form("red.async to the next block", lines, oracle=sums, version="8.1")


def carries():
    """Sums and differences of 64 bits in two halves."""
    for name, sign in (("add", 1), ("sub", -1)):
        text = f"{name}.cc.u32 %d0, %a0, %a1;\n{name}c.u32 %d1, %a2, %a3;"

        def oracle(*raw, sign=sign):
            low, other, high, more = (np.array(integers("u32", r), object) for r in raw)
            total = low + (high << 32) + sign * (other + (more << 32))
            return [(total % 2**32).astype(np.uint32), (total // 2**32 % 2**32).astype(np.uint32)]

        kinds = {"results": ["u32"] * 2, "sources": ["u32"] * 4, "group": "integer_arithmetic"}
        yield scalar(f"{name}.cc, {name}c", instructions=text, oracle=oracle, **kinds)


def forms():
    """Every form of order and hints."""
    yield from passed()
    yield from block_barriers()
    yield from drops()
    yield from copies()
    yield from of_clusters()
    yield from carries()
