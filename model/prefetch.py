"""Weights into the L2 before the kernels that want them.

A frame of batch one reads 1.7 GB of weights once, and the L2 holds 50 MB: each kernel finds its
weights in device memory, and waits for them while the kernels of the larger images leave the
memory idle. So the launches are cut into chunks of some megabytes of weights, and when a chunk
begins, a kernel of one warp a multiprocessor (ptx/prefetch.ptx) asks for the weights of the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirage_hello.model import derived
from mirage_hello.ptx import loader

CHUNK_BYTES = 12 * 2**20  # two chunks and the activations fit into an L2 of 50 MB
SMALLEST_BYTES = 2**16  # of a weight: smaller ones arrive before they are missed
BLOCKS = 132


@dataclass(frozen=True)
class Weight:
    """A range of memory that a launch reads and no launch of the frame writes."""

    address: int
    nbytes: int


def weights_of(modules: Iterable[nn.Module]) -> dict[int, Weight]:
    """Address -> weight, of parameters and of what was made of them."""
    tensors: list[Tensor] = [p for module in modules for p in module.parameters()]
    tensors += [t for module in modules for t in derived.derived_tensors(module)]
    found = ((t.data_ptr(), t.numel() * t.element_size()) for t in tensors)
    return {a: Weight(a, nbytes) for a, nbytes in found if nbytes >= SMALLEST_BYTES}


def chunked(launches: list[list[Weight]], chunk_bytes: int) -> list[tuple[int, list[Weight]]]:
    """(launch at which to ask, weights) for each chunk but the first: asked for when the chunk
    before it begins. `launches` has each launch's weights; of what is larger than a chunk only the
    first chunk_bytes are asked for.
    """
    chunks: list[tuple[int, list[Weight]]] = [(0, [])]
    size = 0
    for i, weights in enumerate(launches):
        for weight in weights:
            nbytes = min(weight.nbytes, chunk_bytes)
            if size and size + nbytes > chunk_bytes:
                chunks.append((i, []))
                size = 0
            chunks[-1][1].append(Weight(weight.address, nbytes))
            size += nbytes
    return [(chunks[k][0], chunks[k + 1][1]) for k in range(len(chunks) - 1)]


class Prefetch:
    """The prefetches of one recorded function.

    Args:
        launches: the weights of each hand-written launch, in order.
        branch: on a branch of the graph beside the kernels, instead of between them.
    """

    def __init__(
        self,
        launches: list[list[Weight]],
        device: torch.device,
        chunk_bytes: int | None = None,
        branch: bool = False,
    ) -> None:
        self._ranges: dict[int, Tensor] = {}
        for at, weights in chunked(launches, chunk_bytes or CHUNK_BYTES):
            rows = [(w.address, w.nbytes) for w in weights]
            self._ranges[at] = torch.tensor(rows, dtype=torch.int64, device=device)
        for ranges in [*self._ranges.values()][:1]:
            ask(ranges)  # loads the kernel, outside any capture
        self._branch = torch.cuda.Stream(device) if branch else None
        self._count = 0

    def __len__(self) -> int:
        return len(self._ranges)

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Within the block, which must launch what was recorded, the prefetches go along."""
        self._count = 0
        with loader.watched(self._launched):
            yield
        if self._branch is not None:
            torch.cuda.current_stream().wait_stream(self._branch)

    def _launched(self, program: str, *launch: Any) -> None:
        if program == "prefetch":
            return
        ranges = self._ranges.get(self._count)
        self._count += 1
        if ranges is None:
            return
        if self._branch is None:
            ask(ranges)
        else:
            self._branch.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._branch):
                ask(ranges)


def ask(ranges: Tensor) -> None:
    """Queue the prefetch of ranges, int64 [count, 2]: (address, bytes)."""
    loader.program("prefetch").launch("prefetch", (BLOCKS,), (32,), (ranges, len(ranges)))
