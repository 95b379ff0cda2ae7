"""Mean and spread of rows, for a layer_norm that is folded into the linear behind it.

Either the linear that makes the rows leaves sums of its tiles' columns (linear_summed), which the
next one merges, or a small kernel, ptx/row_statistics.ptx.j2, reads the rows once more.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirage_hello.kernels.layer_norm import float_bits
from mirage_hello.ptx import loader


@dataclass(frozen=True)
class RowSums:
    """What a linear leaves of its output's rows for the layer_norm behind it.

    values: float32 [M, P, 2], mean and M2 = sum (y - mean)^2 of `width` neighbouring columns, of
        the values as they were rounded; the last part may have fewer.
    copy: the output once more, in e4m3, where the linear behind it multiplies that; or None.
    """

    values: Tensor
    width: int
    copy: Tensor | None = None

    def variables(self, depth: int) -> dict[str, Any]:
        """Template variables of the linear that merges them; `depth`: columns in all."""
        parts, last = self.values.shape[1], depth - (self.values.shape[1] - 1) * self.width
        return {
            "SUM_PARTS": parts,
            "SUM_WIDTH": self.width,
            "SUM_LAST": last,
            "SUM_DEPTH": depth,
            "SUM_SHARE": float_bits(self.width / depth),
            "SUM_LAST_SHARE": float_bits(last / depth),
            "SUM_INVERSE": float_bits(1 / depth),
        }


def row_statistics(x: Tensor, eps: float) -> Tensor:
    """[M, 2] float32, (-mean rstd, rstd) of each row of x [..., K], rstd = 1 / sqrt(var + eps)."""
    depth = x.shape[-1]
    rows = x.numel() // depth
    out = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    if rows:
        short = {torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype]
        loader.program("row_statistics", dtype=short, CHUNKS=-(-depth // 256)).launch(
            f"row_statistics_{short}",
            grid=(-(-rows // 4),),
            block=(128,),
            args=(x, out, rows, depth // 8, 1.0 / depth, eps),
        )
    return out
