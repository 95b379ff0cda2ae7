"""What one multiprocessor gives mma.sync, ex2 and ldmatrix, alone and together, on a GPU.

    python bench/sweeps/mma_rates.py OUT.json

Every warp runs the same loop: 16 of mma.m16n8k16 on independent accumulators, with exponentials,
fused multiply-adds and ldmatrix strewn between them. The clock register says how long one round
took. These are the ceilings of kernels/cuda/attention.cu and ptx/attention.sm80.ptx.j2.
"""

import json
import sys
from itertools import product

import torch

from mirage_hello.ptx import loader

ROUNDS = 512
# products, exponentials, fused multiply-adds, ldmatrix.x4 of one round
MIXES = [
    (16, 0, 0, 0),
    (0, 16, 0, 0),
    (16, 8, 0, 0),
    (16, 16, 0, 0),
    (16, 8, 24, 4),
    (16, 8, 24, 8),
    (16, 0, 0, 4),
    (16, 0, 0, 8),
    (16, 0, 0, 16),
    (16, 0, 24, 0),
    (16, 0, 48, 0),
]
WARPS_PER_SCHEDULER = (1, 2, 3, 4)


def text(products: int, exponentials: int, fmas: int, loads: int) -> str:
    """PTX of the loop; what it computes is stored, so that nothing is left out."""
    kinds = {
        "mma": (products, mma),
        "ex2": (exponentials, lambda i: f"ex2.approx.ftz.f32 %e{i % 8}, %e{i % 8};"),
        "fma": (fmas, lambda i: f"fma.rn.f32 %f{i % 8}, %f{i % 8}, %e8, %e8;"),
        "ldmatrix": (loads, ldmatrix),
    }
    places = sorted(
        ((i + 0.5) / count, name, i) for name, (count, _) in kinds.items() for i in range(count)
    )
    body = "\n".join("    " + kinds[name][1](i) for _, name, i in places)
    values = [f"%c{i}" for i in range(32)] + [f"%{x}{i}" for x in "ef" for i in range(8)]
    start = "\n".join(f"    add.f32 %e8, %e8, %e8; mov.f32 {x}, %e8;" for x in values)
    gather = "\n".join(f"    add.f32 %e8, %e8, {x};" for x in values)
    gather += "".join(f"\n    cvt.rn.f32.u32 %e0, %b{i}; add.f32 %e8, %e8, %e0;" for i in range(64))
    return f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry rate(.param .u64 p_cycles, .param .u64 p_sink)
{{
    .reg .pred %is;
    .reg .b32 %a<4>, %b<64>, %t<4>, %address, %round;
    .reg .f32 %c<32>, %e<9>, %f<8>;
    .reg .b64 %p, %begin, %end;
    .shared .align 128 .b8 tile[16384];
    mov.u32 %t0, %tid.x;
    and.b32 %t1, %t0, 31;
    mov.u32 %address, tile;
    mad.lo.u32 %address, %t1, 16, %address;
    mov.b32 %a0, %t0; mov.b32 %a1, %t1; mov.b32 %a2, %t0; mov.b32 %a3, %t1;
{chr(10).join(f"    add.u32 %b{i}, %t0, {i};" for i in range(64))}
    cvt.rn.f32.u32 %e8, %t0;
{start}
    mov.u32 %round, {ROUNDS};
    bar.sync 0;
    mov.u64 %begin, %clock64;
LOOP:
{body}
    xor.b32 %address, %address, 8192;
    sub.u32 %round, %round, 1;
    setp.ne.u32 %is, %round, 0;
    @%is bra LOOP;
    mov.u64 %end, %clock64;
    sub.u64 %end, %end, %begin;
{gather}
    ld.param.u64 %p, [p_sink];
    mul.wide.u32 %begin, %t0, 4;
    add.u64 %p, %p, %begin;
    st.global.f32 [%p], %e8;
    setp.ne.u32 %is, %t0, 0;
    @%is bra DONE;
    ld.param.u64 %p, [p_cycles];
    mov.u32 %t2, %ctaid.x;
    mul.wide.u32 %begin, %t2, 8;
    add.u64 %p, %p, %begin;
    st.global.u64 [%p], %end;
DONE:
    ret;
}}
"""


def mma(i: int) -> str:
    c = ", ".join(f"%c{i % 8 * 4 + e}" for e in range(4))
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{c}}}, "
        f"{{%a0, %a1, %a2, %a3}}, {{%b{4 * i}, %b{4 * i + 1}}}, {{{c}}};"
    )


def ldmatrix(i: int) -> str:
    b = ", ".join(f"%b{4 * i + e}" for e in range(4))
    return f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{b}}}, [%address+{512 * (i % 16)}];"


def cycles(mix: tuple[int, int, int, int], warps_per_scheduler: int) -> float:
    """Clocks of a round, with that many warps on each of a multiprocessor's four schedulers."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    taken = torch.zeros(count, dtype=torch.int64, device="cuda")
    sink = torch.zeros(1024, device="cuda")
    rate = loader.Program("mma_rates", text(*mix))
    for _ in range(3):
        rate.launch("rate", (count,), (128 * warps_per_scheduler,), (taken, sink))
    return taken.double().median().item() / ROUNDS


def main() -> int:
    rows = []
    print(
        "mma ex2 fma ldm | clocks of a round with 1, 2, 3, 4 warps a scheduler, each warp's share"
    )
    for mix, warps in product(MIXES, WARPS_PER_SCHEDULER):
        clocks = cycles(mix, warps)
        rows.append({"mix": mix, "warps_per_scheduler": warps, "clocks": clocks})
        start = "" if warps > 1 else "\n{:3} {:3} {:3} {:3} |".format(*mix)
        print(f"{start} {clocks / warps:7.1f}", end="", flush=True)
    print()
    with open(sys.argv[1], "w") as f:
        json.dump(rows, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
