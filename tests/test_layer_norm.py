"""layer_norm: parity over backends, dtypes, lengths, layouts, extreme values; mean and variance."""

import re
from dataclasses import replace

import pytest
import torch
from every_backend import PROPERTY, assert_parity, outputs
from hypothesis import given
from hypothesis import strategies as st

from mirage_hello.kernels import layer_norm, ops, parity
from mirage_hello.ptx import assembler

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (1, 1), (3, 77), (2, 5, 127), (9, 129), (4, 320), (1, 5000), (33, 16)]


def draw(device, dtype, *shape, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype, device):
    x = draw(device, dtype, *shape)
    weight, bias = (draw(device, dtype, shape[-1]) for _ in range(2))
    assert_parity("layer_norm", x, weight, bias)
    assert_parity("layer_norm", x, None, bias, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 200, 320, 640, 1280, 4096, 8192])
def test_parity_of_the_ptx(width, dtype, device):
    """Rows of 1 to 8 warps, in the emulator and on a GPU; a mean far above the spread."""
    backend = "ptx-emulated" if device.type == "cpu" else "ptx"
    kernel = next(k for k in ops.layer_norm.kernels if k.backend == backend)
    for mean, spread in ((3, 1), (1000, {torch.float32: 0.1}.get(dtype, 10)), (0, 1e-4), (3, 0)):
        x = (mean + spread * torch.randn(5, width, device=device)).to(dtype)
        x[1, 0] = 0  # an outlier
        weight, bias = (draw(device, dtype, width) for _ in range(2))
        for args in ((x, weight, bias), (x, None, bias, 1e-3)):
            result = parity.compare("layer_norm", kernel, args)
            if spread == 0:  # rows of one value are exact, here as in torch
                same = [0, 2, 3, 4]
                assert torch.equal(kernel.run(*args)[same], bias.expand(4, width))
                # torch has their exactness in its norm: the row left may take two roundings.
                result = replace(result, allowed=max(result.allowed, 2 * parity.ROUNDING[dtype]))
            assert result.passed, f"{mean} +- {spread}: {result}"


@pytest.mark.parametrize("cut", [(1, 1), (1, 8), (2, 1), (4, 1), (8, 1)])
def test_every_cut_passes_parity(cut, device):
    x, weight, bias = (draw(device, torch.bfloat16, *s) for s in ((7, 1280), (1280,), (1280,)))
    truth = ops.layer_norm.reference(*parity.in_float64((x, weight, bias)))
    plain = ops.layer_norm.torch_kernel.run(x, weight, bias)
    out = layer_norm.layer_norm_ptx(x, weight, bias, cut=cut)
    assert parity.judge(out, plain, truth).passed


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 320, 1280, 8192])
def test_ptx_assembles_within_its_budget(width, dtype, arch):
    cut = layer_norm.choose_cut(100, width * dtype.itemsize)
    text = layer_norm.ptx_program(width, dtype, cut, overlap=arch != "sm_80").text
    assert text.isascii()
    budget = int(re.search(r"// Budget +registers <= (\d+), spills 0", text)[1])
    _, report = assembler.ptxas(text, arch, ("-v",))
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= budget, report
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_on_views(dtype, device):
    assert_parity("layer_norm", draw(device, dtype, 6, 4, 90)[:, :, 10:50].transpose(0, 1))
    assert_parity("layer_norm", draw(device, dtype, 40, 6).t())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape, device):
    assert_parity("layer_norm", draw(device, torch.float32, *shape))


@pytest.mark.parametrize(("mean", "spread"), [(1e4, 1.0), (0.0, 1e-4), (0.0, 1e15), (3.0, 0.0)])
def test_parity_with_extreme_statistics(mean, spread, device):
    """A mean far above the spread cancels in E[x^2] - E[x]^2; a constant row has variance 0."""
    x = mean + draw(device, torch.float32, 5, 320, scale=spread)
    assert_parity("layer_norm", x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_fill_their_row_only(value, device):
    x = draw(device, torch.float32, 9, 77)
    x[4, 5] = value
    assert_parity("layer_norm", x)
    for name, out in outputs("layer_norm", x):
        assert out[4].isnan().all(), name
        assert torch.isfinite(torch.cat([out[:4], out[5:]])).all(), name


@PROPERTY
@given(st.integers(8, 300), st.floats(-100, 100, width=16), st.floats(0.125, 100, width=16))
def test_rows_have_mean_0_and_variance_1(device, length, shift, scale):
    x = shift + draw(device, torch.float32, 4, length, scale=scale)
    for name, out in outputs("layer_norm", x, eps=0.0):
        out = out.double()
        # The mean is at most 100, the spread at least 0.125: 800 * 2^-24 a rounding, times 20.
        assert out.mean(-1).abs().max() < 1e-3, name
        assert (out.var(-1, unbiased=False) - 1).abs().max() < 2e-3, name


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (((4, 7), (6,)), ValueError, r"weight must be \[K\] = \(7,\) \(got \(6,\)\)"),
        (((4, 7), (7,), (4, 7)), ValueError, r"bias must be \[K\] = \(7,\)"),
        (((),), ValueError, r"x must be \[..., K\] \(got a scalar\)"),
    ],
)
def test_bad_input(args, error, text):
    with pytest.raises(error, match=text):
        ops.layer_norm(*(torch.zeros(shape) for shape in args))


def test_bad_dtypes():
    with pytest.raises(TypeError, match="x must be floating"):
        ops.layer_norm(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"weight must have x's dtype"):
        ops.layer_norm(torch.zeros(2, 3).half(), torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 320), (1, 1024, 640), (2, 256, 1280), (3, 16384)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parity_on_the_shapes_of_the_model(shape, dtype):
    weight, bias = (draw("cuda", dtype, shape[-1]) for _ in range(2))
    assert_parity("layer_norm", draw("cuda", dtype, *shape), weight, bias)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """2^31 + 320 elements: the last row lies past what 32 bits reach."""
    x = torch.randn(2**31 // 512 + 1, 512, device="cuda", dtype=torch.float16)
    for name, out in outputs("layer_norm", x):
        expected = torch.nn.functional.layer_norm(x[-9:], (512,))
        assert torch.allclose(out[-9:], expected, atol=0.01), name
