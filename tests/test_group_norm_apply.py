"""group_norm_apply: of given sums, in the emulator and on a GPU, against the float64 reference."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mirage_hello.kernels import group_norm_apply as page
from mirage_hello.kernels import parity
from mirage_hello.kernels.conv2d_fused import Norm
from mirage_hello.kernels.group_norm_apply import Cut, choose_cut, group_norm_apply
from mirage_hello.ptx import assembler

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# channels of x and of the skip, groups, unit, height, width, parts of x and of the skip
SHAPES = [
    (320, 0, 32, 10, 9, 7, 3, 1),
    (320, 320, 32, 10, 8, 8, 40, 3),
    (640, 320, 32, 10, 5, 7, 2, 33),
    (64, 0, 4, 8, 1, 1, 1, 1),
    (24, 16, 5, 4, 16, 16, 5, 2),
    (128, 0, 32, 2, 20, 20, 70, 1),
    (64, 32, 8, 4, 16, 16, 130, 7),
]


def draw(channels, height, width, dtype, device, mean=0.5, std=1.0):
    x = mean + std * torch.randn(2, channels, height, width, device=device)
    return x.to(dtype).to(memory_format=torch.channels_last)


def sums_of(x, unit, parts):
    """Sums of `parts` stretches of the image's pixels, some of them empty."""
    b, c, h, w = x.shape
    values = x.double().reshape(b, c // unit, unit, h * w)
    ends = torch.linspace(0, h * w, parts + 1).long().tolist()
    found = torch.zeros(b, parts, c // unit, 4, dtype=torch.float64, device=x.device)
    for s, (start, end) in enumerate(pairwise(ends)):
        part = values[..., start:end].flatten(2)
        if end > start:
            mean = part.mean(-1)
            m2 = (part - mean[..., None]).square().sum(-1)
            found[:, s] = torch.stack([m2 * 0 + part.shape[-1], mean, m2, m2 * 0], -1)
    return found.float()


def problem(shape, dtype, device, silu=True, mean=0.5, std=1.0):
    c, extra, groups, unit, h, w, parts, skip_parts = shape
    x = draw(c, h, w, dtype, device, mean, std)
    skip = draw(extra, h, w, dtype, device, -mean, std) if extra else None
    weight, bias = (torch.randn(c + extra, device=device).to(dtype) for _ in range(2))
    skip_sums = None if skip is None else sums_of(skip, unit, skip_parts)
    return x, Norm(sums_of(x, unit, parts), groups, weight, bias, skip_sums, silu=silu), skip


def assert_right(x, norm, skip, cut=None):
    out = group_norm_apply(x, norm, skip, cut)
    assert out.is_contiguous(memory_format=torch.channels_last)
    wide = Norm(norm.sums, norm.groups, norm.weight.double(), norm.bias.double(), silu=norm.silu)
    truth = page.torch_form(x.double(), wide, None if skip is None else skip.double())
    joined = x if skip is None else torch.cat([x, skip], 1)
    plain = torch.nn.functional.group_norm(joined, norm.groups, norm.weight, norm.bias, norm.eps)
    plain = torch.nn.functional.silu(plain) if norm.silu else plain
    result = parity.judge(out, plain, truth)
    assert result.passed, str(result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, device):
    assert_right(*problem(shape, dtype, device))
    assert_right(*problem(shape, dtype, device, silu=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_robust_where_the_mean_is_far_above_the_spread(dtype, device):
    std = {torch.float32: 10.0, torch.float16: 10.0, torch.bfloat16: 100.0}[dtype]
    for shape in SHAPES[:3]:
        assert_right(*problem(shape, dtype, device, silu=False, mean=1000.0, std=std))


@pytest.mark.parametrize("cut", [Cut(8, 128, 1, 2), Cut(16, 192, 5), Cut(32, 256, 8)], ids=str)
def test_every_cut_computes_the_same(cut, device):
    args = problem(SHAPES[1], torch.bfloat16, device)
    assert torch.equal(group_norm_apply(*args, cut=cut), group_norm_apply(*args))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_e4m3_output_is_one_rounding(shape, dtype, device):
    """Half a step of e4m3 from the exact value, and values past the range saturate."""
    x, norm, skip = problem(shape, dtype, device)
    wide = Norm(norm.sums, norm.groups, norm.weight.double(), norm.bias.double())
    truth = page.torch_form(x.double(), wide, None if skip is None else skip.double())
    for out_scale in (truth.abs().max().item() / 448, truth.abs().max().item() / 2000):
        out = group_norm_apply(x, norm, skip, out_scale=out_scale)
        assert out.dtype == torch.float8_e4m3fn
        exact = (truth / out_scale).clamp(-448, 448)
        step = torch.exp2(exact.abs().clamp(min=2**-6).log2().floor() - 3)  # 3 bits of mantissa
        # half a step, and what the float32 value was wrong by
        assert ((out.double() - exact).abs() <= 0.502 * step + 0.003 * exact.abs()).all()
    with pytest.raises(ValueError, match="out_scale must be above 0"):
        group_norm_apply(x, norm, skip, out_scale=0.0)


@pytest.mark.parametrize(
    ("channels", "edge"), [(320, 64), (960, 64), (640, 32), (1920, 32), (2560, 16), (1280, 8)]
)
def test_ptx_of_the_unet_assembles_within_its_budget(channels, edge):
    x = torch.empty(1, channels, edge, edge, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    parameter = torch.empty(channels, dtype=torch.bfloat16)
    norm = Norm(torch.empty(1, edge * edge // 64, channels // 10, 4), 32, parameter, parameter)
    cut = choose_cut(1, edge * edge, 32, channels // 32 * 2)
    columns = cut.slab_groups * channels // 32 // 8
    assert all(t * -(-65536 // columns) >> 16 == t // columns for t in range(cut.threads))
    for quantise in (False, True):
        text = page._program(x, norm, None, cut, columns, quantise).text
        assert text.isascii()
        budget = int(re.search(r"// Budget +registers <= (\d+)", text)[1])
        _, report = assembler.ptxas(text, "sm_90a", ("-v",))
        assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= budget, report
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report


def test_bad_input():
    x, norm, skip = problem(SHAPES[4], torch.float32, "cpu")
    short = skip[:, :, :8].contiguous(memory_format=torch.channels_last)
    odd = replace(norm, sums=norm.sums[:, :, :2].contiguous())
    for args, text in (
        ((x.contiguous(), norm, skip), "x must be channels_last"),
        ((x, norm, None), "skip and norm.skip_sums go together"),
        ((x, odd, skip), "must be whole units"),
        ((x, norm, short), "skip must be like x"),
    ):
        with pytest.raises(ValueError, match=text):
            group_norm_apply(*args)


def test_cuts_that_do_not_exist():
    for cut in ((8, 128, 1, -1), (0, 128, 1), (8, 100, 1), (8, 128, 9), (8, 128, 0)):
        with pytest.raises(ValueError, match=r"a cut is 1 group or more.*got Cut\(slab_groups"):
            Cut(*cut)
    x, norm, _ = problem(SHAPES[0], torch.bfloat16, "cpu")
    for cut in (Cut(3, 128, 1), Cut(32, 32, 1)):  # 32 groups; 320 channels are 40 columns
        with pytest.raises(ValueError, match="slab_groups must divide"):
            group_norm_apply(x, norm, cut=cut)
