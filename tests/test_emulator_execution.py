"""How threads run: divergence, calls, scopes, spaces, atomics, barriers, blocks and clusters."""

import numpy as np
import pytest
import torch

from mirage_hello.ptx.emulator import EmulatorError, launch, parse

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"

# Entry with an output pointer and, per thread, %i = global thread index and %out = &out[%i].
PROLOGUE = """
    .reg .b32 %i, %n, %tx, %bx; .reg .b64 %out, %w;
    ld.param.u64 %out, [p_out];
    mov.u32 %tx, %tid.x; mov.u32 %bx, %ctaid.x; mov.u32 %n, %ntid.x;
    mad.lo.u32 %i, %bx, %n, %tx;
    mul.wide.u32 %w, %i, 4;
    add.u64 %out, %out, %w;
"""


def run(body, grid=1, block=64, args=(), before="", parameters="", smem=0, out=None, **options):
    """Run `body` with out = one int32 per thread (or `out`); returns (out, report)."""
    entry = f".visible .entry k(.param .u64 p_out{parameters})"
    text = f"{HEAD}{before}{entry} {{\n{PROLOGUE}{body}\nret;\n}}\n"
    out = np.full(np.prod(grid) * block, -1, np.int32) if out is None else out
    report = launch(parse(text), "k", grid, block, [out, *args], smem, **options)
    return out, report


def test_loop_with_a_different_length_per_thread():
    body = """
    .reg .b32 %v, %steps, %t, %odd; .reg .pred %p;
    add.u32 %v, %i, 1; mov.u32 %steps, 0;
    LOOP: setp.eq.u32 %p, %v, 1; @%p bra DONE;
    and.b32 %odd, %v, 1; setp.eq.u32 %p, %odd, 0; @%p bra EVEN;
    mad.lo.u32 %v, %v, 3, 1; bra NEXT;
    EVEN: shr.u32 %v, %v, 1;
    NEXT: add.u32 %steps, %steps, 1; bra LOOP;
    DONE: st.global.u32 [%out], %steps;
    """

    def collatz(v):
        steps = 0
        while v != 1:
            v, steps = (3 * v + 1 if v % 2 else v // 2), steps + 1
        return steps

    out, report = run(body, grid=2, block=48)
    assert out.tolist() == [collatz(i + 1) for i in range(96)]
    assert report.counts.totals()["divergent_branches"] > 0


def test_warps_reconverge_after_a_branch():
    body = """
    .reg .b32 %v, %lane; .reg .pred %p;
    and.b32 %lane, %tx, 31; setp.lt.u32 %p, %lane, 7; @%p bra LOW;
    mov.u32 %v, 1; bra JOIN;
    LOW: mov.u32 %v, 100;
    JOIN: vote.sync.ballot.b32 %v, %p, 0xFFFFFFFF;
    st.global.u32 [%out], %v;
    """
    out, _ = run(body)
    assert (out == 0x7F).all()


def test_membermask_of_the_lanes_in_a_branch():
    body = """
    .reg .b32 %v, %lane, %m; .reg .pred %p;
    and.b32 %lane, %tx, 31; mov.u32 %v, %lane; setp.ge.u32 %p, %lane, 16; @%p bra HIGH;
    shfl.sync.bfly.b32 %v, %v, 1, 31, 0xFFFF; bar.warp.sync 0xFFFF; bra JOIN;
    HIGH: shfl.sync.idx.b32 %v, %v, 20, 31, 0xFFFF0000;
    JOIN: st.global.u32 [%out], %v;
    """
    out, _ = run(body, block=32)
    assert out.tolist() == [i ^ 1 for i in range(16)] + [20] * 16


def test_special_registers_of_blocks_in_three_dimensions():
    text = (
        HEAD
        + """.visible .entry k(.param .u64 p_out) {
    .reg .b32 %v, %t, %i; .reg .b64 %out, %w;
    ld.param.u64 %out, [p_out];
    mov.u32 %i, %ctaid.z; mov.u32 %t, %nctaid.y; mul.lo.u32 %i, %i, %t;
    mov.u32 %t, %ctaid.y; add.u32 %i, %i, %t; mov.u32 %t, %nctaid.x; mul.lo.u32 %i, %i, %t;
    mov.u32 %t, %ctaid.x; add.u32 %i, %i, %t;
    mov.u32 %t, %ntid.z; mul.lo.u32 %i, %i, %t; mov.u32 %t, %tid.z; add.u32 %i, %i, %t;
    mov.u32 %t, %ntid.y; mul.lo.u32 %i, %i, %t; mov.u32 %t, %tid.y; add.u32 %i, %i, %t;
    mov.u32 %t, %ntid.x; mul.lo.u32 %i, %i, %t; mov.u32 %t, %tid.x; add.u32 %i, %i, %t;
    mul.wide.u32 %w, %i, 4; add.u64 %out, %out, %w; st.global.u32 [%out], %i; ret; }"""
    )
    out = np.full(2 * 3 * 2 * 5 * 2 * 3, -1, np.int32)
    launch(parse(text), "k", (2, 3, 2), (5, 2, 3), [out])
    assert out.tolist() == list(range(len(out)))


def test_functions_with_register_and_memory_parameters():
    before = """
    .func (.reg .b32 %r) square(.reg .b32 %x) { mul.lo.u32 %r, %x, %x; ret; }
    .func (.param .b32 r) quad_or_one(.param .b32 x) {
        .reg .b32 %x, %y; .reg .pred %p;
        ld.param.b32 %x, [x]; setp.gt.u32 %p, %x, 3; @%p bra BIG;
        st.param.b32 [r], 1; ret;
        BIG: call (%y), square, (%x); call (%y), square, (%y); st.param.b32 [r], %y; ret; }
    """
    body = """
    .reg .b32 %a, %b; .param .b32 p0; .param .b32 r0;
    call (%a), square, (%i);
    st.param.b32 [p0], %i; call (r0), quad_or_one, (p0); ld.param.b32 %b, [r0];
    add.u32 %a, %a, %b; st.global.u32 [%out], %a;
    """
    out, _ = run(body, block=32, before=before)
    assert out.tolist() == [i * i + (i**4 if i > 3 else 1) for i in range(32)]


def test_recursion_is_refused():
    before = ".func f(.reg .b32 %x) { call f, (%x); ret; }\n"
    with pytest.raises(ValueError, match="f is recursive"):
        run("call f, (%i);", before=before)


def test_constant_global_and_local_memory():
    before = ".const .b32 table[4] = {10, 20, 30, 40};\n.global .b32 bias = 7;\n"
    body = """
    .local .align 4 .b32 stack[4]; .reg .b32 %v, %k, %at; .reg .b64 %a;
    and.b32 %k, %i, 3; mov.u64 %a, table; mul.wide.u32 %w, %k, 4; add.u64 %a, %a, %w;
    ld.const.b32 %v, [%a]; mov.b32 %at, stack; mad.lo.u32 %at, %k, 4, %at;
    st.local.b32 [%at], %v; ld.local.b32 %v, [%at]; ld.global.b32 %k, [bias];
    add.u32 %v, %v, %k; st.global.u32 [%out], %v;
    """
    out, _ = run(body, before=before)
    assert out.tolist() == [10 * (i % 4 + 1) + 7 for i in range(64)]


def test_generic_addresses():
    body = """
    .shared .b32 tile[64]; .reg .b64 %g, %s; .reg .b32 %v, %a; .reg .pred %p;
    mov.b32 %a, tile; mad.lo.u32 %a, %tx, 4, %a; cvt.u64.u32 %s, %a; cvta.shared.u64 %g, %s;
    st.b32 [%g], %i; isspacep.shared %p, %g; ld.b32 %v, [%g]; @!%p mov.b32 %v, 0;
    st.b32 [%out], %v;
    """
    out, _ = run(body)
    assert out.tolist() == list(range(64))


def test_atomics_in_thread_order():
    body = """
    .reg .b64 %c; .reg .b32 %v; ld.param.u64 %c, [p_c];
    atom.global.add.u32 %v, [%c], 3; st.global.u32 [%out], %v;
    red.global.max.s32 [%c+4], %i; atom.global.cas.b32 %v, [%c+8], 0, %i;
    """
    counters = np.array([5, -9, 0], np.int32)
    out, _ = run(body, grid=2, args=[counters], parameters=", .param .u64 p_c")
    assert sorted(out.tolist()) == [5 + 3 * i for i in range(128)]
    assert counters.tolist() == [5 + 3 * 128, 127, 1]


def test_shared_histogram_by_atomics_is_no_race():
    body = """
    .shared .b32 bins[8]; .reg .b32 %a, %k, %v; .reg .pred %p;
    mov.b32 %a, bins; and.b32 %k, %tx, 7; setp.lt.u32 %p, %tx, 8; mad.lo.u32 %a, %k, 4, %a;
    @%p st.shared.b32 [%a], 0;
    bar.sync 0;
    red.shared.add.u32 [%a], 1;
    bar.sync 0;
    ld.shared.b32 %v, [%a]; st.global.u32 [%out], %v;
    """
    out, _ = run(body, block=256)
    assert (out == 32).all()


def test_a_block_that_waits_for_another_block():
    """Block 1 stands at a lower address and spins: it must not starve block 0."""
    body = """
    .reg .b64 %f; .reg .b32 %v; .reg .pred %p; ld.param.u64 %f, [p_f];
    setp.eq.u32 %p, %bx, 0; @%p bra FIRST;
    SPIN: ld.acquire.gpu.global.b32 %v, [%f]; setp.eq.u32 %p, %v, 0; @%p bra SPIN;
    bra DONE;
    FIRST: mov.b32 %v, 77; st.release.gpu.global.b32 [%f], %v;
    DONE: st.global.u32 [%out], %v;
    """
    flag = np.zeros(1, np.int32)
    out, _ = run(body, grid=2, block=32, args=[flag], parameters=", .param .u64 p_f")
    assert (out == 77).all()


def test_named_barriers_between_two_warps():
    body = """
    .shared .b32 box[32]; .reg .b32 %a, %lane, %v; .reg .pred %p;
    mov.b32 %a, box; and.b32 %lane, %tx, 31; mad.lo.u32 %a, %lane, 4, %a;
    setp.ge.u32 %p, %tx, 32; @%p bra CONSUMER;
    mul.lo.u32 %v, %lane, %lane; st.shared.b32 [%a], %v; barrier.arrive 1, 64; bra DONE;
    CONSUMER: barrier.sync 1, 64; ld.shared.b32 %v, [%a];
    DONE: st.global.u32 [%out], %v;
    """
    out, _ = run(body)
    assert out.tolist() == [i * i for i in range(32)] * 2


def test_a_warp_with_exited_threads_counts_as_a_warp():
    body = """
    .reg .pred %p, %q; .reg .b32 %v;
    setp.eq.u32 %p, %tx, 0; setp.ge.u32 %q, %tx, 32;
    @%p bra MEET; @%q bra MEET; st.global.u32 [%out], 5; ret;
    MEET: barrier.red.popc.u32 %v, 1, 64, %p; st.global.u32 [%out], %v;
    """
    out, _ = run(body, grid=2)
    assert out.reshape(2, 64).tolist() == [[1] + [5] * 31 + [1] * 32] * 2


def test_barrier_reduction_counts_votes():
    body = """
    .reg .b32 %v, %k; .reg .pred %p, %all;
    and.b32 %k, %tx, 3; setp.eq.u32 %p, %k, 0;
    bar.red.popc.u32 %v, 0, %p; bar.red.and.pred %all, 0, %p;
    @%all mov.u32 %v, 0; st.global.u32 [%out], %v;
    """
    out, _ = run(body, grid=3, block=96)
    assert (out == 24).all()


def test_carry_chain():
    body = """
    .reg .b32 %lo, %hi; mov.b32 %lo, 0xFFFFFFFF;
    add.cc.u32 %lo, %lo, %i; addc.u32 %hi, 5, 0;
    sub.cc.u32 %lo, %lo, 1; subc.u32 %hi, %hi, 0; st.global.u32 [%out], %hi;
    """
    out, _ = run(body)
    assert out.tolist() == [5, 5] + [6] * 62


def test_strided_and_half_precision_arguments():
    """The kernel gets the view's first element and may walk the storage behind it."""
    body = """
    .reg .b64 %x; .reg .b16 %h; .reg .b32 %v; .reg .f32 %f;
    ld.param.u64 %x, [p_x]; mul.wide.u32 %w, %i, 12; add.u64 %x, %x, %w;
    ld.global.b16 %h, [%x]; cvt.f32.bf16 %f, %h; cvt.rni.s32.f32 %v, %f; st.global.u32 [%out], %v;
    """
    base = torch.arange(6 * 64).view(64, 6).bfloat16()
    out, _ = run(body, args=[base[:, 2]], parameters=", .param .u64 p_x")
    assert out.tolist() == base[:, 2].int().tolist()


def test_scalar_arguments_and_null_pointers():
    body = """
    .reg .b64 %p; .reg .f32 %f; .reg .b32 %v; .reg .pred %is_null; .reg .b16 %h;
    ld.param.u64 %p, [p_ptr]; ld.param.f32 %f, [p_f]; ld.param.u16 %h, [p_h];
    cvt.rni.s32.f32 %v, %f; setp.eq.u64 %is_null, %p, 0; @%is_null add.s32 %v, %v, 1000;
    cvt.u32.u16 %n, %h; add.u32 %v, %v, %n; st.global.u32 [%out], %v;
    """
    parameters = ", .param .u64 p_ptr, .param .f32 p_f, .param .u16 p_h"
    out, _ = run(body, args=[None, 2.5, 7], parameters=parameters)
    assert (out == 1009).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], ValueError, "takes 1 arguments .*got 0"),
        ([1.5], TypeError, "p_out"),
        ([np.zeros(4), 3], ValueError, "got 2"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    module = parse(HEAD + ".visible .entry k(.param .u64 p_out) { ret; }")
    with pytest.raises(error, match=message):
        launch(module, "k", 1, 32, arguments)


@pytest.mark.parametrize(
    ("directive", "grid", "block", "message"),
    [
        (".reqntid 64", 1, 32, r"block \(32, 1, 1\) is not"),
        (".maxntid 16", 1, 32, "exceeds"),
        ("", 1, 2048, "1 to 1024 threads"),
        (".explicitcluster .reqnctapercluster 4,1,1", 6, 32, "no multiple of the cluster"),
        ("", 0, 32, "positive"),
    ],
)
def test_launches_the_hardware_would_refuse(directive, grid, block, message):
    module = parse(HEAD + f".visible .entry k() {directive} {{ ret; }}")
    with pytest.raises(ValueError, match=message):
        launch(module, "k", grid, block, [])
    with pytest.raises(ValueError, match="no kernel 'other'; its kernels are k"):
        launch(module, "other", 1, 32, [])


def test_many_blocks_run_in_batches_and_the_same_way_twice():
    body = ".reg .b32 %v; mad.lo.u32 %v, %i, 3, 1; st.global.u32 [%out], %v;"
    (first, a), (second, b) = (run(body, grid=700, block=64) for _ in range(2))
    assert first.tolist() == [3 * i + 1 for i in range(700 * 64)] == second.tolist()
    assert a.counts.as_dict() == b.counts.as_dict()


def test_endless_loop_is_reported():
    with pytest.raises(EmulatorError, match="still running after 500 scheduler turns"):
        run("LOOP: add.u32 %i, %i, 1; bra LOOP;", max_turns=500)


def test_mbarrier_wait_that_never_ends_names_who_waits():
    body = """
    .shared .align 8 .b64 bar; .reg .b32 %b; .reg .pred %p;
    mov.b32 %b, bar; setp.eq.u32 %p, %tx, 0; @%p mbarrier.init.shared::cta.b64 [%b], 2;
    bar.sync 0; @%p mbarrier.arrive.shared::cta.b64 _, [%b];
    W: mbarrier.try_wait.parity.shared::cta.b64 %p, [%b], 0; @!%p bra W;
    """
    with pytest.raises(
        EmulatorError, match=r"1 of 2 arrivals and 0 bytes .*; threads 0-63 of block"
    ):
        run(body)


def test_ring_of_two_stages_between_warps():
    """Producer and consumer warps at different program counters, mbarriers both ways."""
    body = """
    .shared .b32 ring[64]; .shared .align 8 .b64 bars[4];
    .reg .b32 %full, %empty, %s, %a, %k, %v, %sum, %stage, %phase, %lane; .reg .pred %p, %more;
    mov.b32 %full, bars; add.u32 %empty, %full, 16; and.b32 %lane, %tx, 31;
    setp.ne.u32 %p, %tx, 0; @%p bra READY;
    mbarrier.init.shared::cta.b64 [%full], 32; mbarrier.init.shared::cta.b64 [%full+8], 32;
    mbarrier.init.shared::cta.b64 [%empty], 32; mbarrier.init.shared::cta.b64 [%empty+8], 32;
    READY: bar.sync 0;
    mov.u32 %k, 0; mov.u32 %sum, 0; setp.ge.u32 %p, %tx, 32; @%p bra CONSUME;
    PRODUCE: and.b32 %stage, %k, 1; shr.u32 %phase, %k, 1; and.b32 %phase, %phase, 1;
    xor.b32 %phase, %phase, 1;
    mad.lo.u32 %s, %stage, 8, %empty;
    W0: mbarrier.try_wait.parity.shared::cta.b64 %p, [%s], %phase; @!%p bra W0;
    mov.b32 %a, ring; mad.lo.u32 %a, %stage, 128, %a; mad.lo.u32 %a, %lane, 4, %a;
    mul.lo.u32 %v, %k, %lane; st.shared.b32 [%a], %v;
    mad.lo.u32 %s, %stage, 8, %full; mbarrier.arrive.shared::cta.b64 _, [%s];
    add.u32 %k, %k, 1; setp.lt.u32 %more, %k, 9; @%more bra PRODUCE; bra DONE;
    CONSUME: and.b32 %stage, %k, 1; shr.u32 %phase, %k, 1; and.b32 %phase, %phase, 1;
    mad.lo.u32 %s, %stage, 8, %full;
    W1: mbarrier.try_wait.parity.shared::cta.b64 %p, [%s], %phase; @!%p bra W1;
    mov.b32 %a, ring; mad.lo.u32 %a, %stage, 128, %a; xor.b32 %v, %lane, 1;
    mad.lo.u32 %a, %v, 4, %a; mad.lo.u32 %s, %stage, 8, %empty;
    ld.shared.b32 %v, [%a]; add.u32 %sum, %sum, %v;
    mbarrier.arrive.shared::cta.b64 _, [%s];
    add.u32 %k, %k, 1; setp.lt.u32 %more, %k, 9; @%more bra CONSUME;
    DONE: st.global.u32 [%out], %sum;
    """
    out, _ = run(body, grid=2)
    assert out.tolist() == ([0] * 32 + [36 * (i ^ 1) for i in range(32)]) * 2
    read, release = "ld.shared.b32 %v, [%a];", "mbarrier.arrive.shared::cta.b64 _, [%s];"
    last = body.rindex(release)
    early = body[:last] + body[last + len(release) :]
    with pytest.raises(EmulatorError, match="shared-race"):
        run(early.replace(read, release + read), grid=2)
