"""The launch of ptx/linear.sm90a.ptx.j2: a product, what its epilogue does, and its program."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.kernels.linear_tile import Tile, choose_tile
from mirage_hello.kernels.row_sums import RowSums
from mirage_hello.ptx import loader

SHORT_NAME = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3"}


@dataclass(frozen=True)
class Product:
    """x weight^T and what follows it in registers, one launch.

    op: linear or geglu.
    vector: the bias [N], or float32 [N, 2]: of a norm (s, b), of e4m3 operands (factor, b).
    statistics: [M, 2] of row_statistics; sums, eps: what x's producer left instead. Either: a norm.
    factor: float32 [1], x's scale times the weight's; of a norm of e4m3 operands.
    summed: leave the sums of the output's rows.
    out_scale: the output is e4m3(value / out_scale).
    copy_scale: beside the output a copy of it, e4m3(output / copy_scale).
    softmax: columns of a softmax, 0: none.
    """

    op: str
    x: Tensor
    weight: Tensor
    vector: Tensor | None
    residual: Tensor | None = None
    statistics: Tensor | None = None
    sums: RowSums | None = None
    eps: float = 0.0
    factor: Tensor | None = None
    summed: bool = False
    out_scale: float | None = None
    copy_scale: float | None = None
    softmax: int = 0

    @property
    def gated(self) -> bool:
        return self.op == "geglu"

    @property
    def norm(self) -> bool:
        return self.statistics is not None or self.sums is not None

    @property
    def fp8(self) -> bool:
        return self.x.dtype == torch.float8_e4m3fn

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows and columns of the output, K blocks of 128 bytes."""
        n, depth = self.weight.shape
        blocks = -(-depth * self.x.element_size() // 128)
        return self.x.numel() // depth, n // 2 if self.gated else n, blocks

    def launch(self, tile: Tile | None = None) -> tuple[Tensor, RowSums | None]:
        """The output and, where `summed`, the sums of its rows with its copy.

        Raises:
            ValueError: a tile that the kernel does not have, or that K is too short for.
        """
        rows, n, blocks = self.shape
        quantised, copied = self.out_scale is not None, self.copy_scale is not None
        tile = tile or choose_tile(self.op, rows, n, blocks, self.norm, self.fp8, quantised)
        problem = tile.problem(self.gated, self.norm, quantised)
        if problem or blocks < tile.split:
            problem = problem or f"{blocks} K blocks cannot be split over {tile.split}"
            raise ValueError(f"{self.op}: {tile}: {problem}; choose another tile")
        out = self._empty(n, torch.float8_e4m3fn if quantised else self._wide)
        copy = self._empty(n, torch.float8_e4m3fn) if copied else None
        made = self._sums(tile.width(self.gated), copy) if self.summed else None
        if out.numel():
            self._run(tile, out, made.values if made else None, copy)
        return out, made

    def _run(self, tile: Tile, out: Tensor, row_sums: Tensor | None, copy: Tensor | None) -> None:
        rows, n, blocks = self.shape
        tiles, tiles_x = tile.tiles(rows, n, self.gated)
        options = self.norm or self.fp8, self.residual is not None
        tile = tile.fitted(tile.loads(tiles, blocks), self.gated, *options)
        reciprocal = -(-(2**63) // tiles_x)
        of_x = (self.sums.values, self.eps) if self.sums else (self.statistics,)
        given = (self.vector, *(a for a in (*of_x, self.residual, row_sums) if a is not None))
        eight = tuple(a for a in (self.factor, copy) if a is not None)
        scale = self.out_scale or self.copy_scale
        scales = () if scale is None else (1.0 / scale,)
        quantised = self.out_scale is not None
        self._program(tile).launch(
            self.entry,
            grid=(tile.grid(tiles),),
            block=(tile.threads,),
            args=(
                *self._maps(tile), *given, *eight, reciprocal, out, n, rows, blocks, tiles,
                tiles_x, *scales,
            ),
            smem_bytes=tile.layout(tile.stages or 1, self.gated, *options, quantised)["BYTES"],
        )  # fmt: skip

    @property
    def entry(self) -> str:
        return (
            f"{self.op}{'_norm' * self.norm}{'_softmax' * bool(self.softmax)}"
            f"{'_to_e4m3' * (self.out_scale is not None)}"
            f"{'_with_e4m3' * (self.copy_scale is not None)}_{SHORT_NAME[self.x.dtype]}"
        )

    @property
    def _wide(self) -> torch.dtype:
        return torch.bfloat16 if self.fp8 else self.x.dtype

    def _empty(self, n: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*self.x.shape[:-1], n, dtype=dtype, device=self.x.device)

    def _sums(self, width: int, copy: Tensor | None) -> RowSums:
        rows, n, _ = self.shape
        parts = torch.empty(rows, -(-n // width), 2, dtype=torch.float32, device=self.x.device)
        return RowSums(parts, width, copy)

    def _maps(self, tile: Tile) -> tuple[loader.TensorMap, ...]:
        depth, size = self.weight.shape[1], self.x.element_size()
        x_rows, weight_rows = tile.boxes(self.gated)
        dims = (depth, self.x.numel() // depth)
        return (
            loader.tensor_map(self.x, (128 // size, x_rows), dims=dims, strides=(depth * size,)),
            loader.tensor_map(self.weight, (128 // size, weight_rows)),
        )

    def _program(self, tile: Tile) -> loader.Program:
        merging = self.sums.variables(self.weight.shape[1]) if self.sums else {}
        return program(
            self.op, tile, SHORT_NAME[self.x.dtype], self.norm, self.residual is not None,
            self.out_scale is not None, self.summed, self.softmax, self.copy_scale is not None,
            **merging,
        )  # fmt: skip


def program(
    op: str,
    tile: Tile,
    dtype: str,
    norm: bool = False,
    residual: bool = False,
    quantised: bool = False,
    summed: bool = False,
    softmax: int = 0,
    copied: bool = False,
    **merging: int | str,
) -> loader.Program:
    """The program of a fitted tile; `merging`: RowSums.variables of a norm's input."""
    variables = tile.variables(op == "geglu", norm or dtype == "e4m3", residual, quantised)
    variables |= {"ROW_SUMS": summed, "SOFTMAX": softmax, "COPY": copied, "SUM_PARTS": 0, **merging}
    return loader.program("linear.sm90a", OP=op, dtype=dtype, NORM=norm, **variables)
