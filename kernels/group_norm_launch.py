"""Launches of the hand-written group_norm: a plan becomes grids, blocks and arguments.

The PTX and the CUDA C++ entries have the same parameters, so both run from here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels import tuning
from mirage_hello.kernels.elementwise import CUDA_TYPE, SUFFIX
from mirage_hello.kernels.group_norm_plan import Plan, Shape
from mirage_hello.ptx import loader

# Divisions by multiplication: channel = index * magic >> shift (see the PTX headers).
NHWC_SHIFT, NCHW_SHIFT = 31, 48


def ptx_program(
    op: str, shape: Shape, p: Plan, dtype: torch.dtype, **others: str | int
) -> loader.Program:
    """The PTX of a plan; `others` replace template variables (the sweep's hints, say)."""
    activation = "silu" if op == "group_norm_silu" else "none"
    if activation == "silu" and dtype == torch.bfloat16:
        activation = "silu_tanh"
    variables: dict[str, Any] = {"op": op, "dtype": SUFFIX[dtype], "ACTIVATION": activation}
    variables |= {"E": p.elements, "VECS": p.vecs, "THREADS": p.threads}
    variables |= {"REGISTERS": min(255, 65536 // (p.threads * p.blocks_per_sm) // 8 * 8)}
    variables |= {"S": p.segment} if shape.channels_last else {}
    variables |= {"CLUSTER": p.cluster} if p.passes == 1 else {}
    variables |= {"OVERLAP": shape.clusters}
    if shape.channels_last:
        variables |= sizes(shape, p) | {"BLOCKS_PER_SM": p.blocks_per_sm}
        if p.passes == 1:
            variables |= {"STAGING": p.staging, "TRIGGER": trigger(shape, p)}
    return loader.program(
        f"group_norm_{layout(shape)}{'_two_pass' * (p.passes == 2)}", **variables | others
    )


def trigger(shape: Shape, p: Plan) -> str:
    """When the next kernel may start: as it was found in a network, where what follows decides
    (`mirage tune --model`), else the plan's rule, which is that of the kernel behind itself."""
    names = ("images", "channels", "pixels", "groups", "x_channels", "size")
    key = {name: getattr(shape, name) for name in names}
    rule = p.trigger(shape)
    return tuning.tile_for(
        "group_norm_trigger", key, lambda: ("early", "late"), lambda kind: float(kind != rule)
    )


def cuda_program(op: str, shape: Shape, p: Plan, dtype: torch.dtype) -> loader.Program:
    numbers = {"E": p.elements, "S": p.segment, "VECS": p.vecs, "CLUSTER": p.cluster}
    numbers |= {"THREADS": p.threads, "PASSES": p.passes, "SILU": int(op == "group_norm_silu")}
    if shape.channels_last:
        numbers |= sizes(shape, p)
    names = {"ELEMENT": CUDA_TYPE[dtype], "SUFFIX": SUFFIX[dtype], "OP": op}
    return loader.cuda_program("group_norm", names | {k: str(v) for k, v in numbers.items()})


def sizes(shape: Shape, p: Plan) -> dict[str, int]:
    """The shape and the cut as constants of the channels_last kernels."""
    width = shape.group_channels
    counts = {"SLICES": p.slices, "APPLY_BLOCKS": p.apply_blocks} if p.passes == 2 else {}
    numbers = {"CHANNELS": shape.channels, "PIXELS": shape.pixels, "SLAB_GROUPS": p.slab_groups}
    numbers |= {"GROUP_CHANNELS": width, "MAGIC": nhwc_magic(width)}
    numbers |= {"X_CHANNELS": shape.x_channels} if shape.x_channels else {}
    return numbers | counts | {"COLUMNS": p.columns, "LANES": p.lanes}


def layout(shape: Shape) -> str:
    return "nhwc" if shape.channels_last else "nchw"


# x, with a skip that too, then weight, bias, out
Tensors = tuple[Tensor | None, ...]


def launch(
    program_of: Callable[..., loader.Program],
    op: str,
    shape: Shape,
    p: Plan,
    tensors: Tensors,
    eps: float,
) -> None:
    """Launch plan `p`."""
    dtype = tensors[-1].dtype  # type: ignore[union-attr]
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
    grid = (p.cluster, shape.groups // p.slab_groups, shape.images)
    scalars: tuple[int, ...]
    if shape.channels_last:
        block, smem_bytes, scalars = (p.columns, p.lanes, 1), p.smem_bytes(shape), ()
    else:
        block, smem_bytes = (p.lanes, 1, 1), 0
        width, units = shape.group_channels, p.block_units(shape)
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
    *sources, weight, bias, out = tensors
    assert out is not None
    width = shape.group_channels
    partial = out.new_empty(shape.images * shape.groups * p.slices * 2, dtype=torch.float32)
    samples = out.new_empty(shape.images * p.slices, dtype=torch.float32)
    grid = (p.slices, shape.groups // p.slab_groups, shape.images)
    counts: tuple[int, ...]
    scalars: tuple[float, ...]
    if shape.channels_last:
        block, smem_bytes = (p.columns, p.lanes, 1), p.smem_bytes(shape)
        counts, scalars = (), (eps,)
    else:
        block, smem_bytes = (p.lanes, 1, 1), 0
        counts = (width * shape.pixels // p.elements,)
        scalars = (nchw_magic(shape, p), p.slices, width, eps, *counts)
    first = (*sources, partial, samples, *counts)
    program.launch(f"{name}_statistics_{suffix}", grid, block, first, smem_bytes)
    grid = (p.apply_blocks, *grid[1:])
    second = (*sources, partial, samples, weight, bias, out, *scalars)
    program.launch(f"{name}_apply_{suffix}", grid, block, second, smem_bytes)


def nhwc_magic(group_channels: int) -> int:
    return -(-(1 << NHWC_SHIFT) // group_channels)


def nchw_magic(shape: Shape, p: Plan) -> int:
    return -(-(1 << NCHW_SHIFT) // (shape.pixels // p.elements))
