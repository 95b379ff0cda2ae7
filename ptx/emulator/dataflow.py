"""Static facts about a lowered kernel: where groups of threads may meet, which registers may be
read before they are written.

The second answer keeps execution fast: only registers that some path reads uninitialised carry a
"defined" bit per thread; for the others the text itself is the proof.
"""

from mirage_hello.ptx.emulator.operands import Target


def successors(op, count):
    """Program counters that can follow `op`."""
    base = op.opcode.split(".")[0]
    out = []
    if base in ("bra", "brx"):
        out = [op.program.labels[t.name] for t in _targets(op)]
    if base not in ("bra", "brx", "ret", "exit", "trap") or op.guard:
        out.append(op.pc + 1)
    return [pc for pc in out if pc < count]


def _targets(op):
    for operand in op.operands:
        if isinstance(operand, Target):
            yield operand


def mark_leaders(program):
    """Labels, and whatever follows a control operation, begin a block."""
    ops = program.ops
    ops[0].leader = True
    for pc in program.labels.values():
        if pc < len(ops):
            ops[pc].leader = True
    for op in ops:
        if op.control:
            op.leader = True
            if op.pc + 1 < len(ops):
                ops[op.pc + 1].leader = True


def possibly_undefined(program):
    """Rows that some path from the entry reads before every write (guarded writes do not count)."""
    ops = program.ops
    count = len(ops)
    everything = (1 << len(program.rows)) - 1
    defined = [None] * count  # rows certainly written before op i, as a bit set
    defined[0] = 0
    work = [0]
    while work:
        pc = work.pop()
        after = defined[pc]
        op = ops[pc]
        if not op.guard:
            for row in op.defs:
                after |= 1 << row
        for nxt in successors(op, count):
            before = defined[nxt]
            merged = after if before is None else before & after
            if merged != before:
                defined[nxt] = merged
                work.append(nxt)
    suspects = set()
    for pc, known in enumerate(defined):
        if known is None:
            continue
        missing = everything & ~known
        suspects.update(row for row in ops[pc].uses | ops[pc].weak_uses if missing >> row & 1)
    return frozenset(suspects)
