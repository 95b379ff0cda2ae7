"""Launches of the hand-written group_norm: a plan becomes grids, blocks and arguments.

The PTX and the CUDA C++ entries have the same parameters, so both run from here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels.elementwise import CUDA_TYPE, SUFFIX
from mirage_hello.kernels.group_norm_plan import Plan, Shape
from mirage_hello.ptx import loader

# Divisions by multiplication: channel = index * magic >> shift (see the PTX headers).
NHWC_SHIFT, NCHW_SHIFT = 31, 48


def ptx_program(
    op: str, shape: Shape, p: Plan, dtype: torch.dtype, bf16_silu: str = "silu_tanh"
) -> loader.Program:
    activation = "silu" if op == "group_norm_silu" else "none"
    if activation == "silu" and dtype == torch.bfloat16:
        activation = bf16_silu
    variables: dict[str, Any] = {"op": op, "dtype": SUFFIX[dtype], "ACTIVATION": activation}
    variables |= {"E": p.elements, "VECS": p.vecs, "THREADS": p.threads}
    variables |= {"REGISTERS": min(255, 65536 // p.threads // 8 * 8)}
    variables |= {"S": p.segment} if shape.channels_last else {}
    variables |= {"CLUSTER": p.cluster} if p.passes == 1 else {}
    return loader.program(f"group_norm_{layout(shape)}{'_two_pass' * (p.passes == 2)}", **variables)


def cuda_program(op: str, shape: Shape, p: Plan, dtype: torch.dtype) -> loader.Program:
    numbers = {"E": p.elements, "S": p.segment, "VECS": p.vecs, "CLUSTER": p.cluster}
    numbers |= {"THREADS": p.threads, "PASSES": p.passes, "SILU": int(op == "group_norm_silu")}
    names = {"ELEMENT": CUDA_TYPE[dtype], "SUFFIX": SUFFIX[dtype], "OP": op}
    return loader.cuda_program("group_norm", names | {k: str(v) for k, v in numbers.items()})


def layout(shape: Shape) -> str:
    return "nhwc" if shape.channels_last else "nchw"


Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor]  # x, weight, bias, out


def launch(
    program_of: Callable[..., loader.Program],
    op: str,
    shape: Shape,
    p: Plan,
    tensors: Tensors,
    eps: float,
) -> None:
    """Launch plan `p`."""
    dtype = tensors[0].dtype
    program = program_of(op, shape, p, dtype)
    passes = one_pass if p.passes == 1 else two_passes
    passes(program, f"{op}_{layout(shape)}", SUFFIX[dtype], shape, p, tensors, eps)


def one_pass(
    program: loader.Program,
    name: str,
    suffix: str,
    shape: Shape,
    p: Plan,
    tensors: Tensors,
    eps: float,
) -> None:
    units, width = p.block_units(shape), shape.group_channels
    grid = (p.cluster, shape.groups // p.slab_groups, shape.images)
    scalars: tuple[int, ...]
    if shape.channels_last:
        block, smem_bytes = (p.columns, p.lanes, 1), p.smem_bytes(shape)
        scalars = (shape.channels, shape.pixels, units, p.slab_groups, width, nhwc_magic(width))
    else:
        block, smem_bytes = (p.lanes, 1, 1), 0
        vectors = width * shape.pixels // p.elements
        scalars = (nchw_magic(shape, p), vectors, units, shape.groups, width)
    program.launch(f"{name}_{suffix}", grid, block, (*tensors, *scalars, eps), smem_bytes)


def two_passes(
    program: loader.Program,
    name: str,
    suffix: str,
    shape: Shape,
    p: Plan,
    tensors: Tensors,
    eps: float,
) -> None:
    x, weight, bias, out = tensors
    width = shape.group_channels
    partial = x.new_empty(shape.images * shape.groups * p.slices * 2, dtype=torch.float32)
    samples = x.new_empty(shape.images * p.slices, dtype=torch.float32)
    grid = (p.slices, shape.groups // p.slab_groups, shape.images)
    sizes: tuple[int, ...]
    scalars: tuple[float, ...]
    if shape.channels_last:
        block, smem_bytes = (p.columns, p.lanes, 1), p.smem_bytes(shape)
        magic = nhwc_magic(width)
        sizes = (shape.channels, shape.pixels, shape.groups, p.slab_groups, width, magic)
        scalars = (p.slices, eps, *sizes)
    else:
        block, smem_bytes = (p.lanes, 1, 1), 0
        sizes = (width * shape.pixels // p.elements,)
        scalars = (nchw_magic(shape, p), p.slices, width, eps, *sizes)
    first = (x, partial, samples, *sizes)
    program.launch(f"{name}_statistics_{suffix}", grid, block, first, smem_bytes)
    # Twice the blocks: the second kernel waits for memory in both directions.
    grid = (2 * p.slices, *grid[1:])
    second = (x, partial, samples, weight, bias, out, *scalars)
    program.launch(f"{name}_apply_{suffix}", grid, block, second, smem_bytes)


def nhwc_magic(group_channels: int) -> int:
    return -(-(1 << NHWC_SHIFT) // group_channels)


def nchw_magic(shape: Shape, p: Plan) -> int:
    return -(-(1 << NCHW_SHIFT) // (shape.pixels // p.elements))
