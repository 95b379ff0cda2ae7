"""linear and geglu: parity over backends, dtypes, sizes, layouts and extreme values."""

import pytest
import torch
from every_backend import PROPERTY, able, assert_parity, outputs
from hypothesis import given
from hypothesis import strategies as st

from mirage_hello.kernels import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# leading dimensions of x, N, K; a vector has many outputs, or the luck of a few roundings decides
SIZES = [((1,), 1, 1), ((77,), 33, 129), ((129,), 127, 40), ((2, 3, 5), 70, 64), ((), 301, 100)]


def draw(device, dtype, *shape, scale=1.0):
    """A single number is positive: a result of one term that cancels has no scale to judge by."""
    values = torch.randn(shape, device=device) * scale
    return (values.abs() if values.numel() <= 2 else values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), SIZES)
def test_parity_of_linear(rows, n, k, dtype, device):
    x, weight = draw(device, dtype, *rows, k), draw(device, dtype, n, k, scale=k**-0.5)
    bias, residual = draw(device, dtype, n), draw(device, dtype, *rows, n)
    assert_parity("linear", x, weight)
    assert_parity("linear", x, weight, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), SIZES)
def test_parity_of_geglu(rows, n, k, dtype, device):
    x, weight = draw(device, dtype, *rows, k), draw(device, dtype, 2 * n, k, scale=k**-0.5)
    assert_parity("geglu", x, weight)
    assert_parity("geglu", x, weight, draw(device, dtype, 2 * n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_on_views(dtype, device):
    """A slice of columns, a transposed batch, every other row of a transposed weight."""
    x = draw(device, dtype, 9, 4, 100)[:, :, 20:70].transpose(0, 1)
    weight = draw(device, dtype, 50, 24, scale=0.14).t()[::2]
    residual = draw(device, dtype, 12, 9, 4).permute(2, 1, 0)
    assert_parity("linear", x, weight, None, residual)
    assert_parity("geglu", x, weight)


@pytest.mark.parametrize(("rows", "n", "k"), [((0,), 4, 8), ((3, 0), 4, 8), ((3,), 0, 8)])
def test_empty(rows, n, k, device):
    x, weight = draw(device, torch.float32, *rows, k), draw(device, torch.float32, 2 * n, k)
    assert_parity("linear", x, weight)
    assert_parity("geglu", x, weight)


def test_an_empty_sum_is_the_bias(device):
    x, weight = torch.empty(3, 0, device=device), torch.empty(5, 0, device=device)
    bias = draw(device, torch.float32, 5)
    for name, out in outputs("linear", x, weight, bias):
        assert torch.equal(out, bias.expand(3, 5)), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30])
def test_extreme_values_reach_only_their_row(value, device):
    x = draw(device, torch.float32, 20, 33)
    weight = draw(device, torch.float32, 14, 33, scale=0.2)
    x[7, 3] = value
    assert_parity("linear", x, weight)
    for name, out in outputs("linear", x, weight):
        others = torch.cat([out[:7], out[8:]])
        assert torch.isfinite(others).all(), name


def test_geglu_with_saturated_gates(device):
    """gelu(100) is 100 and gelu(-100) is 0: no NaN from erf's tails."""
    x = torch.ones(4, 1, device=device)
    weight = torch.tensor([[2.0], [3.0], [100.0], [-100.0]], device=device)
    for name, out in outputs("geglu", x, weight):
        assert torch.equal(out, torch.tensor([[200.0, 0.0]], device=device).expand(4, 2)), name


@PROPERTY
@given(st.floats(-4, 4, width=16), st.floats(-4, 4, width=16), st.integers(1, 90))
def test_linear_is_linear(device, a, b, k):
    x, y = (draw(device, torch.float32, 6, k) for _ in range(2))
    weight = draw(device, torch.float32, 11, k, scale=k**-0.5)
    sums = dict(outputs("linear", a * x + b * y, weight))
    of_y = dict(outputs("linear", y, weight))
    for name, of_x in outputs("linear", x, weight):
        expected = a * of_x + b * of_y[name]
        assert torch.allclose(sums[name], expected, rtol=1e-4, atol=1e-4), name


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 90))
def test_geglu_is_linear_in_h(device, n, k):
    x = draw(device, torch.float32, 6, k)
    h, gate = (draw(device, torch.float32, n, k, scale=k**-0.5) for _ in range(2))
    doubled = dict(outputs("geglu", x, torch.cat([2 * h, gate])))
    for name, out in outputs("geglu", x, torch.cat([h, gate])):
        assert torch.allclose(doubled[name], 2 * out, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("op", "shapes", "error", "text"),
    [
        ("linear", [(4, 5), (6, 7)], ValueError, r"last dimension of x must be the weight's K"),
        ("linear", [(4, 7), (7,)], ValueError, r"weight must be \[N, K\] \(got \(7,\)\)"),
        ("linear", [(4, 7), (6, 7), (5,)], ValueError, r"bias must be \[N\] = \(6,\)"),
        ("linear", [(4, 7), (6, 7), (6,), (4, 5)], ValueError, r"residual must be .* \(4, 6\)"),
        ("geglu", [(4, 7), (5, 7)], ValueError, r"even number of rows, h and gate \(got 5\)"),
        ("geglu", [(4, 7), (6, 7), (3,)], ValueError, r"bias must be \[N\] = \(6,\)"),
    ],
)
def test_bad_input(op, shapes, error, text):
    with pytest.raises(error, match=text):
        getattr(ops, op)(*(torch.zeros(s) for s in shapes))


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"weight must have x's dtype \(got torch.float16"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 3).half())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "k", "n"), [(4096, 320, 2560), (1024, 640, 5120), (256, 5120, 1280), (77, 768, 320)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parity_on_the_shapes_of_the_model(m, k, n, dtype):
    x, weight = draw("cuda", dtype, m, k), draw("cuda", dtype, n, k, scale=k**-0.5)
    assert_parity("linear", x, weight, draw("cuda", dtype, n), draw("cuda", dtype, m, n))
    assert_parity("geglu", x, weight, draw("cuda", dtype, n))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    x, weight = draw("cuda", torch.bfloat16, 256, 5120), draw("cuda", torch.bfloat16, 1280, 5120)
    for kernel in able("linear", x, weight):
        expected = kernel.run(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel.run(x, weight)
        out.zero_()
        graph.replay()
        assert torch.allclose(out, expected, rtol=0.02, atol=0.02), kernel.name
