"""sanitize.py with a stand-in for compute-sanitizer; the calls run in the emulator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import sanitized_calls
import sanitizer_witnesses
import torch

from mirage_hello.ptx.emulator import EmulatorError

FAMILY = "attention fp8"  # quick to emulate
TOOL = """#!/bin/bash
case "$1" in --help) echo "--port --print-limit"; exit;; --version) echo 2025.3; exit;; esac
while [[ "$1" == --* ]]; do shift 2; done
"$@"
echo "========= Invalid __global__ read of size 4 bytes"
echo "=========     at silu_f32+0x90"
echo "========= ERROR SUMMARY: {errors} errors"
"""


@pytest.mark.parametrize("family", [f for f in sanitized_calls.FAMILIES if f != "witnesses"])
def test_calls_are_right_in_the_emulator(family):
    """The cheapest of each family: the calls and their truths fit each other."""

    def size(call):
        return sum(a.numel() for a in call.args if isinstance(a, torch.Tensor))

    found = [c for c in sanitized_calls.calls(family) if "cuda" not in c.name]
    for call in sorted(found, key=size)[:1]:
        assert call.error(torch.device("cpu")) <= call.allowed, call.name


@pytest.mark.parametrize("name", sanitizer_witnesses.PARTS)
def test_the_emulator_sees_the_planted_race_and_every_order(name):
    out = torch.zeros(32, dtype=torch.int32)
    if name == "planted_race":
        with pytest.raises(EmulatorError, match="shared-race"):
            sanitizer_witnesses.run(name, out)
    else:
        assert torch.equal(sanitizer_witnesses.run(name, out), 131 - torch.arange(32).int())


def test_covering_has_every_value():
    tiles = sanitized_calls.conv2d_sm90a.candidates(27, 3, 3, 1)
    picked = sanitized_calls.covering(tiles)
    assert len(picked) < 16
    for name in ("warpgroups", "block_n", "split", "persistent", "blocks_per_sm"):
        assert {getattr(t, name) for t in picked} == {getattr(t, name) for t in tiles}


@pytest.mark.parametrize("errors", [0, 1])
def test_a_run(tmp_path, errors):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(errors=errors))
    tool.chmod(0o755)
    tests = Path(sanitize.__file__).parent
    done = subprocess.run(
        [sys.executable, "-P", Path(sanitize.__file__), "--tool", "memcheck",
         "--family", FAMILY, "--out", tmp_path / "out.json"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tests)},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["right"] == len(sanitized_calls.calls(FAMILY)) and result["errors"] == errors, (
        done.stdout
    )
    assert "1 x at silu_f32+0x90" in result["findings"]
    assert done.returncode == errors


def test_a_call_that_did_not_end_is_named(tmp_path):
    journal = tmp_path / "journal"
    lines = [{"call": "a"}, {"call": "a", "error": 0.0, "right": True}, {"call": "b"}]
    journal.write_text("\n".join(map(json.dumps, lines)) + "\n")
    read = sanitize.read_journal(journal)
    assert read == {"right": 1, "wrong": [], "not_ended": ["b"]}
    result = {"family": "x", "tool": "y", "seconds": 1.0, **read, **sanitize.read_log("")}
    assert not sanitize.is_clean(result) and "did not end: b" in sanitize.describe(result)
