"""merge_sums: the parts of an image's statistics as one, in the emulator and on a GPU."""

import re

import pytest
import torch

from mirage_hello.kernels.conv2d_fused import merged
from mirage_hello.kernels.conv2d_norm import merge_sums
from mirage_hello.ptx import assembler, loader


@pytest.mark.parametrize("parts", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_it_is_the_plain_merge(parts, mean, device):
    """Counts that differ, parts of nothing among them, means far from zero."""
    counts = torch.randint(0, 100, (2, parts, 3))
    counts[:, 0] += 1
    spread = torch.rand(2, parts, 3) * (counts > 1) * counts
    values = [counts, mean + torch.randn(2, parts, 3), spread, torch.zeros(2, parts, 3)]
    sums = torch.stack(values, -1).float().to(device)
    count, centre, m2, _ = merge_sums(sums).reshape(2, 3, 4).double().unbind(-1)
    expected = merged(sums.double())
    assert torch.equal(count, expected[..., 0])
    assert torch.allclose(centre, expected[..., 1], rtol=1e-6, atol=1e-5)
    assert torch.allclose(m2, expected[..., 2], rtol=1e-4)


def test_it_assembles_within_its_budget():
    text = loader.program("merge_sums").text
    budget = int(re.search(r"// Budget +(\d+) registers, no spills", text)[1])
    _, report = assembler.ptxas(text, "sm_90a", ("-v",))
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= budget, report
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report
