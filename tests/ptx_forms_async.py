"""Asynchronous instruction forms: cp.async, mbarrier, bulk copies and reductions."""

from functools import partial

import numpy as np
from ptx_forms import Form, seed_of
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


def bulk_form(name, lines, nbytes, group, kind="s8", style="exact", cluster=0, **options):
    """A form of a source and a destination of `nbytes`, both full of elements."""

    def arguments():
        rng = np.random.default_rng(seed_of(name))
        count = nbytes // elements(kind, rng, 1).itemsize
        return [elements(kind, rng, count, style).view(np.uint8) for _ in range(2)]

    body = entry(0, 2, *lines, cluster=cluster)
    options = {"target": "sm_90", **options, "block": (THREADS, 1, 1), "smem_bytes": SMEM_BYTES}
    return Form(name, body, arguments, (1,), group=group, **options)


# name: (cache operator, operands of each copy); %t1 and %t2 are source sizes that vary by thread
CP_ASYNC = {
    "cp.async.ca.shared.global 4": ("ca", [f"[%s+{4 * i}], [%g+{4 * i}], 4" for i in range(4)]),
    "cp.async.ca.shared.global 8": ("ca", ["[%s], [%g], 8", "[%s+8], [%g+8], 8"]),
    "cp.async.ca.shared.global 16": ("ca", ["[%s], [%g], 16"]),
    "cp.async.cg.shared.global 16": ("cg", ["[%s], [%g], 16"]),
    "cp.async.cg.shared.global.L2::128B 16": ("cg", ["[%s], [%g], 16"]),
    "cp.async.cg source size": ("cg", ["[%s], [%g], 16, %t1"]),
    "cp.async.ca source size": ("ca", ["[%s], [%g], 8, %t2", "[%s+8], [%g+8], 8, %t2"]),
}
CP_ASYNC_WAITS = {
    "wait_all": "    cp.async.wait_all;",
    "wait_group 0": """
    cp.async.commit_group;
    cp.async.commit_group;
    cp.async.wait_group 0;""",
    "noinc": "    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%bar];" + wait_barrier(),
}


def cp_async_forms():
    """Each thread copies 16 bytes in pieces, then waits by groups or by an mbarrier."""
    address = """
    ld.param.u64 %g, [p_0];
    mul.wide.u32 %w, %tx, 16;
    add.u64 %g, %g, %w;
    mad.lo.u32 %s, %tx, 16, %sm;
    rem.u32 %t1, %tx, 17;
    rem.u32 %t2, %tx, 9;"""
    for name, (cache, pieces) in CP_ASYNC.items():
        hint = ".L2::128B" if "L2" in name else ""
        copies = "\n".join(f"    cp.async.{cache}.shared.global{hint} {p};" for p in pieces)
        for wait, text in CP_ASYNC_WAITS.items():
            lines = [blank_shared(2048), init_barrier(THREADS) if wait == "noinc" else ""]
            lines += [address, copies, text, "    bar.sync 0;", dump_shared(1, 2048)]
            yield bulk_form(f"{name} {wait}", lines, 2048, "cp_async")


def bulk_copies():
    into = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    for nbytes in (16, 1008, 2048):
        load = f"""
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {nbytes};
    {into} [%sm], [%g], {nbytes}, [%bar];"""
        lines = [blank_shared(2048), init_barrier(), "    ld.param.u64 %g, [p_0];", by_leader(load)]
        lines += [wait_barrier(), dump_shared(1, 2048)]
        yield bulk_form(f"cp.async.bulk to shared {nbytes}", lines, 2048, "bulk")
        store = f"""
    cp.async.bulk.global.shared::cta.bulk_group [%g], [%sm], {nbytes};
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    cp.async.bulk.wait_group 0;"""
        lines = [*source_in_shared(2048), by_leader(store)]
        yield bulk_form(f"cp.async.bulk to global {nbytes}", lines, 2048, "bulk")


def source_in_shared(nbytes):
    """Shared memory full of p_0; %g points at p_1."""
    after = "\n    mov.u32 %sm, smem;\n    ld.param.u64 %g, [p_1];"
    return [fill_shared(0, nbytes), TO_ASYNC_PROXY, after]


# operation, type, elements of the operands
BULK_REDUCTIONS = (
    *((op, kind, "s8") for op in ("add", "min", "max") for kind in ("u32", "s32", "u64")),
    ("and", "b32", "s8"),
    ("xor", "b64", "s8"),
    ("inc", "u32", "s8"),
    ("dec", "u32", "s8"),
    ("add", "f32", "f32"),
    ("add.noftz", "f16", "f16"),
    ("add.noftz", "bf16", "bf16"),
    ("min", "bf16", "bf16"),
    ("max", "f16", "f16"),
)


def bulk_reductions():
    for op, kind, fill in BULK_REDUCTIONS:
        name = f"cp.reduce.async.bulk {op}.{kind}"
        issue = f"""
    cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}.{kind} [%g], [%sm], 1024;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;"""
        lines = [*source_in_shared(1024), by_leader(issue)]
        yield bulk_form(name, lines, 1024, "bulk", fill)
        if fill != "s8":
            yield bulk_form(f"{name} any bits", lines, 1024, "bulk", fill, "bits")


OUTPUT = """
    ld.param.u64 %g, [p_1];
    add.u64 %g, %g, %lane4;
    st.global.u32 [%g], %t3;"""
ARRIVE = "    mbarrier.arrive.shared::cta.b64 _, [%bar];"


def probe(parity, bit):
    """Set `bit` of %t3 where the phase of this parity is complete."""
    return f"""
    mbarrier.test_wait.parity.shared::cta.b64 %done, [%bar], {parity};
    selp.b32 %t2, {bit}, 0, %done;
    or.b32 %t3, %t3, %t2;
    bar.sync 0;"""


def mbarrier_forms():
    form = partial(bulk_form, nbytes=1024, group="mbarrier")
    start = init_barrier(THREADS) + "\n    mov.b32 %t3, 0;\n    .reg .b64 %state;"
    lines = [start, probe(0, 1), probe(1, 2), ARRIVE, wait_barrier(0, "W0"), "    bar.sync 0;"]
    lines += [probe(0, 4), probe(1, 8), ARRIVE, wait_barrier(1, "W1"), "    bar.sync 0;"]
    yield form("mbarrier phases", [*lines, probe(0, 16), probe(1, 32), OUTPUT])
    counts = """
    @!%leader bra COUNTED;
    mbarrier.arrive.shared::cta.b64 %state, [%bar];
    mbarrier.pending_count.b64 %t3, %state;
    mbarrier.arrive.shared::cta.b64 %state, [%bar], 5;
    mbarrier.pending_count.b64 %t2, %state;
    mad.lo.u32 %t3, %t2, 1000, %t3;
COUNTED:"""
    yield form("mbarrier state and pending count", [start, counts, OUTPUT])
    by_state = """
    mbarrier.arrive.shared::cta.b64 %state, [%bar];
WS:
    mbarrier.try_wait.shared::cta.b64 %done, [%bar], %state;
    @!%done bra WS;
    mov.b32 %t3, 1;"""
    yield form("mbarrier arrive with state", [start, by_state, OUTPUT])
    yield from mbarrier_by_leader(form)


def mbarrier_by_leader(form):
    """Phases that one thread completes."""
    start = init_barrier(1) + "\n    mov.b32 %t3, 0;"
    expect = f"    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 64;\n{ARRIVE}"
    complete = "    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%bar], 64;"
    lines = [start, by_leader(expect), "    bar.sync 0;", probe(0, 1)]
    lines += [by_leader(complete, "NOT_LEADER2"), "    bar.sync 0;", probe(0, 2), OUTPUT]
    yield form("mbarrier expect_tx and complete", lines)
    renew = """
    mbarrier.inval.shared::cta.b64 [%bar];
    mbarrier.init.shared::cta.b64 [%bar], 2;
    mbarrier.arrive.noComplete.shared::cta.b64 %o, [%bar], 1;"""
    lines = [start, by_leader(renew), "    bar.sync 0;", probe(0, 1)]
    lines += [by_leader(ARRIVE, "NOT_LEADER2"), "    bar.sync 0;", probe(0, 2), OUTPUT]
    yield form("mbarrier inval and reuse", lines)


def forms():
    """Every asynchronous form of one block without a tensor map."""
    yield from cp_async_forms()
    yield from mbarrier_forms()
    yield from bulk_copies()
    yield from bulk_reductions()
