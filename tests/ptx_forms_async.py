"""Asynchronous instruction forms: cp.async, mbarrier, bulk copies, tensor maps, clusters."""

import numpy as np
import torch
from ptx_forms import Form, Map, parameters, seed_of
from ptx_forms_matrix import SHARED_REGISTERS, dump_shared, elements, fill_shared

THREADS = 128
# Data from offset 0 of dynamic shared memory, the mbarrier behind it: a static array could move
# the dynamic part off its 1024-byte alignment.
BARRIER = 8192
SMEM_BYTES = BARRIER + 64


def entry(maps, pointers, lines, cluster=0):
    """An entry with `maps` tensor-map parameters first, then `pointers` pointers."""
    listed = [f".param .align 64 .b8 p_map{i}[128]" for i in range(maps)]
    listed += [parameters(pointers)] if pointers else []
    head = [f".visible .entry {{entry}}({', '.join(listed)})", f".reqntid {THREADS}, 1, 1"]
    if cluster:
        head += [".explicitcluster", f".reqnctapercluster {cluster}, 1, 1"]
    body = [
        *SHARED_REGISTERS, "    .reg .b64 %map, %o;", "    .reg .b32 %bar, %dst, %src, %remote;", "    .reg .pred %leader, %done;",
        "    mov.u32 %sm, smem;", f"    add.u32 %bar, %sm, {BARRIER};", "    mov.u32 %tx, %tid.x;",
        "    mul.wide.u32 %lane4, %tx, 4;", "    setp.eq.u32 %leader, %tx, 0;",
    ]  # fmt: skip
    return "\n".join([*head, "{", *body, *lines, "    ret;", "}"])


def blank_shared(nbytes):
    """Fill shared memory with 0xEE, so that bytes a copy does not write are known."""
    return [
        "    mov.u32 %i, %tx;", "BLANK:", "    mad.lo.u32 %s, %i, 4, %sm;", "    st.shared.u32 [%s], 0xEEEEEEEE;",
        f"    add.u32 %i, %i, {THREADS};", f"    setp.lt.u32 %more, %i, {nbytes // 4};", "    @%more bra BLANK;",
        "    fence.proxy.async.shared::cta;", "    bar.sync 0;",
    ]  # fmt: skip


def init_barrier(count=1):
    return [
        "    @!%leader bra BARRIER_READY;", f"    mbarrier.init.shared::cta.b64 [%bar], {count};",
        "    fence.mbarrier_init.release.cluster;", "BARRIER_READY:", "    bar.sync 0;",
    ]  # fmt: skip


def wait_barrier(parity=0, label="WAIT"):
    return [
        f"{label}:", f"    mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], {parity};", f"    @!%done bra {label};",
    ]  # fmt: skip


def by_leader(lines, label="NOT_LEADER"):
    return [f"    @!%leader bra {label};", *lines, f"{label}:"]


def tensor(shape, dtype, seed):
    """Raw words of a tensor with values that are exact in its type."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}.get(dtype, "s8")
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == torch.int32:
        return rng.integers(0, 1 << 31, count).astype(np.uint32)
    return elements(kind, rng, count)


TILED = (
    # tensor shape (outermost first), box (innermost first), element strides, swizzle, dtype, coordinates
    ((256,), (64,), None, 0, torch.float32, ((0,), (-16,), (224,))),
    ((50, 72), (64, 16), None, 128, torch.bfloat16, ((0, 0), (48, 40), (-8, -3), (72, 0))),
    ((50, 72), (32, 16), None, 64, torch.float16, ((0, 0), (56, 44), (-8, 5))),
    ((50, 72), (16, 16), None, 32, torch.bfloat16, ((8, 3), (64, 48))),
    ((50, 72), (8, 16), None, 0, torch.bfloat16, ((8, 3), (70, 48))),
    ((40, 128), (128, 8), None, 128, torch.uint8, ((0, 0), (64, 36))),
    ((40, 64), (16, 8), None, 64, torch.int32, ((4, 2), (60, 36))),
    ((9, 33, 48), (16, 8, 3), None, 32, torch.bfloat16, ((0, 0, 0), (40, 30, 8), (-8, -2, -1))),
    ((2, 12, 20, 64), (64, 8, 4, 1), None, 128, torch.bfloat16, ((0, -1, -1, 0), (0, 17, 10, 1))),
    ((2, 12, 20, 64), (64, 8, 8, 1), (1, 2, 2, 1), 128, torch.bfloat16, ((0, 0, 0, 0), (0, -1, -1, 1))),
    ((2, 12, 20, 64), (64, 7, 5, 1), (1, 3, 2, 1), 128, torch.bfloat16, ((0, 1, 1, 0),)),
    ((2, 3, 4, 5, 16), (16, 4, 3, 2, 2), None, 0, torch.float32, ((0, 0, 0, 0, 0), (0, 3, 2, 2, 1))),
    # Boxes narrower than their swizzle.
    ((50, 72), (32, 16), None, 128, torch.bfloat16, ((0, 0),)),
    ((50, 72), (16, 16), None, 128, torch.bfloat16, ((0, 0),)),
    ((50, 72), (16, 16), None, 64, torch.bfloat16, ((0, 0),)),
    ((50, 72), (8, 16), None, 32, torch.bfloat16, ((0, 0),)),
)  # fmt: skip


def box_bytes(box, steps, dtype):
    counts = [
        box[0],
        *(-(-b // s) for b, s in zip(box[1:], (steps or (1,) * len(box))[1:], strict=True)),
    ]
    return int(np.prod(counts)) * torch.empty(0, dtype=dtype).element_size()


def coordinate_text(coordinates):
    return "{" + ", ".join(str(c) for c in coordinates) + "}"


def map_address(index=0):
    return [
        f"    mov.b64 %map, p_map{index};",
        "    cvta.param.u64 %map, %map;",
        "    prefetch.tensormap [%map];",
    ]


def tiled_forms():
    for case, (shape, box, steps, swizzle, dtype, places) in enumerate(TILED):
        nbytes = box_bytes(box, steps, dtype)
        smem = -(-nbytes // 512) * 512 + 512
        rank = len(shape)
        made = (Map(0, shape, dtype, box, swizzle, steps),)
        kind = str(dtype).split(".")[1]
        for place, coordinates in enumerate(places):
            label = f"{rank}d {kind} case {case} swizzle {swizzle} at {coordinates}"
            at = f"[%map, {coordinate_text(coordinates)}]"
            name = f"tensor load {label}"
            op = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            lines = [
                *blank_shared(smem), *init_barrier(), *map_address(),
                *by_leader([f"    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {nbytes};",
                            f"    {op} [%sm], {at}, [%bar];"]),
                *wait_barrier(), *dump_shared(1, smem, THREADS),
            ]  # fmt: skip
            yield tensor_form(name, lines, shape, dtype, made, smem, (1,))
            if place == len(places) - 1 or place == 0:
                yield store_form(f"tensor store {label}", rank, at, shape, dtype, made, smem)


def tensor_form(name, lines, shape, dtype, made, smem, outputs, group="tensor_load"):
    def arguments():
        data = tensor(shape, dtype, seed_of(name))
        rng = np.random.default_rng(seed_of(name) + 1)
        kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}.get(dtype, "s8")
        image = elements(kind, rng, smem // elements(kind, rng, 1).itemsize).view(np.uint8)
        return [data, image if outputs == (0,) else np.zeros(smem, np.uint8)]

    return Form(name, entry(1, 2, lines), arguments, outputs, block=(THREADS, 1, 1), smem_bytes=SMEM_BYTES, maps=made,
                group=group, target="sm_90a")  # fmt: skip


def store_form(name, rank, at, shape, dtype, made, smem, reduction=None):
    verb = "cp.reduce.async.bulk.tensor" if reduction else "cp.async.bulk.tensor"
    middle = f".{reduction}" if reduction else ""
    op = f"{verb}.{rank}d.global.shared::cta{middle}.tile.bulk_group"
    lines = [
        *fill_shared(1, smem, THREADS), "    fence.proxy.async.shared::cta;", "    bar.sync 0;", "    mov.u32 %sm, smem;",
        *map_address(), *by_leader([f"    {op} {at}, [%sm];", "    cp.async.bulk.commit_group;",
                                    "    cp.async.bulk.wait_group 0;"]),
    ]  # fmt: skip
    group = "tensor_reduce" if reduction else "tensor_store"
    return tensor_form(name, lines, shape, dtype, made, smem, (0,), group)


def tensor_reductions():
    cases = [(op, torch.int32) for op in ("add", "min", "max", "and", "or", "xor", "inc", "dec")]
    cases += [("add", torch.float32)]
    cases += [
        (op, dtype) for op in ("add", "min", "max") for dtype in (torch.bfloat16, torch.float16)
    ]
    for op, dtype in cases:
        size = torch.empty(0, dtype=dtype).element_size()
        shape, box = (20, 128 // size), (64 // size, 16)
        made = (Map(0, shape, dtype, box, 64),)
        name = f"tensor reduce {op} {str(dtype).split('.')[1]}"
        yield store_form(name, 2, "[%map, {8, 10}]", shape, dtype, made, 2048, op)


def im2col_forms():
    """3x3 convolutions: padding, stride, dilation; tiles that start anywhere and cross images."""
    cases = (
        # corners lower, upper; element strides; taps; first pixels (w, h, n) already shifted by lower
        ((-1, -1), (-1, -1), None, ((0, 0), (2, 1), (1, 2)), ((-1, -1, 0), (4, 3, 0), (9, 6, 1))),
        ((0, 0), (-2, -2), None, ((0, 0), (2, 2)), ((0, 0, 0), (5, 6, 1))),
        ((-1, -1), (-1, -1), (1, 2, 2, 1), ((0, 0), (2, 1)), ((-1, -1, 0), (3, 5, 1))),
        ((-2, -2), (-2, -2), None, ((0, 0), (4, 2)), ((-2, -2, 0), (1, 0, 1))),
        ((-1, -1), (-1, -1), (1, 2, 2, 1), ((1, 1),), ((0, -1, 0), (1, 2, 0))),
    )
    shape = (2, 9, 12, 64)  # N, H, W, C
    for case, (lower, upper, steps, taps, starts) in enumerate(cases):
        for channels, pixels, swizzle in ((64, 32, 128), (32, 40, 64), (8, 24, 0)):
            made = (Map(0, shape, torch.bfloat16, swizzle=swizzle, element_strides=steps,
                        im2col=(lower, upper, channels, pixels)),)  # fmt: skip
            for s, r in taps:
                for w, h, n in starts:
                    name = f"im2col case {case} channels {channels} tap {s}{r} at {w} {h} {n}"
                    yield im2col_form(
                        name,
                        (0 if channels == 64 else 16, w, h, n),
                        (s, r),
                        shape,
                        made,
                        channels * pixels * 2,
                    )


def im2col_form(name, at, taps, shape, made, nbytes):
    op = "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
    smem = -(-nbytes // 512) * 512
    lines = [
        "    .reg .b16 %tap<2>;", *blank_shared(smem), *init_barrier(), *map_address(),
        f"    mov.u16 %tap0, {taps[0]};", f"    mov.u16 %tap1, {taps[1]};",
        *by_leader([f"    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {nbytes};",
                    f"    {op} [%sm], [%map, {coordinate_text(at)}], [%bar], {{%tap0, %tap1}};"]),
        *wait_barrier(), *dump_shared(1, smem, THREADS),
    ]  # fmt: skip
    return tensor_form(name, lines, shape, torch.bfloat16, made, smem, (1,), "im2col")


def cp_async_forms():
    """Each thread copies 16 bytes in pieces; then waits by groups or by an mbarrier."""
    variants = [
        ("cp.async.ca.shared.global 4", [f"[%s+{4 * i}], [%g+{4 * i}], 4" for i in range(4)], "ca"),
        ("cp.async.ca.shared.global 8", ["[%s], [%g], 8", "[%s+8], [%g+8], 8"], "ca"),
        ("cp.async.ca.shared.global 16", ["[%s], [%g], 16"], "ca"),
        ("cp.async.cg.shared.global 16", ["[%s], [%g], 16"], "cg"),
        ("cp.async.cg.shared.global.L2::128B 16", ["[%s], [%g], 16"], "cg"),
        ("cp.async.cg source size", ["[%s], [%g], 16, %t1"], "cg"),
        ("cp.async.ca source size", ["[%s], [%g], 8, %t2", "[%s+8], [%g+8], 8, %t2"], "ca"),
    ]
    for name, pieces, cache in variants:
        hint = ".L2::128B" if "L2" in name else ""
        copies = [f"    cp.async.{cache}.shared.global{hint} {p};" for p in pieces]
        for wait in ("wait_all", "wait_group 0", "noinc"):
            yield cp_async_form(f"{name} {wait}", copies, wait)


def cp_async_form(name, copies, wait):
    ends = {
        "wait_all": ["    cp.async.wait_all;"],
        "wait_group 0": ["    cp.async.commit_group;", "    cp.async.commit_group;", "    cp.async.wait_group 0;"],
        "noinc": ["    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%bar];", *wait_barrier()],
    }  # fmt: skip
    lines = [
        *blank_shared(2048), *(init_barrier(THREADS) if wait == "noinc" else []), "    ld.param.u64 %g, [p_0];",
        "    mul.wide.u32 %w, %tx, 16;", "    add.u64 %g, %g, %w;", "    mad.lo.u32 %s, %tx, 16, %sm;",
        "    rem.u32 %t1, %tx, 17;", "    rem.u32 %t2, %tx, 9;", *copies, *ends[wait], "    bar.sync 0;",
        *dump_shared(1, 2048, THREADS),
    ]  # fmt: skip
    return bulk_form(name, lines, 2048, (1,), "cp_async")


def bulk_form(name, lines, nbytes, outputs, group, target="sm_90", kind="s8", **options):
    def arguments():
        rng = np.random.default_rng(seed_of(name))
        count = nbytes // elements(kind, rng, 1).itemsize
        return [
            elements(kind, rng, count).view(np.uint8),
            elements(kind, rng, count).view(np.uint8),
        ]

    options = {"block": (THREADS, 1, 1), "smem_bytes": SMEM_BYTES, **options}
    cluster = options.pop("cluster", 0)
    return Form(
        name, entry(0, 2, lines, cluster), arguments, outputs, group=group, target=target, **options
    )


def bulk_forms():
    into = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    for nbytes in (16, 1008, 2048):
        lines = [
            *blank_shared(2048), *init_barrier(), "    ld.param.u64 %g, [p_0];",
            *by_leader([f"    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {nbytes};",
                        f"    {into} [%sm], [%g], {nbytes}, [%bar];"]),
            *wait_barrier(), *dump_shared(1, 2048, THREADS),
        ]  # fmt: skip
        yield bulk_form(f"cp.async.bulk to shared {nbytes}", lines, 2048, (1,), "bulk")
        lines = [
            *fill_shared(0, 2048, THREADS), "    fence.proxy.async.shared::cta;", "    bar.sync 0;", "    mov.u32 %sm, smem;",
            "    ld.param.u64 %g, [p_1];",
            *by_leader([f"    cp.async.bulk.global.shared::cta.bulk_group [%g], [%sm], {nbytes};",
                        "    cp.async.bulk.commit_group;", "    cp.async.bulk.wait_group.read 0;", "    cp.async.bulk.wait_group 0;"]),
        ]  # fmt: skip
        yield bulk_form(f"cp.async.bulk to global {nbytes}", lines, 2048, (1,), "bulk")
    reductions = [
        (op, kind, "s8") for op in ("add", "min", "max") for kind in ("u32", "s32", "u64")
    ]
    reductions += [("add", "f32", "f32"), ("add", "f16", "f16"), ("add.noftz", "f16", "f16"), ("add.noftz", "bf16", "bf16"),
                   ("min", "bf16", "bf16"), ("max", "f16", "f16"), ("and", "b32", "s8"), ("xor", "b64", "s8"),
                   ("inc", "u32", "s8"), ("dec", "u32", "s8")]  # fmt: skip
    for op, kind, fill in reductions:
        if (op, kind) == ("add", "f16"):
            continue
        lines = [
            *fill_shared(0, 1024, THREADS), "    fence.proxy.async.shared::cta;", "    bar.sync 0;", "    mov.u32 %sm, smem;",
            "    ld.param.u64 %g, [p_1];",
            *by_leader([f"    cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}.{kind} [%g], [%sm], 1024;",
                        "    cp.async.bulk.commit_group;", "    cp.async.bulk.wait_group 0;"]),
        ]  # fmt: skip
        yield bulk_form(f"cp.reduce.async.bulk {op}.{kind}", lines, 1024, (1,), "bulk", kind=fill)


def flag_to_output(lines):
    """Store %t3 of each thread to p_1."""
    return [
        *lines,
        "    ld.param.u64 %g, [p_1];",
        "    add.u64 %g, %g, %lane4;",
        "    st.global.u32 [%g], %t3;",
    ]


def mbarrier_forms():
    options = {"group": "mbarrier", "outputs": (1,), "nbytes": 1024}

    def probe(parity, bit):
        return [f"    mbarrier.test_wait.parity.shared::cta.b64 %done, [%bar], {parity};", f"    selp.b32 %t2, {bit}, 0, %done;",
                "    or.b32 %t3, %t3, %t2;", "    bar.sync 0;"]  # fmt: skip

    start = [*init_barrier(THREADS), "    mov.b32 %t3, 0;", "    .reg .b64 %state;"]
    yield bulk_form("mbarrier phases", flag_to_output([
        *start, *probe(0, 1), *probe(1, 2), "    mbarrier.arrive.shared::cta.b64 _, [%bar];", *wait_barrier(0, "W0"),
        "    bar.sync 0;", *probe(0, 4), *probe(1, 8), "    mbarrier.arrive.shared::cta.b64 _, [%bar];", *wait_barrier(1, "W1"),
        "    bar.sync 0;", *probe(0, 16), *probe(1, 32)]), **options)  # fmt: skip
    yield bulk_form("mbarrier state and pending count", flag_to_output([
        *start, "    @!%leader bra COUNTED;", "    mbarrier.arrive.shared::cta.b64 %state, [%bar];",
        "    mbarrier.pending_count.b64 %t3, %state;", "    mbarrier.arrive.shared::cta.b64 %state, [%bar], 5;",
        "    mbarrier.pending_count.b64 %t2, %state;", "    mad.lo.u32 %t3, %t2, 1000, %t3;", "COUNTED:"]), **options)  # fmt: skip
    yield bulk_form("mbarrier arrive with state", flag_to_output([
        *start, "    mbarrier.arrive.shared::cta.b64 %state, [%bar];", "WS:",
        "    mbarrier.try_wait.shared::cta.b64 %done, [%bar], %state;", "    @!%done bra WS;", "    mov.b32 %t3, 1;"]),
        **options)  # fmt: skip
    yield bulk_form("mbarrier expect_tx and complete", flag_to_output([
        *init_barrier(1), "    mov.b32 %t3, 0;",
        *by_leader(["    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 64;", "    mbarrier.arrive.shared::cta.b64 _, [%bar];"]),
        "    bar.sync 0;", *probe(0, 1),
        *by_leader(["    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%bar], 64;"], "NOT_LEADER2"),
        "    bar.sync 0;", *probe(0, 2)]), **options)  # fmt: skip
    yield bulk_form("mbarrier inval and reuse", flag_to_output([
        *init_barrier(1), "    mov.b32 %t3, 0;",
        *by_leader(["    mbarrier.inval.shared::cta.b64 [%bar];", "    mbarrier.init.shared::cta.b64 [%bar], 2;",
                    "    mbarrier.arrive.noComplete.shared::cta.b64 %o, [%bar], 1;"]),
        "    bar.sync 0;", *probe(0, 1), *by_leader(["    mbarrier.arrive.shared::cta.b64 _, [%bar];"], "NOT_LEADER2"),
        "    bar.sync 0;", *probe(0, 2)]), **options)  # fmt: skip


def cluster_forms():
    """Clusters of four: 4 blocks x 128 threads."""
    wait = ["    barrier.cluster.arrive.release;", "    barrier.cluster.wait.acquire;"]
    rank = [
        "    mov.u32 %t0, %cluster_ctarank;",
        "    add.u32 %t1, %t0, 1;",
        "    and.b32 %t1, %t1, 3;",
    ]
    mine = ["    mad.lo.u32 %s, %tx, 4, %sm;", "    mad.lo.u32 %t2, %t0, 128, %tx;", "    mul.wide.u32 %w, %t2, 4;",
            "    ld.param.u64 %g, [p_0];", "    add.u64 %g, %g, %w;", "    ld.global.u32 %q0, [%g];"]  # fmt: skip
    out = ["    ld.param.u64 %g, [p_1];", "    add.u64 %g, %g, %w;", "    st.global.u32 [%g], %t3;"]
    common = {"outputs": (1,), "nbytes": 2048, "group": "cluster", "grid": (4, 1, 1), "cluster": 4}
    yield bulk_form("ld.shared::cluster of the next block", [
        *rank, *mine, "    st.shared.u32 [%s], %q0;", *wait, "    mapa.shared::cluster.u32 %remote, %s, %t1;",
        "    ld.shared::cluster.u32 %t3, [%remote];", *out, *wait], **common)  # fmt: skip
    yield bulk_form("st.shared::cluster to the next block", [
        *rank, *mine, *wait, "    mapa.shared::cluster.u32 %remote, %s, %t1;", "    st.shared::cluster.u32 [%remote], %q0;",
        *wait, "    ld.shared.u32 %t3, [%s];", *out], **common)  # fmt: skip
    pair = ["    mul.wide.u32 %w, %t2, 8;", "    ld.param.u64 %g, [p_0];", "    add.u64 %g, %g, %w;",
            "    ld.global.v2.f32 {%v0, %v1}, [%g];", "    mad.lo.u32 %s, %tx, 8, %sm;"]  # fmt: skip
    out2 = [
        "    ld.param.u64 %g, [p_1];",
        "    add.u64 %g, %g, %w;",
        "    st.global.v2.f32 [%g], {%v0, %v1};",
    ]
    relaxed = [
        "    barrier.cluster.arrive.relaxed.aligned;",
        "    barrier.cluster.wait.acquire.aligned;",
    ]
    plain = ["    barrier.cluster.arrive;", "    barrier.cluster.wait;"]
    wide = {**common, "nbytes": 4096, "kind": "f32"}
    yield bulk_form("ld.shared::cluster.v2.f32", [
        "    .reg .f32 %v<2>;", *rank, *mine, *pair, "    st.shared.v2.f32 [%s], {%v0, %v1};", *plain,
        "    mapa.shared::cluster.u32 %remote, %s, %t1;", "    ld.shared::cluster.v2.f32 {%v0, %v1}, [%remote];",
        *out2, "    barrier.cluster.arrive.relaxed;", "    barrier.cluster.wait;"], **wide)  # fmt: skip
    yield bulk_form("st.shared::cluster.v2.f32", [
        "    .reg .f32 %v<2>;", *rank, *mine, *pair, *relaxed, "    mapa.shared::cluster.u32 %remote, %s, %t1;",
        "    st.shared::cluster.v2.f32 [%remote], {%v0, %v1};", *plain, "    ld.shared.v2.f32 {%v0, %v1}, [%s];",
        *out2], **wide)  # fmt: skip
    yield bulk_form("mbarrier.arrive.shared::cluster", [
        *rank, *mine, *init_barrier(128), *wait, "    mapa.shared::cluster.u32 %remote, %bar, %t1;",
        "    mbarrier.arrive.shared::cluster.b64 _, [%remote];", *wait_barrier(),
        "    mov.b32 %t3, %q0;", *out, *wait], **common)  # fmt: skip
    yield bulk_form("atom.shared::cluster at block 0", [
        *rank, *mine, "    st.shared.u32 [%s], 0;", *wait, "    mapa.shared::cluster.u32 %remote, %s, 0;",
        "    atom.shared::cluster.add.u32 %t3, [%remote], %q0;", *wait, "    ld.shared.u32 %t3, [%s];", *out],
        **common)  # fmt: skip
    yield bulk_form("mapa.u64 generic", [
        *rank, *mine, "    st.shared.u32 [%s], %q0;", *wait, "    cvt.u64.u32 %o, %s;", "    cvta.shared.u64 %o, %o;",
        "    mapa.u64 %o, %o, %t1;", "    ld.u32 %t3, [%o];", *out, *wait], **common)  # fmt: skip
    yield bulk_form("remote mbarrier arrive", [
        *rank, *mine, *init_barrier(128), *wait, "    mapa.shared::cluster.u32 %remote, %bar, %t1;",
        "    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%remote];", *wait_barrier(),
        "    mov.b32 %t3, %t2;", *out, *wait], **common)  # fmt: skip
    yield bulk_form("cp.async.bulk between blocks", [
        *rank, *mine, "    st.shared.u32 [%s], %q0;", *init_barrier(1), "    fence.proxy.async.shared::cta;", *wait,
        *by_leader(["    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;", "    mapa.shared::cluster.u32 %remote, %bar, %t1;",
                    "    add.u32 %src, %sm, 512;", "    mapa.shared::cluster.u32 %dst, %src, %t1;",
                    "    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%dst], [%sm], 512, [%remote];"]),
        *wait_barrier(), "    ld.shared.u32 %t3, [%s+512];", *out, *wait], **common)  # fmt: skip
    yield bulk_form("st.async to the next block", [
        *rank, *mine, *init_barrier(1), *by_leader(["    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;"]),
        *wait, "    mapa.shared::cluster.u32 %remote, %bar, %t1;", "    mapa.shared::cluster.u32 %dst, %s, %t1;",
        "    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%dst], %q0, [%remote];", *wait_barrier(),
        "    ld.shared.u32 %t3, [%s];", *out, *wait], version="8.1", **common)  # fmt: skip
    fields = (
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%cluster_ctaid.x",
        "%cluster_nctaid.x",
        "%clusterid.x",
        "%nclusterid.x",
    )
    pack = [
        line
        for f in fields
        for line in (f"    mov.u32 %q1, {f};", "    mad.lo.u32 %t3, %t3, 10, %q1;")
    ]
    yield bulk_form("cluster special registers", [
        "    mov.u32 %t0, %ctaid.x;", *mine, "    mov.b32 %t3, 0;", *pack, *out], **{**common, "grid": (8, 1, 1), "nbytes": 4096})  # fmt: skip
    yield multicast_form(rank, wait)


def multicast_form(rank, wait):
    """Block r loads rows 8r..8r+7 of a 32 x 64 tile into every block of the cluster."""
    op = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
    lines = [
        "    .reg .b16 %mask;", *blank_shared(4096), *init_barrier(), *rank, *map_address(), "    mov.u16 %mask, 15;",
        "    shl.b32 %t2, %t0, 3;", "    mad.lo.u32 %dst, %t0, 1024, %sm;", *by_leader([
            "    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 4096;"]), *wait,
        *by_leader([f"    {op} [%dst], [%map, {{%q3, %t2}}], [%bar], %mask;"], "NOT_LEADER2"), *wait_barrier(),
        *dump_shared(1, 4096, THREADS), *wait,
    ]  # fmt: skip
    body = entry(1, 2, ["    mov.b32 %q3, 0;", *lines], 4)
    # Each block dumps its copy to its own 4096 bytes.
    body = body.replace("    ld.param.u64 %g, [p_1];", "    ld.param.u64 %g, [p_1];\n    mov.u32 %t3, %ctaid.x;\n"
                        "    mul.wide.u32 %w, %t3, 4096;\n    add.u64 %g, %g, %w;")  # fmt: skip

    def arguments():
        return [tensor((32, 64), torch.bfloat16, 5), np.zeros(4 * 4096, np.uint8)]

    return Form("tensor load multicast", body, arguments, (1,), grid=(4, 1, 1), block=(THREADS, 1, 1), smem_bytes=SMEM_BYTES,
                maps=(Map(0, (32, 64), torch.bfloat16, (64, 8), 128),), group="cluster", target="sm_90a")  # fmt: skip


def forms():
    """Every asynchronous form."""
    yield from cp_async_forms()
    yield from mbarrier_forms()
    yield from bulk_forms()
    yield from tiled_forms()
    yield from tensor_reductions()
    yield from im2col_forms()
    yield from cluster_forms()
