"""The CUDA half of elementwise.py: kernels, and their launch on torch's current stream.

Algorithm: a thread takes one element; neighbours take neighbours, so every access is coalesced.
Tensors pass through `__cuda_array_interface__` without a copy. Numba uses the primary context,
which is torch's, so a stream of torch is a stream of Numba.
Bound by: memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from mirage_hello.kernels.numba import scalars
from mirage_hello.kernels.numba.elementwise import sample_numel, stored

THREADS = 256
device_jit = cuda.jit(device=True)


@functools.cache
def unary_kernel(op: str, source: torch.dtype, target: torch.dtype) -> Callable:
    """The kernel out[i] = op(x[i]); types are compiled at its first launch."""
    element = scalars.unary(device_jit, op, source, target)

    @cuda.jit
    def kernel(x, out):
        i = cuda.grid(1)
        if i < x.size:
            out[i] = element(x[i])

    return kernel


@functools.cache
def axpby_kernel(dtype: torch.dtype, a_per_sample: bool, b_per_sample: bool) -> Callable:
    """The kernel out[i] = a x[i] + b y[i]."""
    element = scalars.combination(device_jit, dtype, a_per_sample, b_per_sample)

    @cuda.jit
    def kernel(a, x, b, y, out, numel_of_sample):
        i = cuda.grid(1)
        if i < x.size:
            out[i] = element(a, x[i], b, y[i], i // numel_of_sample)

    return kernel


def launch_unary(op: str, x: Tensor, out: Tensor) -> None:
    """Launch out = op(x) for dense CUDA tensors in one memory order."""
    _launch(unary_kernel(op, x.dtype, out.dtype), x, (stored(x), stored(out)))


def launch_axpby(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor, out: Tensor) -> None:
    """Launch out = a x + b y for dense CUDA tensors in one memory order."""
    kernel = axpby_kernel(x.dtype, isinstance(a, Tensor), isinstance(b, Tensor))
    a_value, b_value = (
        c.detach().contiguous() if isinstance(c, Tensor) else np.float32(c) for c in (a, b)
    )
    numel = sample_numel(a, x, b)
    _launch(kernel, x, (a_value, stored(x), b_value, stored(y), stored(out), numel))


def _launch(kernel: Any, x: Tensor, args: tuple) -> None:
    handle = torch.cuda.current_stream(x.device).cuda_stream
    blocks = -(-x.numel() // THREADS)
    with cuda.gpus[x.device.index]:
        # torch's default stream has handle 0, which external_stream would take for "no stream".
        stream = cuda.external_stream(handle) if handle else cuda.legacy_default_stream()
        arrays = [cuda.as_cuda_array(t, sync=False) if isinstance(t, Tensor) else t for t in args]
        kernel[blocks, THREADS, stream](*arrays)
