"""conv2d: parity over backends, dtypes, windows, strides, layouts, epilogues, extreme values."""

import pytest
import torch
from every_backend import PROPERTY, able, assert_parity, outputs
from hypothesis import given
from hypothesis import strategies as st

from mirage_hello.kernels import ops
from mirage_hello.reference import sides

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, C, H, W, O, window, stride, padding
CASES = [
    (1, 1, 1, 1, 1, 1, 1, 0),
    (2, 5, 7, 6, 9, 3, 1, 1),
    (1, 32, 9, 5, 33, 3, 2, 1),
    (1, 17, 4, 4, 130, 1, 1, 0),
    (1, 4, 11, 12, 20, 3, 1, 1),
    (1, 40, 6, 6, 3, 3, 1, 0),
    (2, 3, 9, 9, 4, 5, 2, 2),
    (1, 80, 2, 2, 16, 3, 1, 1),
    (1, 8, 8, 6, 16, 3, 2, (0, 1)),
    (2, 16, 5, 9, 24, 3, 1, (2, 0)),
]


def draw(device, dtype, *shape, layout=torch.channels_last, scale=1.0):
    values = (torch.randn(shape, device=device) * scale).to(dtype)
    return values.contiguous(memory_format=layout) if len(shape) == 4 else values


def inputs(device, dtype, case, layout=torch.channels_last):
    b, c, h, w, o, window, stride, padding = case
    x = draw(device, dtype, b, c, h, w, layout=layout)
    fan_in = c * window * window
    weight = draw(device, dtype, o, c, window, window, layout=layout, scale=fan_in**-0.5)
    around = sum(sides(padding))
    size = [(n + around - window) // stride + 1 for n in (h, w)]
    return x, weight, {"stride": stride, "padding": padding}, (b, o, *size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_whole_epilogue(case, dtype, device):
    x, weight, options, size = inputs(device, dtype, case)
    bias, channel_bias = draw(device, dtype, size[1]), draw(device, dtype, *size[:2])
    residual = draw(device, dtype, *size)
    assert_parity(
        "conv2d", x, weight, bias, channel_bias=channel_bias, residual=residual, **options
    )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("given", [(), ("bias",), ("channel_bias",), ("residual",)])
def test_parity_with_each_part_of_the_epilogue(given, layout, device):
    x, weight, options, size = inputs(device, torch.float32, CASES[1], layout)
    every = {"bias": size[1:2], "channel_bias": size[:2], "residual": size}
    extra = {name: draw(device, torch.float32, *every[name], layout=layout) for name in given}
    assert_parity("conv2d", x, weight, **extra, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_on_views(dtype, device):
    """A crop of an image, a slice of its channels, a residual and weight in the other layout."""
    x = draw(device, dtype, 2, 12, 9, 10)[:, 2:9, 1:8, 2:9]
    weight = draw(device, dtype, 6, 7, 3, 3, layout=torch.contiguous_format, scale=0.1)
    residual = draw(device, dtype, 2, 6, 7, 7, layout=torch.contiguous_format)
    channel_bias = draw(device, dtype, 6, 2).t()
    assert_parity("conv2d", x, weight, padding=1, channel_bias=channel_bias, residual=residual)


def test_empty(device):
    x, weight = draw(device, torch.float32, 0, 3, 5, 5), draw(device, torch.float32, 4, 3, 3, 3)
    assert_parity("conv2d", x, weight, padding=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_extreme_values_reach_only_their_window(value, device):
    x, weight, options, _ = inputs(device, torch.float32, CASES[1])
    x[0, 2, 3, 3] = value
    assert_parity("conv2d", x, weight, **options)
    for name, out in outputs("conv2d", x, weight, **options):
        assert torch.isfinite(out[1]).all(), name
        assert torch.isfinite(out[0, :, 0]).all(), name


@PROPERTY
@given(st.floats(-4, 4, width=16), st.floats(-4, 4, width=16), st.integers(1, 20))
def test_convolution_is_linear(device, a, b, channels):
    case = (1, channels, 5, 6, 7, 3, 1, 1)
    x, weight, options, _ = inputs(device, torch.float32, case)
    y = torch.randn_like(x)
    sums = dict(outputs("conv2d", a * x + b * y, weight, **options))
    for (name, of_x), (_, of_y) in zip(
        outputs("conv2d", x, weight, **options),
        outputs("conv2d", y, weight, **options),
        strict=True,
    ):
        assert torch.allclose(sums[name], a * of_x + b * of_y, rtol=1e-4, atol=1e-4), name


def test_output_layout_follows_x(device):
    for layout in (torch.channels_last, torch.contiguous_format):
        x, weight, options, _ = inputs(device, torch.float32, CASES[1], layout)
        for name, out in outputs("conv2d", x, weight, **options):
            assert out.is_contiguous(memory_format=layout), name


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": (4, 2, 3, 3)}, ValueError, r"got x C=3, weight C=2"),
        ({"weight": (0, 3, 3, 3)}, ValueError, r"weight must have channels"),
        ({"bias": (5,)}, ValueError, r"bias must be \[O\] = \(4,\) \(got \(5,\)\)"),
        ({"channel_bias": (1, 4)}, ValueError, r"channel_bias must be \[B, O\] = \(2, 4\)"),
        ({"residual": (2, 4, 5, 5)}, ValueError, r"residual must be .* = \(2, 4, 3, 3\)"),
        ({"weight": (4, 3, 7, 7)}, ValueError, r"a 7x7 window must fit the padded image"),
        ({"x": (3, 5, 5)}, ValueError, r"x must be \[B, C, H, W\]"),
        ({"stride": 0}, ValueError, r"stride must be at least 1 \(got 0\)"),
        ({"stride": (1, 1)}, TypeError, r"stride must be an int"),
        ({"padding": -1}, ValueError, r"padding must be at least 0"),
        ({"padding": (0, -1)}, ValueError, r"padding must be at least 0"),
        ({"padding": (1, 1, 1)}, TypeError, r"padding must be an int, or a tuple"),
        ({"padding": [0, 1]}, TypeError, r"\(before, after\) for both axes \(got \[0, 1\]\)"),
    ],
)
def test_bad_input(change, error, text):
    values = {"x": (2, 3, 5, 5), "weight": (4, 3, 3, 3), **change}
    options = {
        name: torch.zeros(v) if isinstance(v, tuple) and name not in ("stride", "padding") else v
        for name, v in values.items()
    }
    with pytest.raises(error, match=text):
        ops.conv2d(**options)


def test_gradients_of_the_torch_backend():
    """The additions are in place: autograd must still see them."""
    shapes = [(1, 2, 4, 4), (3, 2, 3, 3), (3,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    extra = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(1, 3), (1, 3, 4, 4)]
    ]

    def run(x, weight, bias, channel_bias, residual):
        return ops.conv2d(x, weight, bias, 1, 1, channel_bias, residual)

    assert torch.autograd.gradcheck(run, (*tensors, *extra))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "out_channels", "size"),
    [(320, 320, 64), (960, 320, 64), (1280, 1280, 16), (1280, 1280, 8), (320, 4, 64), (128, 3, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parity_on_the_shapes_of_the_model(channels, out_channels, size, dtype):
    case = (1, channels, size, size, out_channels, 3, 1, 1)
    x, weight, options, shape = inputs("cuda", dtype, case)
    bias, residual = draw("cuda", dtype, out_channels), draw("cuda", dtype, *shape)
    assert_parity("conv2d", x, weight, bias, residual=residual, **options)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """2^31 + 2^21 elements in, 4.3 GB: the last rows lie past what 32 bits reach."""
    x = torch.randn(1, 64, 5800, 5800, device="cuda", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = draw("cuda", torch.float16, 16, 64, 3, 3, scale=0.04)
    for kernel in able("conv2d", x, weight, padding=1):
        if kernel.backend == "torch":
            continue
        out = kernel.run(x, weight, padding=1)
        expected = torch.nn.functional.conv2d(x[:, :, -40:], weight, padding=1)
        assert torch.allclose(out[:, :, -30:], expected[:, :, -30:], atol=0.02), kernel.name


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    """With split K, whose partial sums are allocated inside the capture."""
    x, weight, options, _ = inputs("cuda", torch.bfloat16, (1, 1280, 8, 8, 1280, 3, 1, 1))
    for kernel in able("conv2d", x, weight, **options):
        expected = kernel.run(x, weight, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel.run(x, weight, **options)
        out.zero_()
        graph.replay()
        assert torch.allclose(out, expected, rtol=0.02, atol=0.02), kernel.name
