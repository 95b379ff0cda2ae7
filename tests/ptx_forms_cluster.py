"""Cluster instruction forms: distributed shared memory, remote barriers, multicast.

Clusters of four blocks of 128 threads.  %t0 is the block's rank, %t1 the next one's.
"""

from functools import partial

import numpy as np
import torch
from ptx_forms import Form, Map
from ptx_forms_async import bulk_form
from ptx_forms_pieces import (
    SMEM_BYTES,
    THREADS,
    blank_shared,
    by_leader,
    dump_shared,
    entry,
    init_barrier,
    wait_barrier,
)
from ptx_forms_tensor import MAP_ADDRESS, tensor

WAIT = """
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;"""
RELAXED = """
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.acquire.aligned;"""
PLAIN = """
    barrier.cluster.arrive;
    barrier.cluster.wait;"""
RANK = """
    mov.u32 %t0, %cluster_ctarank;
    add.u32 %t1, %t0, 1;
    and.b32 %t1, %t1, 3;"""
# This thread's word of p_0 in %q0, its place in shared memory in %s.
WORD = """
    mad.lo.u32 %s, %tx, 4, %sm;
    mad.lo.u32 %t2, %t0, 128, %tx;
    mul.wide.u32 %w, %t2, 4;
    ld.param.u64 %g, [p_0];
    add.u64 %g, %g, %w;
    ld.global.u32 %q0, [%g];"""
STORE_WORD = """
    ld.param.u64 %g, [p_1];
    add.u64 %g, %g, %w;
    st.global.u32 [%g], %t3;"""
KEEP = "    st.shared.u32 [%s], %q0;"
NEXT = "    mapa.shared::cluster.u32 %remote, %s, %t1;"
NEXT_BARRIER = "    mapa.shared::cluster.u32 %remote, %bar, %t1;"
LOAD_OWN = "    ld.shared.u32 %t3, [%s];"

COMMON = {"nbytes": 2048, "group": "cluster", "grid": (4, 1, 1), "cluster": 4}


def words():
    """Four bytes of each thread travel to or from the next block."""
    form, head = partial(bulk_form, **COMMON), [RANK, WORD]
    load = "    ld.shared::cluster.u32 %t3, [%remote];"
    lines = [*head, KEEP, WAIT, NEXT, load, STORE_WORD, WAIT]
    yield form("ld.shared::cluster of the next block", lines)
    store = "    st.shared::cluster.u32 [%remote], %q0;"
    yield form(
        "st.shared::cluster to the next block",
        [*head, WAIT, NEXT, store, WAIT, LOAD_OWN, STORE_WORD],
    )
    at_first = """
    mapa.shared::cluster.u32 %remote, %s, 0;
    atom.shared::cluster.add.u32 %t3, [%remote], %q0;"""
    zero = "    st.shared.u32 [%s], 0;"
    lines = [*head, zero, WAIT, at_first, WAIT, LOAD_OWN, STORE_WORD]
    yield form("atom.shared::cluster at block 0", lines)
    generic = """
    cvt.u64.u32 %o, %s;
    cvta.shared.u64 %o, %o;
    mapa.u64 %o, %o, %t1;
    ld.u32 %t3, [%o];"""
    yield form("mapa.u64 generic", [*head, KEEP, WAIT, generic, STORE_WORD, WAIT])


def from_block(step, nbytes):
    """Oracle: block r ends with the bytes of block r + step."""
    return lambda data: [np.roll(data.reshape(4, -1), -step, axis=0).reshape(nbytes)]


def vectors(count):
    """The same with `count` f32 a thread, and the other spellings of the cluster barrier."""
    size, nbytes = 4 * count, 4 * THREADS * 4 * count
    form = partial(bulk_form, **{**COMMON, "nbytes": nbytes, "kind": "f32"})
    vector = "{" + ", ".join(f"%v{i}" for i in range(count)) + "}"
    own_place = f"""
    mul.wide.u32 %w, %t2, {size};
    ld.param.u64 %g, [p_0];
    add.u64 %g, %g, %w;
    ld.global.v{count}.f32 {vector}, [%g];
    mad.lo.u32 %s, %tx, {size}, %sm;"""
    head = [f"    .reg .f32 %v<{count}>;", RANK, WORD, own_place]
    out = f"""
    ld.param.u64 %g, [p_1];
    add.u64 %g, %g, %w;
    st.global.v{count}.f32 [%g], {vector};"""
    keep = f"    st.shared.v{count}.f32 [%s], {vector};"
    load = f"    ld.shared::cluster.v{count}.f32 {vector}, [%remote];"
    end = "\n    barrier.cluster.arrive.relaxed;\n    barrier.cluster.wait;"
    lines = [*head, keep, PLAIN, NEXT, load, out, end]
    yield form(f"ld.shared::cluster.v{count}.f32", lines, oracle=from_block(1, nbytes))
    store = f"    st.shared::cluster.v{count}.f32 [%remote], {vector};"
    own = f"    ld.shared.v{count}.f32 {vector}, [%s];"
    lines = [*head, RELAXED, NEXT, store, PLAIN, own, out]
    yield form(f"st.shared::cluster.v{count}.f32", lines, oracle=from_block(-1, nbytes))
    expect = f"    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {nbytes // 4};"
    send = f"""
    mapa.shared::cluster.u32 %dst, %s, %t1;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v{count}.f32
        [%dst], {vector}, [%remote];"""
    wait = wait_barrier().replace("parity.", "parity.acquire.cluster.")
    lines = [*head, init_barrier(1), by_leader(expect), WAIT, NEXT_BARRIER, send, wait, own, out]
    options = {"oracle": from_block(-1, nbytes), "version": "8.1"}
    yield form(f"st.async.v{count}.f32 to the next block", [*lines, WAIT], **options)


def barriers_and_copies():
    form, head = partial(bulk_form, **COMMON), [RANK, WORD]
    ready = [*head, init_barrier(128), WAIT, NEXT_BARRIER]
    arrive = "    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%remote];"
    end = [wait_barrier(), "    mov.b32 %t3, %t2;", STORE_WORD, WAIT]
    yield form("remote mbarrier arrive", [*ready, arrive, *end])
    arrive = "    mbarrier.arrive.shared::cluster.b64 _, [%remote];"
    end = [wait_barrier(), "    mov.b32 %t3, %q0;", STORE_WORD, WAIT]
    yield form("mbarrier.arrive.shared::cluster", [*ready, arrive, *end])
    expect = "    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;"
    copy = f"""{expect}
    mapa.shared::cluster.u32 %remote, %bar, %t1;
    add.u32 %src, %sm, 512;
    mapa.shared::cluster.u32 %dst, %src, %t1;
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [%dst], [%sm], 512, [%remote];"""
    proxy = "    fence.proxy.async.shared::cta;"
    load = "    ld.shared.u32 %t3, [%s+512];"
    lines = [*head, KEEP, init_barrier(1), proxy, WAIT, by_leader(copy), wait_barrier()]
    yield form("cp.async.bulk between blocks", [*lines, load, STORE_WORD, WAIT])
    send = """
    mapa.shared::cluster.u32 %remote, %bar, %t1;
    mapa.shared::cluster.u32 %dst, %s, %t1;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%dst], %q0, [%remote];"""
    lines = [*head, init_barrier(1), by_leader(expect), WAIT, send, wait_barrier()]
    lines += [LOAD_OWN, STORE_WORD, WAIT]
    yield form("st.async to the next block", lines, version="8.1")


def special_registers():
    axes = ("%cluster_ctaid.x", "%cluster_nctaid.x", "%clusterid.x", "%nclusterid.x")
    pack = "\n".join(
        f"    mov.u32 %q1, {name};\n    mad.lo.u32 %t3, %t3, 10, %q1;"
        for name in ("%cluster_ctarank", "%cluster_nctarank", *axes)
    )
    lines = ["    mov.u32 %t0, %ctaid.x;", WORD, "    mov.b32 %t3, 0;", pack, STORE_WORD]
    shape = {**COMMON, "grid": (8, 1, 1), "nbytes": 4096}
    yield bulk_form("cluster special registers", lines, **shape)


def multicast():
    """Block r loads rows 8r..8r+7 of a 32 x 64 tile into every block of the cluster."""
    op = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    where = """
    mov.u16 %mask, 15;
    shl.b32 %t2, %t0, 3;
    mad.lo.u32 %dst, %t0, 1024, %sm;"""
    expect = "    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 4096;"
    issue = f"    {op}.multicast::cluster [%dst], [%map, {{%q3, %t2}}], [%bar], %mask;"
    lines = ["    mov.b32 %q3, 0;", "    .reg .b16 %mask;", blank_shared(4096), init_barrier()]
    lines += [RANK, MAP_ADDRESS, where, by_leader(expect), WAIT]
    lines += [by_leader(issue, "NOT_LEADER2"), wait_barrier(), dump_shared(1, 4096), WAIT]
    body = entry(1, 2, *lines, cluster=4)
    to_own_part = """ld.param.u64 %g, [p_1];
    mov.u32 %t3, %ctaid.x;
    mul.wide.u32 %w, %t3, 4096;
    add.u64 %g, %g, %w;"""
    body = body.replace("ld.param.u64 %g, [p_1];", to_own_part)
    made = Map(0, (32, 64), torch.bfloat16, (64, 8), 128)
    data = tensor((32, 64), torch.bfloat16, 5)
    shape = {"grid": (4, 1, 1), "block": (THREADS, 1, 1), "smem_bytes": SMEM_BYTES}
    options = {"maps": (made,), "group": "cluster", "target": "sm_90a"}
    out = np.zeros(4 * 4096, np.uint8)
    yield Form("tensor load multicast", body, lambda: [data, out], (1,), **shape, **options)


def forms():
    """Every form of a cluster."""
    yield from words()
    yield from vectors(2)
    yield from vectors(4)
    yield from barriers_and_copies()
    yield from special_registers()
    yield from multicast()
