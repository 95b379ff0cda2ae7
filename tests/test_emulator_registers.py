"""setmaxnreg moves only what a block was launched with: asking for more waits for ever."""

import re

import numpy as np
import pytest

from mirage_hello.ptx import assembler
from mirage_hello.ptx.emulator import EmulatorError, launch, parse
from mirage_hello.ptx.emulator.registers import at_entry

# Warpgroup 0 gives registers up, late: after the others came to their setmaxnreg.inc.
KERNEL = """.version 8.4
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p_out)
$directives
{
    .reg .b32 %thread, %block, %at, %k, %value;
    .reg .b64 %out, %offset;
    .reg .pred %is_taker, %more;
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %at, %ntid.x;
    mad.lo.u32 %at, %block, %at, %thread;
    setp.ge.u32 %is_taker, %thread, 128;
    @%is_taker bra TAKE;
    mov.u32 %k, 0;
LATER:
    add.u32 %k, %k, 1;
    setp.lt.u32 %more, %k, 600;
    @%more bra LATER;
    setmaxnreg.dec.sync.aligned.u32 $given;
    mov.u32 %value, 1;
    bra JOINED;
TAKE:
    setmaxnreg.inc.sync.aligned.u32 $taken;
    mov.u32 %value, 2;
JOINED:
    ld.param.u64 %out, [p_out];
    mul.wide.u32 %offset, %at, 4;
    add.u64 %out, %out, %offset;
    st.global.u32 [%out], %value;
    ret;
}
"""


def source(given, taken, directives):
    text = KERNEL.replace("$given", str(given)).replace("$taken", str(taken))
    return text.replace("$directives", directives)


def for_threads(threads, more=".minnctapersm 1"):
    return f".reqntid {threads}, 1, 1\n{more}"


def run(text, threads, **options):
    """Three blocks: none gets registers of another."""
    out = np.zeros((3, threads), np.uint32)
    report = launch(parse(text, "registers.ptx"), "k", 3, threads, [out], **options)
    assert (out == np.where(np.arange(threads) < 128, 1, 2)).all()
    return report


@pytest.mark.parametrize(
    ("warpgroups", "given", "taken", "more"),
    [
        (3, 24, 240, ".minnctapersm 1"),  # 504 of 504
        (4, 32, 160, ".minnctapersm 1"),  # 512 of 512
        (5, 24, 112, ".minnctapersm 1"),  # 472 of 480
        (3, 24, 104, ".minnctapersm 2"),  # 232 of 240
        (2, 24, 168, ".maxnreg 96"),  # 192 of 192
        (3, 40, 240, ""),  # ptxas ignores it
    ],
)
def test_registers_that_are_there(warpgroups, given, taken, more):
    """An increase that comes before the decrease waits for it."""
    threads = 128 * warpgroups
    assert run(source(given, taken, for_threads(threads, more)), threads).findings == []


@pytest.mark.parametrize(
    ("warpgroups", "given", "taken", "more", "says"),
    [
        (3, 32, 240, ".minnctapersm 1", "want 32, 240, 240 registers a thread, 65536 in all, and "
         "the block owns 64512 (168 a thread at entry); they hold 32, 240, 168"),
        (4, 40, 160, ".minnctapersm 1", "want 40, 160, 160, 160 registers"),
        (5, 24, 120, ".minnctapersm 1", "owns 61440 (96 a thread at entry)"),
        (3, 24, 112, ".minnctapersm 2", "want 24, 112, 112 registers"),
        (2, 32, 168, ".maxnreg 96", "owns 24576 (96 a thread at entry)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("checks", [True, False])
def test_registers_that_nobody_has(warpgroups, given, taken, more, says, checks):
    threads = 128 * warpgroups
    text = source(given, taken, for_threads(threads, more))
    with pytest.raises(EmulatorError, match=re.escape(says)) as caught:
        run(text, threads, checks=checks)
    assert {f.kind for f in caught.value.findings} == {"deadlock"}
    assert {text.split("\n")[f.line - 1].split()[0] for f in caught.value.findings} == {
        "setmaxnreg.inc.sync.aligned.u32"
    }


def test_warps_that_ended_return_nothing():
    """168 + 240 of 336: warpgroup 0 ends with what it had at entry."""
    text = source(24, 240, for_threads(256, ".maxnreg 168"))
    text = text.replace("    setmaxnreg.dec.sync.aligned.u32 24;\n", "")
    with pytest.raises(EmulatorError, match="they hold 168, 168; threads 128-255 of"):
        run(text, 256)


def test_half_a_warpgroup():
    text = source(24, 240, for_threads(384)).replace(
        "%is_taker, %thread, 128", "%is_taker, %thread, 64"
    )
    with pytest.raises(EmulatorError, match=r"divergent-aligned.*part of its warpgroup"):
        run(text, 384)


@pytest.mark.parametrize("threads", [256, 384, 512, 640])
@pytest.mark.parametrize("more", [".minnctapersm 1", ".minnctapersm 2", ".maxnreg 64", ""])
def test_registers_at_entry_are_those_of_the_assembler(threads, more):
    """ptxas gives a kernel that asks for 248 somewhere all that there are."""
    text = source(24, 248, for_threads(threads, more))
    entry = at_entry(parse(text).functions["k"].directives, threads)
    _, said = assembler.ptxas(text, "sm_90a", ("-v",))
    if entry is None:
        assert "C7508" in said
    else:
        assert f"Used {entry} registers" in said
