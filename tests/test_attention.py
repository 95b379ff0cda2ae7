"""attention: parity over backends, dtypes, lengths, head dimensions, layouts and extreme values."""

import pytest
import torch
from every_backend import PROPERTY, able, assert_parity, outputs
from hypothesis import given
from hypothesis import strategies as st

from mirage_hello import reference
from mirage_hello.kernels import BackendError, ops, use

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [(1, 1), (77, 77), (5, 129), (129, 127), (70, 1), (2, 16)]
HEAD_DIMS = [1, 8, 16, 33, 40, 64, 80, 128, 160, 256]


def draw(device, dtype, *shape, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_parity_over_lengths(queries, keys, dtype, device):
    q = draw(device, dtype, 1, queries, 2, 40)
    k, v = (draw(device, dtype, 1, keys, 2, 40) for _ in range(2))
    assert_parity("attention", q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_parity_over_head_dimensions(head_dim, dtype, device):
    q = draw(device, dtype, 2, 19, 1, head_dim)
    k, v = (draw(device, dtype, 2, 45, 1, head_dim) for _ in range(2))
    assert_parity("attention", q, k, v)


@pytest.mark.parametrize("scale", [None, 1.0, -0.3, 0.0])
def test_parity_over_scales(scale, device):
    q, k, v = (draw(device, torch.float32, 1, 33, 2, 24) for _ in range(3))
    assert_parity("attention", q, k, v, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_on_slices_of_fused_projections(dtype, device):
    qkv = draw(device, dtype, 2, 37, 3, 2, 40)
    assert_parity("attention", *qkv.unbind(2))
    by_batch = draw(device, dtype, 37, 2, 2, 3 * 40)
    q, k, v = (t.transpose(0, 1) for t in by_batch.chunk(3, dim=-1))
    assert_parity("attention", q, k, v)


def test_d_not_contiguous_is_refused_or_right(device):
    q, k, v = (draw(device, torch.float32, 1, 2, 16, 9).transpose(1, 3) for _ in range(3))
    assert_parity("attention", q, k, v)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
def test_empty(shape, device):
    q, k, v = (draw(device, torch.float32, *shape) for _ in range(3))
    assert_parity("attention", q, k, v)


def test_no_keys_give_zeros(device):
    q = draw(device, torch.float32, 1, 3, 2, 16)
    k = draw(device, torch.float32, 1, 0, 2, 16)
    for name, out in outputs("attention", q, k, k):
        assert torch.equal(out, torch.zeros_like(q)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_parity_with_extreme_scores(magnitude, dtype, device):
    """Scores up to 1e4 (exp of them overflows any type) and all alike."""
    q, k = (draw(device, dtype, 1, 40, 2, 40, scale=(magnitude / 6) ** 0.5) for _ in range(2))
    v = draw(device, dtype, 1, 40, 2, 40)
    assert_parity("attention", q, k, v)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nonfinite_values_propagate(which, value, device):
    tensors = {name: draw(device, torch.float32, 1, 70, 1, 40) for name in "qkv"}
    tensors[which][0, 3, 0, 5] = value
    assert_parity("attention", *tensors.values())


def test_a_block_of_masked_keys_does_not_poison_the_row(device):
    """Keys whose scores are all -inf weigh nothing; the online maximum must survive them."""
    q = torch.ones(1, 4, 1, 16, device=device)
    k, v = (draw(device, torch.float32, 1, 300, 1, 16) for _ in range(2))
    k[0, :256, 0, 0] = -float("inf")
    assert_parity("attention", q, k, v)


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 70), st.floats(-8, 8, width=16))
def test_attention_of_a_constant_is_the_constant(device, queries, keys, head_dim, value):
    """The weights of a row sum to 1."""
    q = draw(device, torch.float32, 1, queries, 1, head_dim)
    k = draw(device, torch.float32, 1, keys, 1, head_dim)
    v = torch.full_like(k, value)
    for name, out in outputs("attention", q, k, v):
        assert torch.allclose(out, torch.full_like(out, value), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": (2, 5, 3, 16)}, ValueError, r"k must be \[B, M, H, D\] = \(2, 5, 2, 16\)"),
        ({"v": (2, 6, 2, 16)}, ValueError, r"v must be .* \(got \(2, 6, 2, 16\)\); give k and v"),
        ({"q": (7, 2, 16)}, ValueError, r"q must be \[B, N, H, D\] \(got \(7, 2, 16\)\)"),
        ({"k": torch.float16}, TypeError, r"k must have q's dtype .* convert it"),
        ({"scale": "big"}, TypeError, r"scale must be a float or None \(got str\)"),
    ],
)
def test_bad_input(change, error, text):
    values = {"q": (2, 7, 2, 16), "k": (2, 5, 2, 16), "v": (2, 5, 2, 16)}
    tensors = {name: torch.zeros(shape) for name, shape in values.items()}
    for name, what in change.items():
        tensors[name] = (
            torch.zeros(what)
            if isinstance(what, tuple)
            else tensors[name].to(what)
            if isinstance(what, torch.dtype)
            else what
        )
    with pytest.raises(error, match=text):
        ops.attention(**tensors)


def test_integers_are_refused():
    q = torch.zeros(1, 2, 1, 8, dtype=torch.int32)
    with pytest.raises(TypeError, match="q must be floating"):
        ops.attention(q, q, q)


def test_gradients_of_the_torch_backend():
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_where_the_kernels_have_none(dtype, device):
    """The call goes to torch by itself, and its gradients are those of the float64 reference."""
    leaves = [draw(device, dtype, 2, n, 2, 40).requires_grad_() for n in (70, 130, 130)]
    weights = draw(device, dtype, 2, 70, 2, 40)
    (ops.attention(*leaves) * weights).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    (reference.attention(*wide) * weights.double()).sum().backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        difference = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert difference < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["triton", "ptx", "cuda", "ptx-emulated"])
def test_a_backend_without_gradients_says_so(backend, device):
    """Never silently wrong: asked for by name, it raises; without a gradient it may run."""
    q, k, v = (draw(device, torch.bfloat16, 1, 20, 1, 40) for _ in range(3))
    if backend not in {kernel.backend for kernel in able("attention", q, k, v)}:
        with use(backend), pytest.raises(BackendError, match=r"attention: backend .* cannot run"):
            ops.attention(q, k, v.requires_grad_())
        return
    with use(backend):
        ops.attention(q, k, v)
        v.requires_grad_()
        with pytest.raises(BackendError, match="has no backward pass"):
            ops.attention(q, k, v)
        with torch.no_grad():
            ops.attention(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "head_dim"),
    [(8, 4096, 4096, 40), (8, 1024, 1024, 80), (8, 256, 256, 160), (8, 4096, 77, 40)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parity_on_the_shapes_of_the_model(heads, queries, keys, head_dim, dtype):
    device = torch.device("cuda")
    q = draw(device, dtype, 2, queries, heads, head_dim)
    k, v = (draw(device, dtype, 2, keys, heads, head_dim) for _ in range(2))
    assert_parity("attention", q, k, v)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    q, k, v = (draw("cuda", torch.bfloat16, 1, 256, 4, 80) for _ in range(3))
    for kernel in able("attention", q, k, v):
        expected = kernel.run(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel.run(q, k, v)
        out.zero_()
        graph.replay()
        assert torch.allclose(out, expected, rtol=0.02, atol=0.02), kernel.name
