"""silu: x / (1 + exp(-x)).  axpby: a x + b y.  frame_to_model, model_to_frame: uint8 <-> [-1, 1].

Algorithm: dense tensors as flat arrays in the order of memory, one element at a time; uint8
    [B, H, W, 3] and channels-last [B, 3, H, W] have the same order. On a CPU the loop is split over
    Numba's threads and vectorised by LLVM; on CUDA a thread takes one element.
Bound by: memory on CUDA; on a CPU the exponential of silu, memory otherwise.
"""

import functools
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from mirage_hello.kernels.layout import flat, in_order_of
from mirage_hello.kernels.numba import scalars

# numpy's error model: 0/0 is NaN. Python's would test every divisor and stop vectorisation.
njit = numba.njit(error_model="numpy")


@functools.cache
def unary_kernel(op: str, source: torch.dtype, target: torch.dtype) -> Callable:
    """The compiled loop out[i] = op(x[i]); types are compiled at its first call."""
    element = scalars.unary(njit, op, source, target)

    @numba.njit(parallel=True, error_model="numpy")
    def kernel(x, out):
        for i in numba.prange(x.size):
            out[i] = element(x[i])

    return _in_torchs_threads(kernel)


@functools.cache
def axpby_kernel(dtype: torch.dtype, a_per_sample: bool, b_per_sample: bool) -> Callable:
    """The compiled loop out[i] = a x[i] + b y[i]."""
    element = scalars.combination(njit, dtype, a_per_sample, b_per_sample)

    @numba.njit(parallel=True, error_model="numpy")
    def kernel(a, x, b, y, out, sample_numel):
        for i in numba.prange(x.size):
            out[i] = element(a, x[i], b, y[i], i // sample_numel)

    return _in_torchs_threads(kernel)


def _in_torchs_threads(kernel: Callable) -> Callable:
    """Numba sets OpenMP's thread count of the thread that calls it, which torch shares: with
    another count torch's own sums would have other last bits from then on."""

    @functools.wraps(kernel)
    def run(*args):
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        kernel(*args)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    return run


def stored(x: Tensor) -> Tensor:
    """Flat elements as Numba sees them: the two-byte floats by their bits."""
    return flat(x).view(torch.uint16) if x.element_size() == 2 else flat(x)


def _unary(op: str, x: Tensor, out: Tensor) -> None:
    if x.numel() == 0:
        return
    if x.is_cuda:
        from mirage_hello.kernels.numba import elementwise_cuda

        elementwise_cuda.launch_unary(op, x, out)
    else:
        unary_kernel(op, x.dtype, out.dtype)(stored(x).numpy(), stored(out).numpy())


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)).

    Args:
        x: any shape, dense, CPU or CUDA; float32, float16 or bfloat16.

    Returns:
        x's shape, dtype and layout.
    """
    out = torch.empty_like(x)
    _unary("silu", in_order_of(x, out), out)
    return out


def axpby(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a x + b y.

    Args:
        a, b: a float, or float32 [B], one value for each sample of x.
        x, y: [B, ...], one shape and dtype, dense with the batch outermost; float32, float16 or
            bfloat16.

    Returns:
        x's shape, dtype and layout.

    Numerics: float32, one rounding to x's dtype at the end.
    """
    out = torch.empty_like(x)
    x, y = in_order_of(x, out), in_order_of(y, out)
    if x.numel() == 0:
        return out
    if x.is_cuda:
        from mirage_hello.kernels.numba import elementwise_cuda

        elementwise_cuda.launch_axpby(a, x, b, y, out)
        return out
    a_value, b_value = (
        c.detach().contiguous().numpy() if isinstance(c, Tensor) else np.float32(c) for c in (a, b)
    )
    kernel = axpby_kernel(x.dtype, isinstance(a, Tensor), isinstance(b, Tensor))
    arrays = [stored(t).numpy() for t in (x, y, out)]
    kernel(a_value, arrays[0], b_value, arrays[1], arrays[2], sample_numel(a, x, b))
    return out


def sample_numel(a: float | Tensor, x: Tensor, b: float | Tensor) -> int:
    """Elements that share their coefficients: of one sample, or all where both are floats."""
    per_sample = isinstance(a, Tensor) or isinstance(b, Tensor)
    return x.numel() // x.shape[0] if per_sample else x.numel()


def frame_to_model(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / 127.5 - 1.

    Args:
        frames: uint8 [B, H, W, 3].
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [B, 3, H, W], channels-last, in [-1, 1].
    """
    frames = frames.contiguous()
    out = torch.empty(frames.shape, dtype=dtype, device=frames.device)
    _unary("frame_to_model", frames, out)
    return out.permute(0, 3, 1, 2)


def model_to_frame(x: Tensor) -> Tensor:
    """clamp(round((x + 1) * 127.5), 0, 255), halves to the even neighbour; NaN gives 0.

    Args:
        x: [B, 3, H, W], read fastest when channels-last; float32, float16 or bfloat16.

    Returns:
        uint8 [B, H, W, 3], contiguous.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _unary("model_to_frame", x, out)
    return out
