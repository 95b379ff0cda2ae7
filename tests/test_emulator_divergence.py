"""Random structured programs: all threads at once give what one thread at a time would.

A program is a tree of statements (arithmetic, if/else, loops with a data-dependent length, early
exit) over four 32-bit registers; it is printed as PTX and interpreted in Python per thread.
"""

import contextlib
import random

import numpy as np
import pytest

from mirage_hello.ptx.emulator import launch, parse

MASK = 0xFFFFFFFF
OPERATIONS = {
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "xor.b32": lambda a, b: a ^ b,
    "max.u32": max,
}


class Leave(Exception):
    """A thread executed `exit`."""


def statements(rng, depth):
    """A random block: list of nodes."""
    kinds = ["op"] * 4 + (["if", "loop", "exit"] if depth else [])
    return [node(rng, rng.choice(kinds), depth) for _ in range(rng.randint(1, 4))]


def node(rng, kind, depth):
    a, b, d = (rng.randrange(4) for _ in range(3))
    if kind == "op":
        return (
            "op",
            rng.choice(list(OPERATIONS)),
            d,
            a,
            rng.choice([b, None]),
            rng.randrange(1000),
        )
    if kind == "if":
        return (
            "if",
            a,
            rng.randrange(2, 6),
            statements(rng, depth - 1),
            statements(rng, depth - 1),
        )
    if kind == "loop":
        return ("loop", a, rng.randrange(1, 6), statements(rng, depth - 1))
    return ("exit", a, rng.randrange(5, 40))


def execute(block, registers):
    """One thread, in Python."""
    for kind, *rest in block:
        if kind == "op":
            name, d, a, b, constant = rest
            other = constant if b is None else registers[b]
            registers[d] = OPERATIONS[name](registers[a], other) & MASK
        elif kind == "if":
            a, modulus, yes, no = rest
            execute(yes if registers[a] % modulus == 0 else no, registers)
        elif kind == "loop":
            a, limit, body = rest
            for _ in range(registers[a] % limit):
                execute(body, registers)
        elif registers[rest[0]] % rest[1] == 0:
            raise Leave


def ptx(block, lines, names):
    """The same block as PTX lines."""
    for kind, *rest in block:
        label = f"L{next(names)}"
        if kind == "op":
            name, d, a, b, constant = rest
            lines.append(f"{name} %r{d}, %r{a}, {constant if b is None else f'%r{b}'};")
        elif kind == "if":
            a, modulus, yes, no = rest
            lines.append(
                f"rem.u32 %t, %r{a}, {modulus}; setp.ne.u32 %p, %t, 0; @%p bra {label}_NO;"
            )
            ptx(yes, lines, names)
            lines.append(f"bra {label}_END;\n{label}_NO:")
            ptx(no, lines, names)
            lines.append(f"{label}_END:")
        elif kind == "loop":
            a, limit, body = rest
            lines.append(f"{{ .reg .b32 %n; .reg .pred %q; rem.u32 %n, %r{a}, {limit};")
            lines.append(f"{label}: setp.eq.u32 %q, %n, 0; @%q bra {label}_END; sub.u32 %n, %n, 1;")
            ptx(body, lines, names)
            lines.append(f"bra {label};\n{label}_END: }}")
        else:
            a, modulus = rest
            lines.append(f"rem.u32 %t, %r{a}, {modulus}; setp.eq.u32 %p, %t, 0; @%p bra STORE;")


def as_module(block):
    lines = []
    ptx(block, lines, iter(range(10**6)))
    body = "\n".join(lines)
    return parse(f""".version 7.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p_out) {{
    .reg .b32 %r<4>, %t, %i; .reg .pred %p; .reg .b64 %out, %w;
    mov.u32 %i, %ctaid.x; mov.u32 %t, %ntid.x; mov.u32 %r0, %tid.x; mad.lo.u32 %i, %i, %t, %r0;
    mul.lo.u32 %r1, %i, 2654435761; mov.u32 %r2, 7; shr.u32 %r3, %r1, 20; mov.u32 %r0, %i;
{body}
STORE:
    bar.warp.sync 0xFFFFFFFF;
    ld.param.u64 %out, [p_out]; mul.wide.u32 %w, %i, 16; add.u64 %out, %out, %w;
    st.global.v4.b32 [%out], {{%r0, %r1, %r2, %r3}};
    ret; }}""")


@pytest.mark.parametrize("case", range(40))
def test_random_program(case):
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    block = statements(rng, 3)
    threads, blocks = rng.choice([32, 48, 96, 128]), rng.choice([1, 3])
    out = np.zeros((threads * blocks, 4), np.uint32)
    launch(as_module(block), "k", blocks, threads, [out])
    for i in range(threads * blocks):
        product = i * 2654435761 & MASK
        registers = [i, product, 7, product >> 20]
        with contextlib.suppress(Leave):
            execute(block, registers)
        assert out[i].tolist() == registers, f"seed {seed}, thread {i}"
