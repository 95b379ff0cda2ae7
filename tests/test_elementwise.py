"""silu, the linear combinations, frame conversion: parity of every backend, layouts, edges, PTX."""

import re

import pytest
import torch
from every_backend import PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from mirage_hello.kernels import elementwise, explain, ops, parity
from mirage_hello.kernels.elementwise import COMBINATIONS
from mirage_hello.ptx import assembler

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ARCHS = ["sm_80", "sm_90a", "sm_100a"]
PTX_FILES = ["silu", "axpby", "frame"]
# Whole pieces of a block, one more, one less, less than a vector.
SIZES = [2, 3, 127, 129, 1024, 2047, 4099]
OPS = ["silu", *COMBINATIONS]
COEFFICIENTS = {"a": 0.75, "b": -1.5, "alpha": 0.6, "sigma": 0.8, "sigma_next": 0.5}
COEFFICIENTS |= {"alpha_bar": 0.4, "alpha_bar_next": 0.7, "scale": 7.5}
CPU_BACKENDS = {"torch", "numba", "ptx-emulated"}
CUDA_BACKENDS = {"torch", "triton", "cuda", "ptx"}


def able(op, *args, **kwargs):
    """The kernels that take the call, the emulated PTX too: elementwise it is quick."""
    call = getattr(ops, op).describe(args, kwargs)
    return [k for k in getattr(ops, op).kernels if k.refuses(call) is None]


def assert_parity(op, *args, **kwargs):
    kernels = able(op, *args, **kwargs)
    expected = (
        CPU_BACKENDS if args[0 if op != "axpby" else 1].device.type == "cpu" else CUDA_BACKENDS
    )
    assert expected <= {k.backend for k in kernels}, explain(op, *args, **kwargs)
    for kernel in kernels:
        result = parity.compare(op, kernel, args, kwargs)
        assert result.passed, f"{kernel.name}: {result}"


def arguments(op, x, y, **coefficients):
    """The op's arguments in its own order."""
    if op == "silu":
        return (x,)
    operands, names = COMBINATIONS[op]
    values = dict(zip(operands, (x, y), strict=True)) | COEFFICIENTS | coefficients
    order = ("a", "x", "b", "y") if op == "axpby" else (*operands, *names)
    return tuple(values[name] for name in order)


def draw(device, dtype, *shape, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype)


# The PTX files


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", PTX_FILES)
def test_ptx_assembles_within_its_budget(name, dtype, arch):
    text = assembler.render(name, dtype=dtype, OVERLAP=arch != "sm_80")
    assert text.isascii()
    budget = int(re.search(r"// Budget +registers <= (\d+), shared 0, spills 0", text)[1])
    _, report = assembler.ptxas(text, arch, ("-v",), name)
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= budget, report
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report
    assert "smem" not in report and "warning" not in report, report


@pytest.mark.parametrize(("threads", "vecs"), [(128, 1), (128, 4), (256, 2), (512, 1), (1024, 2)])
@pytest.mark.parametrize("name", ["silu", "axpby"])
def test_ptx_variants_of_the_sweep_do_not_spill(name, threads, vecs):
    hints = {"LOAD": ".nc", "STORE": ".cs"}
    text = assembler.render(name, dtype="bf16", THREADS=threads, VECS=vecs, OVERLAP=True, **hints)
    _, report = assembler.ptxas(text, "sm_90a", ("-v",), name)
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_compiles(dtype, arch):
    assert elementwise.cuda_program(torch.empty(0, dtype=dtype), 128, 1).compile(arch)


# Parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parity_over_sizes(op, dtype, device):
    for n in SIZES:
        x, y = (draw(device, dtype, n, scale=3) for _ in range(2))
        if n > 100:
            assert_parity(op, *arguments(op, x, y))
        else:
            assert_pooled_parity(op, dtype, device, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parity_of_single_elements(op, dtype, device):
    assert_pooled_parity(op, dtype, device, 1)


def assert_pooled_parity(op, dtype, device, n):
    """Tiny calls judged together: of one element, torch's own error may happen to be zero."""
    calls = [
        arguments(op, draw(device, dtype, n, scale=3), draw(device, dtype, n)) for _ in range(64)
    ]
    contract = getattr(ops, op)
    truth = torch.cat([contract.reference(*parity.in_float64(args)) for args in calls])
    plain = torch.cat([contract.torch_kernel.run(*args) for args in calls])
    for kernel in able(op, *calls[0]):
        result = parity.judge(torch.cat([kernel.run(*args) for args in calls]), plain, truth)
        assert result.passed, f"{kernel.name}: {result}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [(1, 1), (3, 3), (0, 1), (5, 2)])
@pytest.mark.parametrize("op", OPS)
def test_parity_on_pointers_that_are_not_16_byte_aligned(op, shift, dtype, device):
    x, y = (draw(device, dtype, 2060)[s : s + 2050] for s in shift)
    assert_parity(op, *arguments(op, x, y))


@pytest.mark.parametrize("op", OPS)
def test_dense_layouts_run_as_they_are(op, device):
    x, y = (draw(device, torch.float32, 2, 6, 9, 7) for _ in range(2))
    for layout in (torch.channels_last, torch.contiguous_format):
        args = arguments(op, x.to(memory_format=layout), y.to(memory_format=layout))
        assert_parity(op, *args)
        for kernel in able(op, *args):
            assert kernel.run(*args).stride() == args[op == "axpby"].stride(), kernel.name
    assert_parity(op, *arguments(op, x.permute(3, 0, 1, 2), y.permute(3, 0, 1, 2)))


@pytest.mark.parametrize("op", [op for op in COMBINATIONS if COMBINATIONS[op][1]])
def test_parity_with_a_coefficient_per_sample(op, device):
    x, y = (draw(device, torch.bfloat16, 5, 3, 43) for _ in range(2))
    names = COMBINATIONS[op][1]
    each = {n: COEFFICIENTS[n] * torch.linspace(1, 0.5, 5, device=device) for n in names}
    assert_parity(op, *arguments(op, x, y, **each))
    assert_parity(op, *arguments(op, x, y, **{names[0]: each[names[0]]}))  # float and tensor mixed


def test_empty_tensors(device):
    for op in OPS:
        for shape in [(0,), (0, 3), (2, 0, 4)]:
            x = torch.empty(shape, device=device)
            args = arguments(op, x, x)
            for kernel in able(op, *args):
                assert kernel.run(*args).shape == shape, kernel.name


# Values


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_extreme_values(dtype, device):
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), limits.max, limits.min]
    values += [limits.tiny, -limits.tiny, 88.0, -88.0, -87.3, -103.0, -200.0, 1e-3, -20.0, 20.0]
    x = torch.tensor(values, device=device).to(dtype)
    assert_parity("silu", x)
    for kernel in able("silu", x):
        out = kernel.run(x)
        assert out[2].isposinf() and out[3].isnan() and out[4].isnan(), kernel.name
        assert out[5] == limits.max and out[6] == 0, kernel.name


def test_silu_in_float32_keeps_its_relative_precision(device):
    """Where the norm would not see it: silu(-60) is 5e-25."""
    x = torch.linspace(-87, 30, 4001, device=device)
    truth = x.double() * torch.sigmoid(x.double())
    for kernel in able("silu", x):
        if kernel.backend in ("ptx", "ptx-emulated"):
            error = ((kernel.run(x).double() - truth) / truth).abs().max().item()
            assert error < 5 * 2.0**-23, f"{kernel.name}: {error / 2.0**-23:.1f} ulp"


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_go_through_axpby(dtype, device):
    x, y = (draw(device, dtype, 1000) for _ in range(2))
    x[3], y[500], x[999] = float("inf"), float("-inf"), float("nan")
    assert_parity("axpby", 2.0, x, 0.5, y)


@PROPERTY
@given(st.floats(-8, 8, width=16), st.floats(-8, 8, width=16), st.integers(1, 300))
def test_axpby_is_linear(device, a, b, n):
    """Against sums that float32 represents exactly: small integers times halves."""
    x, y = (torch.randint(-64, 64, (n,), device=device).float() for _ in range(2))
    a, b = round(a * 8) / 8, round(b * 8) / 8
    for kernel in able("axpby", a, x, b, y):
        assert torch.equal(kernel.run(a, x, b, y), a * x + b * y), kernel.name
        both = kernel.run(a, x, 0.0, y) + kernel.run(0.0, x, b, y)
        assert torch.equal(kernel.run(a, x, b, y), both), kernel.name


# Frames


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_survives_the_round_trip(dtype, device):
    frames = torch.arange(256 * 3, device=device).remainder(256).to(torch.uint8)
    frames = frames.reshape(1, 16, 16, 3)
    assert_parity("frame_to_model", frames, dtype)
    for kernel in able("frame_to_model", frames, dtype):
        x = kernel.run(frames, dtype)
        assert x.shape == (1, 3, 16, 16) and x.permute(0, 2, 3, 1).is_contiguous(), kernel.name
        assert x.min() == -1 and x.max() == 1, kernel.name
        for back in able("model_to_frame", x):
            difference = (back.run(x).int() - frames.int()).abs().max()
            # bf16 has 8 bits near 1: a level there is half a unit away from its neighbour.
            assert difference <= (dtype == torch.bfloat16), (kernel.name, back.name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 17), (33, 64)])
def test_frame_parity_over_sizes_and_layouts(size, dtype, device):
    frames = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, device=device)
    assert_parity("frame_to_model", frames, dtype)
    assert_parity("frame_to_model", frames[1:], dtype)  # any distance from a 16-byte boundary
    x = draw(device, dtype, 3, 3, *size)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_parity("model_to_frame", x.to(memory_format=layout)[1:])


def test_levels_are_clamped_and_nan_is_black(device):
    values = torch.tensor([-9.0, -1.0, 1.0, 9.0, float("inf"), float("-inf"), float("nan"), 0.0])
    x = values.to(device).repeat(3).reshape(1, 3, 2, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        for kernel in able("model_to_frame", x.to(memory_format=layout)):
            out = kernel.run(x.to(memory_format=layout))[0, :, :, 0].flatten()
            # 127.5 is a tie: the even neighbour.
            assert out.tolist() == [0, 0, 255, 255, 255, 0, 0, 128], kernel.name


# What is refused, and the sentence


def test_gaps_and_mixed_orders_are_refused_with_the_reason():
    x = torch.randn(4, 6, 8, 8)
    strided = str(explain("silu", x[:, ::2]))
    assert "needs tensors without gaps or overlap" in strided
    mixed = explain("residual_add", x, x.to(memory_format=torch.channels_last))
    assert "needs operands of one memory order" in str(mixed)
    inner = x.permute(1, 0, 2, 3)
    samples = explain("add_noise", inner, inner, torch.ones(6), 1.0)
    assert "needs samples outermost in memory" in str(samples)
    planes = explain("model_to_frame", torch.randn(1, 3, 8, 8).transpose(2, 3))
    assert "needs x channels_last or contiguous" in str(planes)
    for op, args in (("silu", (x[:, ::2],)), ("residual_add", (x, x.transpose(0, 0)))):
        assert torch.isfinite(getattr(ops, op)(*args)).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.silu(torch.zeros(3, dtype=torch.int32)), TypeError, "x must be floating"),
        (
            lambda: ops.residual_add(torch.zeros(3), torch.zeros(4)),
            ValueError,
            r"residual must have x's shape \(got \(4,\), expected \(3,\)\)",
        ),
        (
            lambda: ops.add_noise(torch.zeros(3), torch.zeros(3).half(), 1.0, 1.0),
            TypeError,
            "noise must have x's dtype",
        ),
        (
            lambda: ops.guidance(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(2)),
            ValueError,
            r"scale must be a float or have one value per sample, \[3\] \(got \(2,\)\)",
        ),
        (
            lambda: ops.axpby(torch.ones(3).half(), torch.zeros(3), 1.0, torch.zeros(3)),
            TypeError,
            "a must be a float or a float32 tensor",
        ),
        (
            lambda: ops.axpby("2", torch.zeros(3), 1.0, torch.zeros(3)),
            TypeError,
            "a must be a float or a tensor",
        ),
        (
            lambda: ops.frame_to_model(torch.zeros(1, 4, 4, 3)),
            TypeError,
            "frames must be uint8",
        ),
        (
            lambda: ops.frame_to_model(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)),
            ValueError,
            r"frames must be \[B, H, W, 3\]",
        ),
        (lambda: ops.model_to_frame(torch.zeros(1, 4, 4, 4)), ValueError, r"\[B, 3, H, W\]"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["ptx", "cuda"])
def test_large_tensors_in_a_graph(backend):
    """Beyond 2^31 bytes, and captured: 64-bit indices, torch's current stream."""
    x = torch.randn(2**29 + 5, device="cuda")
    run = next(k.run for k in ops.silu.kernels if k.backend == backend)
    run(x[:64])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    graph.replay()
    for piece in (slice(0, 4096), slice(2**29 - 4096, None)):
        truth = torch.nn.functional.silu(x[piece].double())
        assert ((out[piece].double() - truth).abs() / (truth.abs() + 1)).max() < 1e-6
