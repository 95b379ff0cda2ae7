"""Every instruction form in the emulator, against the GPU's answers and independent oracles.

tests/fixtures/ptx/forms.npz holds what an H200 computed for the same kernels and inputs
(make_ptx_fixtures.py).  Integer, memory, conversion and IEEE forms must agree bit for bit;
approximations and tensor-core sums within the tolerance of the form, which states its reason.
"""

import functools
import itertools
import json
import re
import warnings
from pathlib import Path

import numpy as np
import ptx_forms
import pytest
import torch

from mirage_hello.ptx import assembler
from mirage_hello.ptx.emulator import EmulatorError, formats, table

FIXTURE = Path(__file__).parent / "fixtures" / "ptx" / "forms.npz"
GROUPS = ptx_forms.groups()
FORMS = [f for forms in GROUPS.values() for f in forms]


@functools.cache
def fixture():
    """(arrays, meta) of the GPU's answers, or (None, None) before they were taken."""
    if not FIXTURE.exists():
        return None, None
    arrays = np.load(FIXTURE)
    return arrays, json.loads(str(arrays["meta"]))


def recorded(form):
    """The GPU's outputs of a form, or None when the fixture lacks it or is older than the form."""
    arrays, meta = fixture()
    if arrays is None or meta["digests"].get(form.name) != form.digest():
        return None
    return [arrays[f"{form.name}|{i}"] for i in range(len(form.outputs))]


def refused(form):
    """Whether the GPU stopped at this form: an illegal instruction or a misaligned address."""
    _, meta = fixture()
    return meta is not None and "CUDA error" in meta["failures"].get(form.name, "")


def assert_agrees(got, wanted, tolerance, what):
    """Compare raw bits, or values within a tolerance (NaN with NaN, infinity with infinity)."""
    got, wanted = np.ravel(got), np.ravel(wanted)
    if tolerance.kind == "bits":
        wrong = np.nonzero(got != wanted)[0]
        if len(wrong):
            i = wrong[0]
            text = f"{what}: {len(wrong)} of {len(got)} differ, first [{i}] {int(got[i]):#x}"
            pytest.fail(f"{text}, expected {int(wanted[i]):#x}")
        return
    dtype = formats.register_dtype(tolerance.kind)
    x, y = (formats.decode(tolerance.kind, v.view(dtype)) for v in (got, wanted))
    with np.errstate(invalid="ignore"):
        allowed = tolerance.absolute + tolerance.relative * np.abs(y)
        close = (x == y) | (np.abs(x - y) <= allowed) | (np.isnan(x) & np.isnan(y))
    if not close.all():
        i = np.nonzero(~close)[0][0]
        error = np.nanmax(np.where(close, 0, np.abs(x - y)))
        pytest.fail(f"{what}: {np.sum(~close)} of {len(x)} beyond {tolerance}, first [{i}] "
                    f"{x[i]!r}, expected {y[i]!r}; largest error {error:.3g}")  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_form(form):
    truth, program = recorded(form), ptx_forms.program_of(form.group)
    known = truth is not None or form.oracle is not None or refused(form)
    assert known, "no answer of a GPU and no oracle: run make_ptx_fixtures.py"
    if refused(form):
        with pytest.raises(EmulatorError, match="tensor-map"):  # nothing else was refused so far
            ptx_forms.run(form, program, torch.device("cpu"))
        return
    out = ptx_forms.run(form, program, torch.device("cpu"))
    if truth is not None:
        for got, wanted in zip(out, truth, strict=True):
            assert_agrees(got, wanted, form.tolerance, f"{form.name} (GPU)")
    if form.oracle is not None:
        inputs = form.arguments()
        expected = form.oracle(*(inputs[i] for i in range(len(inputs)) if i not in form.outputs))
        for got, wanted in zip(out, expected, strict=True):
            assert_agrees(got, wanted, form.tolerance, f"{form.name} (oracle)")


@pytest.mark.parametrize("group", GROUPS)
def test_group_assembles(group):
    """ptxas takes every form, for the oldest architecture that has it and for sm_90a."""
    for target in {f.target for f in GROUPS[group]}:
        forms = [f for f in GROUPS[group] if f.target == target]
        text = ptx_forms.module_text(forms)
        for arch in {target, "sm_90a"}:
            cubin, _ = assembler.ptxas(text, arch, name=group)
            assert all(f.entry.encode() in cubin for f in forms)


QUOTED = re.compile(r'"([^"]*)"')
# What a template writes into an opcode. N of wgmma is any multiple of 8: one N stands for all.
COMPLETIONS = {
    "dtype": ("f16", "bf16"),
    "access(dtype, 1)": (".b32", ".u16"),
    "access(dtype, E)": (".v4.b32", ".v2.b32", ".b32", ".u16"),
    "FRAME": (".b32", ".v2.b32"),
    "STORE": ("", ".cs"),
    "BLOCK_N": ("64",),
    "MMA": ("k16.f32.f16.f16", "k16.f32.bf16.bf16", "k32.f32.e4m3.e4m3"),
    "2 * width": ("2", "4"),
    "OUT": ("f16", "bf16"),
    "FREE": ("shared::cta", "shared::cluster"),
    "HEAD_DIM": ("64",),
}


def completions(expression):
    """Of an expression of a template: by name, or the texts that a conditional chooses from."""
    return COMPLETIONS[expression] if expression in COMPLETIONS else QUOTED.findall(expression)


def instructions(text):
    """The opcodes of a PTX text or template, every one that a template may complete."""
    text = re.sub(r"//[^\n]*", "", text).replace(";", ";\n")
    pattern = r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:[.\w:]|\{\{.*?\}\})+)(?=[\s;])"
    found = set()
    for opcode in re.findall(pattern, text, re.MULTILINE):
        names = sorted(set(re.findall(r"\{\{ (.*?) \}\}", opcode)))
        choices = [completions(name) for name in names]
        assert all(choices), f"{opcode}: name what the template may write here in COMPLETIONS"
        for values in itertools.product(*choices):
            whole = opcode
            for name, value in zip(names, values, strict=True):
                whole = whole.replace("{{ " + name + " }}", value)
            found |= {whole} if "." in whole else set()
    return found


def test_every_instruction_of_the_kernels_has_a_form():
    covered = set().union(*(instructions(ptx_forms.module_text(f)) for f in GROUPS.values()))
    missing = {}
    for source in sorted((Path(__file__).parents[1] / "ptx").iterdir()):
        if source.suffix in (".ptx", ".j2"):
            for opcode in instructions(source.read_text()) - covered:
                missing.setdefault(opcode, source.name)
    assert not missing, f"add a form to ptx_forms_*.py for {missing}"


# Every form returns and some branch or leave early; trap and brkpt would end the process.
UNDOTTED = {"bra", "brkpt", "exit", "pmevent", "ret", "trap"}


def test_every_entry_of_the_table_has_a_form():
    covered = set().union(*(instructions(ptx_forms.module_text(f)) for f in GROUPS.values()))
    tested = {table.lookup(opcode)[0] for opcode in covered}
    assert set(table.INSTRUCTIONS) - tested == UNDOTTED


@pytest.mark.skipif(not FIXTURE.exists(), reason="the GPU's answers are not recorded yet")
def test_fixture_is_current():
    """A form that changed needs new answers; one without answers is checked by its oracle only."""
    _, meta = fixture()
    stale = [f.name for f in FORMS if meta["digests"].get(f.name) not in (None, f.digest())]
    assert not stale, f"run make_ptx_fixtures.py again: {stale} changed"
    known = {*meta["digests"], *meta["failures"]}
    missing = [f.name for f in FORMS if f.name not in known]
    if missing:
        warnings.warn(f"{len(missing)} forms have no answers of a GPU yet: {missing[:3]} ...")


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_group_on_the_gpu(group):
    """The recorded answers are those of this GPU."""
    program, device = ptx_forms.program_of(group), torch.device("cuda")
    for form in GROUPS[group]:
        truth = recorded(form)
        if truth is None:
            continue
        for got, wanted in zip(ptx_forms.run(form, program, device), truth, strict=True):
            assert_agrees(got, wanted, ptx_forms.BITS, form.name)
