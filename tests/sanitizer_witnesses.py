"""Small kernels that show what compute-sanitizer sees: one planted race, and orders that are right
by PTX's memory model. sanitize.py prints which of them each tool flags.

A block of 96 threads: lane i of warp 1 writes 100 + i to shared memory, lane i of warp 0 reads what
lane 31 - i wrote, and out[i] = 131 - i. They differ in what lies between the two.
"""

import functools

import torch
from torch import Tensor

from mirage_hello.ptx import loader

KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry {name}(.param .u64 p_out)
.reqntid 96, 1, 1
{{
    .reg .pred %is_writer, %is_reader, %is_leader, %done;
    .reg .b32  %thread, %lane, %warp, %cell, %bar, %value, %count;
    .reg .b64  %out, %offset;
    .shared .align 16 .b8 cells[128];
    .shared .align 16 .b8 bars[16];
    mov.u32     %thread, %tid.x;
    and.b32     %lane, %thread, 31;
    shr.u32     %warp, %thread, 5;
    mov.u32     %bar, bars;
    mov.u32     %cell, cells;
    setp.eq.u32 %is_writer, %warp, 1;
    setp.eq.u32 %is_reader, %warp, 0;
    setp.ne.u32 %is_leader, %thread, 0;
    @%is_leader bra MADE;
    mbarrier.init.shared::cta.b64 [%bar], {count};
    mbarrier.init.shared::cta.b64 [%bar+8], 1;
    fence.mbarrier_init.release.cluster;
    {after_init}
MADE:
    barrier.sync 0, 96;
    setp.eq.u32 %is_leader, %lane, 0;
    @!%is_writer bra WRITTEN;
    mad.lo.u32  %cell, %lane, 4, %cell;
    add.u32     %value, %lane, 100;
    st.shared.b32 [%cell], %value;
    {after_write}
    bra         DONE;
WRITTEN:
    @!%is_reader bra DONE;
    {before_read}
    xor.b32     %value, %lane, 31;
    mad.lo.u32  %cell, %value, 4, %cell;
    ld.shared.b32 %value, [%cell];
    ld.param.u64 %out, [p_out];
    cvta.to.global.u64 %out, %out;
    mul.wide.u32 %offset, %lane, 4;
    add.u64     %out, %out, %offset;
    st.global.b32 [%out], %value;
DONE:
    ret;
}}
"""
WAIT = """
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0;
    @!%done bra WAIT;"""
LEADER = "bar.warp.sync 0xFFFFFFFF;\n    @%is_leader mbarrier.arrive.shared::cta.b64 _, [%bar];"
VOTE = "barrier.red.popc.u32 %count, 1, 64, %is_leader;"
PARTS = {
    # nothing but time: a race
    "planted_race": {"before_read": "nanosleep.u32 100000;"},
    "counted_barrier": {"after_write": "barrier.sync 1, 64;", "before_read": "barrier.sync 1, 64;"},
    # a named barrier of two warps of three that also counts a predicate
    "counted_vote": {"after_write": VOTE, "before_read": VOTE},
    "every_lane_arrives": {
        "count": 32,
        "after_write": "mbarrier.arrive.shared::cta.b64 _, [%bar];",
        "before_read": WAIT,
    },
    # the lanes in order by bar.warp.sync, then one of them arrives for all
    "one_lane_arrives": {"after_write": LEADER, "before_read": WAIT},
    # init and expect_tx by the same thread
    "init_then_expect": {
        "after_init": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar+8], 0;",
        "after_write": "barrier.sync 1, 64;",
        "before_read": "barrier.sync 1, 64;",
    },
}
NOTHING = {"count": 1, "after_init": "", "after_write": "", "before_read": ""}


@functools.cache
def program(name: str) -> loader.Program:
    return loader.Program(name, KERNEL.format(name=name, **(NOTHING | PARTS[name])))


def run(name: str, out: Tensor) -> Tensor:
    out = torch.empty_like(out)
    program(name).launch(name, (1, 1, 1), (96, 1, 1), (out,))
    return out
