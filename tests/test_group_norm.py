"""group_norm, group_norm_silu: parity of every backend and of every plan, properties, PTX."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from every_backend import PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from mirage_hello.kernels import explain, group_norm_launch, ops, parity
from mirage_hello.kernels import group_norm as page
from mirage_hello.kernels.group_norm_plan import Shape, plan, plans
from mirage_hello.ptx import assembler

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = ["group_norm", "group_norm_silu"]
CPU_BACKENDS = {"torch", "ptx-emulated"}
CUDA_BACKENDS = {"torch", "triton", "cuda", "ptx"}
# channels, groups, spatial: odd widths of a group, odd channels, one group, one channel a group,
# one pixel, more pixels than a block has lanes.
SHAPES = [
    (40, 4, (9, 7)),
    (30, 3, (16, 16)),
    (33, 33, (5, 5)),
    (35, 7, (3, 11)),
    (64, 1, (8, 8)),
    (35, 1, (4, 4)),
    (6, 2, (1, 1)),
    (128, 32, (13, 10)),
    (12, 4, (127,)),
    (8, 2, (129,)),
    (16, 8, (4, 3, 5)),
    (320, 32, (1, 3)),
]
# (channels, edge) with 32 groups: what a Stable Diffusion U-Net and its autoencoder ask for.
UNET = [(320, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (2560, 16), (1280, 8), (128, 512)]


def able(op, *args, **kwargs):
    """The kernels that take the call, the emulated PTX too."""
    call = getattr(ops, op).describe(args, kwargs)
    return [k for k in getattr(ops, op).kernels if k.refuses(call) is None]


def assert_parity(op, x, *args, but=(), **kwargs):
    kernels = able(op, x, *args, **kwargs)
    expected = CPU_BACKENDS if x.device.type == "cpu" else CUDA_BACKENDS
    assert expected <= {k.backend for k in kernels}, explain(op, x, *args, **kwargs)
    for kernel in (k for k in kernels if k.backend not in but):
        result = parity.compare(op, kernel, (x, *args), kwargs)
        assert result.passed, f"{kernel.name}: {result}"


def draw(device, dtype, *shape, mean=0.0, std=1.0):
    return (mean + torch.randn(shape, device=device) * std).to(dtype)


def layouts(x):
    """The tensor contiguous, and with its channels last."""
    yield x.contiguous()
    order = (0, *range(2, x.dim()), 1)
    back = (0, x.dim() - 1, *range(1, x.dim() - 1))
    yield x.permute(order).contiguous().permute(back)


# The PTX files


def rendered(op, shape, chosen, dtype):
    """Text of the PTX that the page would launch for a plan."""
    return page.ptx_program(op, shape, chosen, dtype).text


def resources(text, arch):
    _, report = assembler.ptxas(text, arch, ("-v",), "group_norm")
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report
    assert "warning" not in report, report
    return max(map(int, re.findall(r"Used (\d+) registers", report)))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("channels", "edge"), UNET)
def test_ptx_of_the_unet_assembles_within_its_budget(channels, edge, channels_last):
    for dtype, clusters in ((torch.bfloat16, True), (torch.float32, False)):
        shape = Shape(1, channels, edge * edge, 32, dtype.itemsize, channels_last)
        shape = replace(shape, clusters=clusters)
        text = rendered("group_norm_silu", shape, plan(shape), dtype)
        assert text.isascii()
        budget = int(re.search(r"// Budget +registers <= (\d+)", text)[1])
        for arch in ("sm_90a", "sm_100a") if clusters else ("sm_80", "sm_90a", "sm_100a"):
            assert resources(text, arch) <= budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "groups", "spatial"), SHAPES)
def test_ptx_of_odd_shapes_does_not_spill(channels, groups, spatial, dtype):
    pixels = torch.Size(spatial).numel()
    for channels_last in (True, False):
        shape = Shape(2, channels, pixels, groups, dtype.itemsize, channels_last, clusters=False)
        for passes in (1, 2):
            chosen = next(p for p in plans(shape) if p.passes == passes)
            resources(rendered("group_norm", shape, chosen, dtype), "sm_80")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_cuda_source_compiles(channels_last, dtype, arch):
    clusters = arch != "sm_80"
    shape = Shape(1, 320, 1024, 32, dtype.itemsize, channels_last, clusters=clusters)
    for p in (plan(shape, in_shared=False), next(p for p in plans(shape) if p.passes == 2)):
        assert page.cuda_program("group_norm_silu", shape, p, dtype).compile(arch)


# Parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "groups", "spatial"), SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_parity(op, channels, groups, spatial, dtype, device):
    weight, bias = (draw(device, dtype, channels) for _ in range(2))
    for x in layouts(draw(device, dtype, 2, channels, *spatial)):
        if x[0].numel() // groups > 1:
            assert_parity(op, x, groups, weight, bias)
            assert_parity(op, x, groups, None, bias, eps=1e-3)
        for kernel in able(op, x, groups):
            assert kernel.run(x, groups).stride() == x.stride(), kernel.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "extra", "groups", "spatial"),
    [(320, 160, 32, (9, 7)), (24, 16, 5, (16, 16)), (40, 8, 3, (127,)), (7, 5, 3, (4, 5))],
)
def test_parity_with_a_skip(channels, extra, groups, spatial, dtype, device):
    """The PTX reads both tensors, also where a group lies in both; the others decline."""
    x, skip = (
        draw(device, dtype, 2, c, *spatial, mean=mean)
        for c, mean in ((channels, 3.0), (extra, -1.0))
    )
    weight, bias = (draw(device, dtype, channels + extra) for _ in range(2))
    for layout in (0, 1):
        a, b = (list(layouts(t))[layout] for t in (x, skip))
        kernels = able("group_norm_silu", a, groups, weight, bias, skip=b)
        is_cpu = device.type == "cpu"
        expected = {"torch"} | ({"ptx-emulated" if is_cpu else "ptx"} if layout else set())
        assert {k.backend for k in kernels} == expected
        for kernel in kernels:
            args = (a, groups, weight, bias, 1e-5, b)
            result = parity.compare("group_norm_silu", kernel, args)
            assert result.passed, f"{kernel.name}: {result}"
            out = kernel.run(*args)
            if layout and out.dim() == 4:
                assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plan_reads_a_skip(dtype, device):
    x, skip = (list(layouts(draw(device, dtype, 2, c, 9, 9)))[1] for c in (24, 16))
    weight, bias = (draw(device, dtype, 40) for _ in range(2))
    shape = page.shape_of(x, 4, 16, clusters=True, skip=skip)
    args = (x, 4, weight, bias, 1e-5, skip)
    truth = ops.group_norm_silu.reference(*parity.in_float64(args))
    plain = ops.group_norm_silu.torch_kernel.run(*args)
    for p in few_plans(shape):
        out = torch.full_like(plain, float("nan"))
        tensors = (x, skip, weight, bias, out)
        page.launch(page.ptx_program, "group_norm_silu", shape, p, tensors, 1e-5)
        result = parity.judge(out, plain, truth)
        assert result.passed, f"{p}: {result}"


def few_plans(shape):
    """One plan for each kernel, cluster, access width and slab, with the most vectors a thread."""
    chosen = {}
    for p in plans(shape):
        key = (p.passes, p.cluster, p.elements, p.slab_groups, p.staging)
        if key not in chosen or p.vecs > chosen[key].vecs:
            chosen[key] = p
    return list(chosen.values())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "groups", "edge"), [(40, 4, 9), (24, 3, 16), (20, 4, 5), (48, 8, 12)]
)
def test_every_plan_computes_the_same_function(
    channels, groups, edge, dtype, channels_last, device
):
    """Clusters of 1 to 8, one and two passes, in the emulator and on a GPU."""
    x = draw(device, dtype, 2, channels, edge, edge)
    x = next(itertools.islice(layouts(x), int(channels_last), None))
    weight, bias = (draw(device, dtype, channels) for _ in range(2))
    shape = page.shape_of(x, groups, 16, clusters=True)
    truth = ops.group_norm_silu.reference(*parity.in_float64((x, groups, weight, bias)))
    plain = ops.group_norm_silu.torch_kernel.run(x, groups, weight, bias)
    for p in few_plans(shape):
        has_cuda = device.type == "cuda" and p.staging == "registers"
        for program in [page.ptx_program] + [page.cuda_program] * has_cuda:
            out = torch.full_like(x, float("nan"))
            page.launch(program, "group_norm_silu", shape, p, (x, weight, bias, out), 1e-5)
            result = parity.judge(out, plain, truth)
            assert result.passed, f"{program.__name__} {p}: {result}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 4])
def test_parity_on_pointers_that_are_not_16_byte_aligned(shift, dtype, device):
    memory = draw(device, dtype, 2 * 40 * 63 + 8)
    x = memory[shift : shift + 2 * 40 * 63].reshape(2, 9, 7, 40).permute(0, 3, 1, 2)
    assert_parity("group_norm_silu", x, 4, draw(device, dtype, 41)[1:])
    assert_parity("group_norm", x.reshape(2, 40, 63).contiguous(), 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_robust_where_the_mean_is_far_above_the_spread(dtype, device):
    """E[x^2] - E[x]^2 in float32 has no digit left at 1000 +- 0.1: PyTorch on a CPU fails."""
    std = {torch.float32: 0.1, torch.float16: 10.0, torch.bfloat16: 100.0}[dtype]
    for x in layouts(draw(device, dtype, 2, 40, 9, 7, mean=1000.0, std=std)):
        assert_parity("group_norm", x, 4, but=["torch"])
        outlier = x.clone(memory_format=torch.preserve_format)
        outlier[:, :, 0] = 0  # the first samples, which sums are measured from, are the odd ones
        assert_parity("group_norm", outlier, 4, but=["torch"])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1e-4), (0.0, 1e15), (3.0, 0.0), (1e-30, 1e-30)])
def test_extreme_spreads(mean, std, device):
    for x in layouts(draw(device, torch.float32, 2, 20, 6, 6, mean=mean, std=std)):
        assert_parity("group_norm", x, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_values_fill_their_group_only(value, device):
    for x in layouts(draw(device, torch.float32, 2, 12, 5, 5)):
        x[1, 4, 2, 3] = value
        for kernel in able("group_norm_silu", x, 3):
            out = kernel.run(x, 3)
            assert out[1, 4:8].isnan().all(), kernel.name
            rest = torch.cat([out[0].flatten(), out[1, :4].flatten(), out[1, 8:].flatten()])
            assert torch.isfinite(rest).all(), kernel.name


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (0, 8)])
def test_empty_tensors(shape, device):
    x = torch.empty(shape, device=device)
    for kernel in able("group_norm_silu", x, 4):
        assert kernel.run(x, 4).shape == shape, kernel.name


@PROPERTY
@given(
    st.sampled_from([(8, 2), (12, 4), (20, 1), (33, 3)]),
    st.integers(8, 60),
    st.floats(-50, 50, width=16),
    st.floats(0.25, 50, width=16),
)
def test_groups_have_mean_0_and_variance_1(device, channels_groups, pixels, mean, std):
    channels, groups = channels_groups
    for x in layouts(draw(device, torch.float32, 2, channels, pixels, mean=mean, std=std)):
        for kernel in able("group_norm", x, groups, eps=0.0):
            out = kernel.run(x, groups, eps=0.0).double().reshape(2, groups, -1)
            assert out.mean(-1).abs().max() < 1e-3, kernel.name
            assert (out.var(-1, unbiased=False) - 1).abs().max() < 1e-3, kernel.name


def test_results_repeat_bit_for_bit(device):
    """Partial sums merge in a fixed order: no atomics."""
    for x in layouts(draw(device, torch.bfloat16, 2, 64, 40, 40)):
        for kernel in able("group_norm_silu", x, 32):
            if kernel.backend in ("ptx", "ptx-emulated", "cuda"):
                assert torch.equal(kernel.run(x, 32), kernel.run(x, 32)), kernel.name


# The plan


@pytest.mark.parametrize(("channels", "edge"), UNET)
def test_plans_fill_the_machine_and_fit_on_it(channels, edge):
    shape = Shape(1, channels, edge * edge, 32, 2, channels_last=True)
    for p in plans(shape):
        assert p.threads % 32 == 0 and 32 <= p.threads <= 1024, p
        assert shape.groups % p.slab_groups == 0, p
        assert p.columns * p.elements >= p.slab_groups * shape.group_channels, p
        assert shape.group_channels % p.segment == 0 and p.elements % p.segment == 0, p
        if p.passes == 1:
            assert p.lanes * p.vecs >= p.block_units(shape), p
    assert plan(shape).passes == (2 if edge == 512 else 1)


def test_magic_numbers_divide():
    for width in (1, 2, 3, 5, 10, 30, 60, 80, 1000):
        for channel in (0, 1, width - 1, width, 8191):
            assert (
                channel * group_norm_launch.nhwc_magic(width) >> group_norm_launch.NHWC_SHIFT
                == channel // width
            )


# What is refused, and the sentence


def test_gaps_are_refused_with_the_reason():
    x = torch.randn(2, 8, 6, 6)[:, :, ::2]
    assert "needs x channels_last or contiguous" in str(explain("group_norm", x, 2))
    weight = torch.ones(16)[::2]
    assert "needs weight contiguous" in str(explain("group_norm", torch.randn(2, 8, 3), 2, weight))
    assert torch.isfinite(ops.group_norm(x, 2)).all()


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (
            (torch.zeros(1, 130, 4), 32),
            ValueError,
            r"C must be a multiple of groups \(got C=130, groups=32\); pad C",
        ),
        ((torch.zeros(1, 8, 4), 0), ValueError, "C must be a multiple of groups"),
        ((torch.zeros(8), 2), ValueError, r"x must be \[B, C, \*spatial\] \(got \(8,\)\)"),
        ((torch.zeros(1, 8, 4), 2, torch.ones(4)), ValueError, r"weight must be \[C\] = \(8,\)"),
        ((torch.zeros(1, 8, 4), 2.0), TypeError, "groups must be an int"),
        ((torch.zeros(1, 8, 4), 2, torch.ones(8).half()), TypeError, "weight must have x's dtype"),
        ((torch.zeros(1, 8, 4).int(), 2), TypeError, "x must be floating"),
        ((torch.zeros(1, 8, 4), 2, None, None, -1.0), ValueError, "eps must not be negative"),
    ],
)
def test_bad_input(args, error, text):
    with pytest.raises(error, match=f"group_norm_silu: {text}"):
        ops.group_norm_silu(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["ptx", "cuda"])
@pytest.mark.parametrize(("channels", "edge"), UNET)
def test_unet_shapes_in_a_graph(channels, edge, backend):
    """As the model runs them: channels_last bfloat16, captured, replayed on other data."""
    x = draw("cuda", torch.bfloat16, 1, channels, edge, edge)
    x = x.to(memory_format=torch.channels_last)
    weight, bias = (draw("cuda", torch.bfloat16, channels) for _ in range(2))
    kernel = next(k for k in ops.group_norm_silu.kernels if k.backend == backend)
    kernel.run(x, 32, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.run(x, 32, weight, bias)
    x.copy_(torch.randn_like(x) * 2 + 1)
    graph.replay()
    truth = ops.group_norm_silu.reference(*parity.in_float64((x, 32, weight, bias)))
    plain = ops.group_norm_silu.torch_kernel.run(x, 32, weight, bias)
    assert parity.judge(out, plain, truth).passed
