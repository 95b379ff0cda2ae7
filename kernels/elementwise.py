"""Elementwise ops: silu(x) = x / (1 + exp(-x)), and a x + b y under its names in diffusion.

residual_add, add_noise, euler_step, ddim_step and guidance are axpby with other coefficients
(reference/elementwise.py has the formulas), so one hand-written kernel serves all six.

Every backend but torch treats its tensors as flat memory: any dense layout will do
(channels_last too), as long as all operands have the same one. Arithmetic is float32, with one
rounding to the result's dtype at the end.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import checks
from mirage_hello.kernels.call import Call, TensorSpec
from mirage_hello.kernels.kernel import FLOATS, Kernel
from mirage_hello.kernels.registry import Op, define, register
from mirage_hello.ptx import loader
from mirage_hello.reference import elementwise as reference
from mirage_hello.reference.elementwise import Coefficient, ddim_coefficients, euler_coefficients

SUFFIX = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
CUDA_TYPE = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
MAX_GRID_Y = 65535
OTHER_BACKENDS = {"triton": ("cuda",), "cupy": ("cuda",), "numba": ("cpu", "cuda")}

# Operands and coefficients of each linear combination, in the order of its signature.
COMBINATIONS = {
    "axpby": (("x", "y"), ("a", "b")),
    "residual_add": (("x", "residual"), ()),
    "add_noise": (("x", "noise"), ("alpha", "sigma")),
    "euler_step": (("x", "denoised"), ("sigma", "sigma_next")),
    "ddim_step": (("x", "eps"), ("alpha_bar", "alpha_bar_next")),
    "guidance": (("uncond", "cond"), ("scale",)),
}


# Checks


def check_silu(values: Mapping[str, Any]) -> None:
    checks.one_floating_dtype("silu", {"x": values["x"]})


def check_combination(op: str, values: Mapping[str, Any]) -> None:
    """The two operands alike; each coefficient a number, or float32 [B]."""
    operands, coefficients = COMBINATIONS[op]
    x, y = (values[name] for name in operands)
    checks.one_floating_dtype(op, dict(zip(operands, (x, y), strict=True)))
    if x.shape != y.shape:
        raise ValueError(
            f"{op}: {operands[1]} must have {operands[0]}'s shape (got {tuple(y.shape)}, expected "
            f"{tuple(x.shape)}); expand or crop it"
        )
    for name in coefficients:
        check_coefficient(op, name, values[name], x)


def check_coefficient(op: str, name: str, value: Any, x: TensorSpec) -> None:
    """A number, or a float32 tensor with one value per sample."""
    if isinstance(value, TensorSpec):
        if value.dtype != torch.float32:
            raise TypeError(
                f"{op}: {name} must be a float or a float32 tensor (got {value.dtype}); "
                "convert it with .float()"
            )
        if value.dim != 1 or x.dim == 0 or value.shape[0] != x.shape[0]:
            batch = x.shape[0] if x.dim else "a batch dimension"
            raise ValueError(
                f"{op}: {name} must be a float or have one value per sample, [{batch}] "
                f"(got {tuple(value.shape)}); index or expand it"
            )
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a float or a tensor (got {type(value).__name__})")


def supports_flat(call: Call) -> str | None:
    """The operands must be one stretch of memory in one order, samples outermost if they matter."""
    names, coefficient_names = COMBINATIONS.get(call.op, (("x",), ()))
    operands = [call.tensors[name] for name in names]
    x = operands[0]
    if x.numel == 0:
        return None
    for t in operands:
        if not t.is_dense:
            return f"needs tensors without gaps or overlap (got strides {t.stride}); .contiguous()"
        if memory_order(t) != memory_order(x):
            return f"needs operands of one memory order (got strides {x.stride} and {t.stride})"
    per_sample = any(name in call.tensors for name in coefficient_names) and x.shape[0] > 1
    if per_sample and x.stride[0] * x.shape[0] != x.numel:
        return f"needs samples outermost in memory (got strides {x.stride}); .contiguous()"
    return None


def memory_order(x: TensorSpec) -> tuple[int, ...]:
    """Strides of the dimensions that have more than one element: the others address nothing."""
    return tuple(s for s, size in zip(x.stride, x.shape, strict=True) if size != 1)


# torch, PTX and CUDA C++; the last two share a grid


def cut(x: Tensor) -> tuple[int, int]:
    """Threads of a block, 16-byte vectors of a thread: the best of bench/sweeps/elementwise.py.

    Short blocks of little code win at 1 MiB and less and at 64 MiB and more (H200: 2.8 us at 1 MiB
    where 256 x 4 takes 3.4). In between, where x and the result stay in the L2, blocks are too
    many for their starts to hide: 16 MiB in 9.1 us with 256 x 4, 9.7 with 128 x 1.
    """
    return (256, 4) if 2**23 <= x.nbytes <= 2**25 else (128, 1)


# A source for a tensor's dtype and device, threads of a block and vectors of a thread.
Source = Callable[[Tensor, int, int], loader.Program]


@functools.cache
def overlaps(device: int) -> bool:
    """Whether a kernel may start on the device while the one before it still runs (sm_90 on).

    -1 is the CPU, where the emulator checks that nothing is touched before the wait.
    """
    return device < 0 or torch.cuda.get_device_capability(device) >= (9, 0)


def silu_torch(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def silu_with(
    program: Source, cut: Callable[[Tensor], tuple[int, int]] = cut
) -> Callable[[Tensor], Tensor]:
    def silu(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if x.numel():
            entry, n = f"silu_{SUFFIX[x.dtype]}", x.numel()
            threads, vecs = cut(x)
            grid = (blocks(n, x, threads * vecs), 1, 1)
            program(x, threads, vecs).launch(entry, grid, (threads, 1, 1), (x, out, n))
        return out

    return silu


def axpby_with(
    program: Source, cut: Callable[[Tensor], tuple[int, int]] = cut
) -> Callable[..., Tensor]:
    def axpby(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        a_each, b_each = (c.contiguous() if isinstance(c, Tensor) else None for c in (a, b))
        a, b = (0.0 if isinstance(c, Tensor) else float(c) for c in (a, b))
        samples = 1 if a_each is None and b_each is None else x.shape[0]
        n = x.numel() // samples
        threads, vecs = cut(x)
        grid = (blocks(n, x, threads * vecs), min(samples, MAX_GRID_Y), 1)
        args = (x, y, out, a_each, b_each, n, samples, a, b)
        entry = f"axpby_{SUFFIX[x.dtype]}"
        program(x, threads, vecs).launch(entry, grid, (threads, 1, 1), args)
        return out

    return axpby


def blocks(n: int, x: Tensor, block_vectors: int) -> int:
    """Blocks for n elements of x, `block_vectors` vectors of 16 bytes each."""
    return -(-n * x.element_size() // (block_vectors * 16))


# Above it the wait of each block costs more than an early start brings: silu of 1 GiB of float32
# took 632 us with it on an H200 and 500 without, in different runs.
OVERLAP_BYTES = 2**25


def ptx_program(name: str) -> Source:
    def program(x: Tensor, threads: int, vecs: int) -> loader.Program:
        overlap = overlaps(x.get_device()) and x.nbytes <= OVERLAP_BYTES
        dtype = SUFFIX[x.dtype]
        return loader.program(name, dtype=dtype, THREADS=threads, VECS=vecs, OVERLAP=overlap)

    return program


def cuda_program(x: Tensor, threads: int, vecs: int) -> loader.Program:
    defines = {"ELEMENT": CUDA_TYPE[x.dtype], "SUFFIX": SUFFIX[x.dtype]}
    sizes = {"THREADS": str(threads), "VECS": str(vecs)}
    return loader.cuda_program("elementwise", defines=defines | sizes)


def imported(backend: str, name: str) -> Callable[..., Tensor]:
    """The function of that name in kernels/<backend>/elementwise.py, imported at its first call."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        module = importlib.import_module(f"mirage_hello.kernels.{backend}.elementwise")
        return getattr(module, name)(*args, **kwargs)

    return run


# The combinations in terms of axpby


def combination(op: str, axpby: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` with the reference's signature, computed by this axpby."""

    def residual_add(x: Tensor, residual: Tensor) -> Tensor:
        return axpby(1.0, x, 1.0, residual)

    def add_noise(x: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return axpby(alpha, x, sigma, noise)

    def euler_step(
        x: Tensor, denoised: Tensor, sigma: Coefficient, sigma_next: Coefficient
    ) -> Tensor:
        a, b = euler_coefficients(sigma, sigma_next)
        return axpby(a, x, b, denoised)

    def ddim_step(
        x: Tensor, eps: Tensor, alpha_bar: Coefficient, alpha_bar_next: Coefficient
    ) -> Tensor:
        a, b = ddim_coefficients(alpha_bar, alpha_bar_next)
        return axpby(a, x, b, eps)

    def guidance(uncond: Tensor, cond: Tensor, scale: Coefficient) -> Tensor:
        return axpby(1 - scale, uncond, scale, cond)

    named = (residual_add, add_noise, euler_step, ddim_step, guidance)
    return ({"axpby": axpby} | {run.__name__: run for run in named})[op]


# Contracts


def silu_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    shapes = [(2, 3, 5, 7), (1000,)]
    return [((4 * torch.randn(s, device=device, dtype=dtype),), {}) for s in shapes]


def combination_samples(op: str) -> Callable[..., list[tuple[tuple, dict]]]:
    """Float coefficients, and one per sample (inside (0, 1), as alpha_bar must be)."""
    names = COMBINATIONS[op][1]

    def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
        def pair(*shape: int) -> list[Tensor]:
            return [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]

        def each(value: float) -> Tensor:
            return torch.linspace(value, value / 2, 3, device=device)

        values: dict[str, Any] = dict(zip(names, (0.8, 0.3), strict=False))
        cases = [(pair(2, 3, 5, 7), values)]
        if names:
            cases.append((pair(3, 1, 43), {n: each(v) for n, v in values.items()}))
        return [(tuple(in_order(op, p, c)), {}) for p, c in cases]

    return samples


def in_order(op: str, operands: list[Tensor], coefficients: dict[str, Any]) -> list[Any]:
    """The arguments in the order of the op's signature."""
    values = dict(zip(COMBINATIONS[op][0], operands, strict=True)) | coefficients
    order = ("a", "x", "b", "y") if op == "axpby" else tuple(values)
    return [values[name] for name in order]


define(Op("silu", reference.silu, check_silu, silu_samples))
for _op in COMBINATIONS:

    def _check(values: Mapping[str, Any], op: str = _op) -> None:
        check_combination(op, values)

    define(Op(_op, getattr(reference, _op), _check, combination_samples(_op)))


# Registrations


def _register(op: str, backend: str, run: Callable[..., Tensor], **options: Any) -> None:
    register(Kernel(op, backend, run, **options))


TORCH = {"devices": ("cpu", "cuda"), "dtypes": (*FLOATS, torch.float64), "differentiable": True}
PTX = {"supports": supports_flat, "arch": "sm_80"}
CUDA = {"supports": supports_flat, "arch": "sm_80", "source": "kernels/cuda/elementwise.cu"}

_register("silu", "torch", silu_torch, **TORCH)
_register("silu", "ptx", silu_with(ptx_program("silu")), source="ptx/silu.ptx.j2", **PTX)
_register("silu", "cuda", silu_with(cuda_program), **CUDA)
for _op in COMBINATIONS:
    _ptx = combination(_op, axpby_with(ptx_program("axpby")))
    _register(_op, "torch", getattr(reference, _op), source="reference/elementwise.py", **TORCH)
    _register(_op, "ptx", _ptx, source="ptx/axpby.ptx.j2", **PTX)
    _register(_op, "cuda", combination(_op, axpby_with(cuda_program)), **CUDA)
for _backend, _devices in OTHER_BACKENDS.items():
    _options = {"source": f"kernels/{_backend}/elementwise.py", "devices": _devices}
    _register("silu", _backend, imported(_backend, "silu"), supports=supports_flat, **_options)
    for _op in COMBINATIONS:
        _run = combination(_op, imported(_backend, "axpby"))
        _register(_op, _backend, _run, supports=supports_flat, **_options)
