"""Runs PTX on a CPU: exact enough for parity tests to mean something, and it sees what GPUs hide.

    from mirage_hello.ptx.emulator import parse, launch
    module = parse(text, name="silu.ptx")
    report = launch(module, "silu_f32", grid=(4, 1, 1), block=(256, 1, 1), args=[x, y, n])

Parts, in the order a kernel passes them: parser.py (grammar.lark, ir.py), program.py (names and
addresses), table.py and instructions_*.py (mnemonic -> semantics), machine.py (threads),
memory.py, barriers.py, mbarriers.py, registers.py, asynchronous.py, then checks.py and races.py
(findings), counts.py and listing.py (what it cost).
"""

from mirage_hello.ptx.emulator import (  # noqa: F401  (importing fills the table)
    instructions_arithmetic,
    instructions_async,
    instructions_bulk,
    instructions_control,
    instructions_convert,
    instructions_logic,
    instructions_mbarrier,
    instructions_memory,
    instructions_tensor,
    instructions_warp,
    instructions_wgmma,
)
from mirage_hello.ptx.emulator.checks import KINDS, EmulatorError, Finding
from mirage_hello.ptx.emulator.launch import Report, launch
from mirage_hello.ptx.emulator.parser import PtxSyntaxError, parse
from mirage_hello.ptx.emulator.table import INSTRUCTIONS, PtxError, PtxUnsupported

__all__ = [
    "INSTRUCTIONS",
    "KINDS",
    "EmulatorError",
    "Finding",
    "PtxError",
    "PtxSyntaxError",
    "PtxUnsupported",
    "Report",
    "launch",
    "parse",
]
