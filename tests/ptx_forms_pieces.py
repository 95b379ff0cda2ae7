"""Pieces of PTX that several instruction forms share: filling, dumping, barriers, registers.

Every function returns lines of PTX.  Kernels keep their data at offset 0 of dynamic shared memory
and their mbarrier behind it: a static array could move the dynamic part off its alignment.
"""

import numpy as np
import torch
from ptx_forms import kernel, parameters

THREADS = 128
BARRIER = 8192
SMEM_BYTES = BARRIER + 64

REGISTERS = """
    .reg .b32 %tx, %sm, %s, %i, %q<4>, %t<4>;
    .reg .b64 %g, %w, %lane4;
    .reg .pred %more, %p<4>;"""

ENTRY = """
.visible .entry {entry}($params)
.reqntid 128, 1, 1
$cluster
{
    $registers
    .reg .b64 %map, %o;
    .reg .b32 %bar, %dst, %src, %remote;
    .reg .pred %leader, %done;
    mov.u32 %sm, smem;
    add.u32 %bar, %sm, $barrier;
    mov.u32 %tx, %tid.x;
    mul.wide.u32 %lane4, %tx, 4;
    setp.eq.u32 %leader, %tx, 0;
    $body
    ret;
}"""


def entry(maps, pointers, *body, cluster=0):
    """An entry with `maps` tensor-map parameters first, then `pointers` pointers."""
    listed = [f".param .align 64 .b8 p_map{i}[128]" for i in range(maps)]
    listed += [parameters(pointers)] if pointers else []
    return kernel(
        ENTRY,
        params=", ".join(listed),
        cluster=f".explicitcluster\n.reqnctapercluster {cluster}, 1, 1" if cluster else "",
        registers=REGISTERS,
        barrier=BARRIER,
        body="\n".join(body),
    )


# A loop that moves 16 bytes per thread and step.
COPY = """
    ld.param.u64 %g, [p_$parameter];
    mul.wide.u32 %w, %tx, 16;
    add.u64 %g, %g, %w;
    mov.u32 %sm, smem;
    mad.lo.u32 %s, %tx, 16, %sm;
    mov.u32 %i, %tx;
$label:
    setp.ge.u32 %more, %i, $chunks;
    @%more bra ${label}_DONE;
    $load;
    $store;
    add.u64 %g, %g, $step;
    add.u32 %s, %s, $step;
    add.u32 %i, %i, $threads;
    bra $label;
${label}_DONE:"""


def fill_shared(parameter, nbytes, threads=THREADS):
    """Copy `nbytes` of a parameter to `smem`."""
    moves = (
        "ld.global.v4.b32 {%q0, %q1, %q2, %q3}, [%g]",
        "st.shared.v4.b32 [%s], {%q0, %q1, %q2, %q3}",
    )
    return _copy("FILL", parameter, nbytes, threads, *moves)


def dump_shared(parameter, nbytes, threads=THREADS):
    """Copy `nbytes` of `smem` to a parameter."""
    moves = (
        "ld.shared.v4.b32 {%q0, %q1, %q2, %q3}, [%s]",
        "st.global.v4.b32 [%g], {%q0, %q1, %q2, %q3}",
    )
    return _copy("DUMP", parameter, nbytes, threads, *moves)


def _copy(label, parameter, nbytes, threads, load, store):
    sizes = {"chunks": nbytes // 16, "threads": threads, "step": 16 * threads}
    return kernel(COPY, label=label, parameter=parameter, load=load, store=store, **sizes)


TO_ASYNC_PROXY = """
    fence.proxy.async.shared::cta;
    bar.sync 0;"""


def blank_shared(nbytes):
    """Fill shared memory with 0xEE, so that bytes a copy does not write are known."""
    return f"""
    mov.u32 %i, %tx;
BLANK:
    mad.lo.u32 %s, %i, 4, %sm;
    st.shared.u32 [%s], 0xEEEEEEEE;
    add.u32 %i, %i, {THREADS};
    setp.lt.u32 %more, %i, {nbytes // 4};
    @%more bra BLANK;{TO_ASYNC_PROXY}"""


def init_barrier(count=1):
    return f"""
    @!%leader bra BARRIER_READY;
    mbarrier.init.shared::cta.b64 [%bar], {count};
    fence.mbarrier_init.release.cluster;
BARRIER_READY:
    bar.sync 0;"""


def wait_barrier(parity=0, label="WAIT"):
    return f"""
{label}:
    mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], {parity};
    @!%done bra {label};"""


def by_leader(lines, label="NOT_LEADER"):
    return f"    @!%leader bra {label};\n{lines}\n{label}:"


def load_registers(prefix, count, parameter, threads):
    """Load register r of thread t from word r * threads + t of a parameter."""
    lines = [f"    ld.param.u64 %g, [p_{parameter}];", "    add.u64 %g, %g, %lane4;"]
    lines += [f"    ld.global.b32 %{prefix}{r}, [%g+{4 * threads * r}];" for r in range(count)]
    return "\n".join(lines)


def store_registers(prefix, count, parameter, threads):
    lines = [f"    ld.param.u64 %g, [p_{parameter}];", "    add.u64 %g, %g, %lane4;"]
    lines += [f"    st.global.b32 [%g+{4 * threads * r}], %{prefix}{r};" for r in range(count)]
    return "\n".join(lines)


def names(prefix, count):
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"


TORCH_TYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def elements(kind, rng, count, style="exact"):
    """`count` raw elements of a matrix type.

    Styles: "exact" (multiples of 1/4 up to 2: every order of accumulation gives the same bits),
    "random" (bell-shaped, below 4), "wide" (the same times 2**-6 .. 2**6), "bits" (any bits:
    subnormals, huge values, infinities, NaN).
    """
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, count).astype(np.uint8)
    size = 4 if kind in ("f32", "tf32") else torch.empty(0, dtype=TORCH_TYPES[kind]).element_size()
    if style == "bits":
        return rng.integers(0, 1 << 8 * size, count, dtype=np.uint64).astype(f"u{size}")
    if style == "exact":
        values = rng.integers(-8, 9, count) / 4
    else:
        uniform = rng.integers(-(1 << 20), 1 << 20, (4, count)).sum(0) / (1 << 20)
        values = uniform * 2.0 ** (rng.integers(-6, 7, count) if style == "wide" else 0)
    if kind == "tf32" and style == "exact":
        return values.astype(np.float32).view(np.uint32)
    return raw_bits(kind, values)


def raw_bits(kind, values):
    """Values as raw elements of f32, tf32 (its 13 low bits zero), f16, bf16, e4m3 or e5m2."""
    if kind in ("f32", "tf32"):
        raw = values.astype(np.float32).view(np.uint32)
        return raw if kind == "f32" else raw & np.uint32(0xFFFFE000)
    packed = torch.from_numpy(values.astype(np.float32)).to(TORCH_TYPES[kind])
    size = packed.element_size()
    return packed.view({1: torch.uint8, 2: torch.int16}[size]).numpy().view(f"u{size}")


def words(kind, rng, shape, style="exact"):
    """Registers full of elements, uint32 of `shape`."""
    count = int(np.prod(shape))
    if kind == "s32":
        return rng.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32).reshape(shape)
    raw = elements(kind, rng, count * 4 // elements(kind, rng, 1).itemsize, style)
    return raw.view(np.uint32).reshape(shape)
