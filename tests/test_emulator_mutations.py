"""Take any one synchronising instruction out of a clean kernel: the detectors notice every time.

The planted faults of test_emulator_faults.py are chosen; here nothing is: each line of each kernel
of tests/ptx that waits, arrives, commits or fences is removed in turn.
"""

import re

import pytest
from test_emulator_faults import KERNELS, PTX

from mirage_hello.ptx.emulator import EmulatorError

SYNCHRONISES = re.compile(r"^\s*(@!?%\w+\s+)?\S*(fence|bar\.|barrier|wait|arrive|commit_group)")

# Lines whose absence is no fault, with the reason.
HARMLESS: dict[tuple[str, str], str] = {}


def synchronising_lines():
    for kernel in KERNELS:
        lines = (PTX / f"{kernel}.ptx").read_text().split("\n")
        for number, line in enumerate(lines):
            code = line.split("//")[0]
            whole = code.rstrip().endswith(";")
            if whole and SYNCHRONISES.match(code) and (kernel, code.strip()) not in HARMLESS:
                yield pytest.param(kernel, number, id=f"{kernel}:{number + 1} {code.strip()[:40]}")


@pytest.mark.parametrize(("kernel", "number"), list(synchronising_lines()))
def test_a_missing_synchronisation_is_found(kernel, number):
    lines = (PTX / f"{kernel}.ptx").read_text().split("\n")
    lines[number] = ""
    with pytest.raises(EmulatorError):
        KERNELS[kernel]("\n".join(lines))
