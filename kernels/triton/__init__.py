"""Triton kernels: one file per op, written for Hopper and correct from sm_80 on.

Every file holds the device code (`@triton.jit`), the choice of tiles and a plain function with the
op's signature. There is no `triton.autotune`: it times candidates at the first call, which is
neither deterministic nor possible inside a CUDA-graph capture. Tiles come from arithmetic on the
shape instead. `TRITON_INTERPRET=1`, set before the first import, runs the kernels on CPU tensors.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch

from mirage_hello.kernels.call import Call


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    multiprocessors: int
    smem_bytes: int  # the most shared memory that one block can ask for
    capability: int  # 90 for compute capability 9.0


# The interpreter runs on a CPU; it then makes the choices of an H200.
H200 = Device(multiprocessors=132, smem_bytes=227 * 1024, capability=90)


@functools.cache
def _cuda_device(index: int) -> Device:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Device(
        multiprocessors=properties["multiprocessor_count"],
        smem_bytes=properties["max_shared_mem"],
        capability=10 * major + minor,
    )


def device_of(tensor: torch.Tensor) -> Device:
    """The properties of the device that holds `tensor`."""
    return _cuda_device(tensor.device.index) if tensor.is_cuda else H200


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make `tensor`'s device torch's current one, which is where Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def refuses_product(call: Call) -> str | None:
    """Why `tl.dot` cannot serve the call: the interpreter takes bfloat16's bits for integers."""
    if call.device.type == "cpu" and call.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16 matrices; use float16 or float32"
    return None
