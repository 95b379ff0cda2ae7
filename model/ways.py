"""Which of two equal ways the layers of the networks take: kernels that fuse, and how far.

`Ways` holds what was measured; `going` sets it and `fusing` the backend of the fused kernels, for a
block. Off sm_90a, with a gradient or in another precision every layer goes op by op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels.call import device_arch
from mirage_hello.kernels.policy import current

HALF = (torch.bfloat16, torch.float16)
# A backend of conv2d_fused, None for op by op, or what the policy says.
_chosen: ContextVar[str | None] = ContextVar("fused backend", default="policy")


@dataclass(frozen=True)
class Ways:
    """Where two ways compute the same: the one that is taken, by measurement (docs/plan.md).

    Args:
        sums_from: pixels of a batch of images from which on a convolution leaves sums for the
            next GroupNorm; with fewer the norm takes its own statistics, which costs a pass less
            than the sums in the epilogue do.
        folds_from, folds_q_from: K from which on a LayerNorm is folded into q, k, v and the GEGLU
            behind it, or into the q of a cross-attention; below it is a pass of its own.
        merges_from: C from which on a transformer's second feed-forward product and its projection
            out are one product of K = 5 C.
        row_sums: a linear layer leaves sums of its rows for the LayerNorm folded behind it, which
            else takes a kernel for them.
        prompts: a cross-attention is two products with the matrices made of the prompt.
        shortcuts: the 1x1 convolution of a residual block is more of K of its second one.
        on_load: windows (1, 3) of the convolutions that normalise what they load.
        e4m3_rows: of a calibrated network the layers behind LayerNorms, the projections in and the
            folded prompts multiply in e4m3, too; else only the second product of a feed-forward.
        e4m3_merges: as merges_from, in e4m3; with e4m3_rows.
        e4m3_raw: and the convolutions that no norm precedes (shortcuts, down and up), of copies.
    """

    sums_from: int = 0
    folds_from: int = 0
    folds_q_from: int = 0
    merges_from: int = 0
    row_sums: bool = True
    prompts: bool = True
    shortcuts: bool = False
    on_load: tuple[int, ...] = ()
    e4m3_rows: bool = True
    e4m3_merges: bool = True
    e4m3_raw: bool = True


MEASURED = Ways()
_ways: ContextVar[Ways] = ContextVar("ways of layers", default=MEASURED)


def ways() -> Ways:
    """Those in force."""
    return _ways.get()


@contextlib.contextmanager
def fusing(backend: str | None) -> Iterator[None]:
    """Within the block, layers fuse by this backend of conv2d_fused in any dtype; None: not.

    Like `going`, it does not reach plans that exist.
    """
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def going(taken: Ways) -> Iterator[None]:
    """Within the block, layers take these ways.

    A plan keeps those it was built with: its key is the size and the policy of kernels, not the
    ways. So build it within the block: make the stream there and push its first frame.
    """
    token = _ways.set(taken)
    try:
        yield
    finally:
        _ways.reset(token)


def fused_backend(x: Tensor, op: str = "conv2d") -> str | None:
    """The backend of the fused forms of `op` under the current policy; None: op by op."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if (chosen := _chosen.get()) != "policy":
        return chosen
    if x.dtype not in HALF:
        return None
    wish = current.get().wishes(op)[0]
    if not x.is_cuda:
        return "ptx" if wish == "ptx-emulated" else None
    return "ptx" if wish in ("auto", "ptx") and device_arch(x.device) == "sm_90a" else None
