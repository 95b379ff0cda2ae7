"""The tile of ptx/linear.sm90a.ptx.j2, its shared memory, and what it costs."""

from dataclasses import dataclass, replace

from mirage_hello.kernels import tuning

SMEM_BYTES = 232448  # a block may have
# Clusters resident at once on an H200, one block a multiprocessor (cuOccupancyMaxActiveClusters):
# not 132 / size, because a cluster stays inside a GPC.
RESIDENT = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
MAX_STAGES = 12
MULTIPROCESSORS = 132
WIDTHS = (32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256)  # of tiles that are candidates
REGISTERS = {1: 255, 2: 232}  # of a multiplying thread, by warpgroups
# Of the estimate, in clocks of an H200.
PRODUCTS = 1.07  # products against the peak rate of 4096 FLOP a clock
READS, WRITES = 0.82 / 128, 1.16 / 128  # a byte of shared memory that wgmma reads, that TMA writes
LOAD = 1 / 62  # a byte that TMA brings
EXCHANGE = 1 / 18  # a byte sent to another block of the cluster
LAUNCH, SPLIT = 3800, 900  # a kernel with its first loads; one exchange
STORE, GATE = 0.055, 0.16  # an output value of one warpgroup; its gate


@dataclass(frozen=True)
class Tile:
    """What one block multiplies at a time, and how.

    groups: warpgroups that multiply, 1 or 2.
    block_n: columns of the weight; geglu: block_n / 2 of h and the same of the gate.
    m_tiles: rows of a warpgroup in 64s, 1 or 2.
    pingpong: both warpgroups have tiles of their own, and one multiplies while the other stores.
        Otherwise they share a tile, 64 m_tiles rows each.
    split: K over a cluster of so many blocks; 1 with pingpong and geglu.
    shared: "weight" or "x": a pair of blocks with neighbouring tiles loads that operand once, half
        each for both; "": none. Not with split.
    stages: K blocks in flight, 2 to 12; None: as many as the shared memory holds.
    """

    groups: int
    block_n: int
    m_tiles: int = 1
    pingpong: bool = False
    split: int = 1
    shared: str = ""
    stages: int | None = None

    @property
    def block_m(self) -> int:
        return 64 * self.m_tiles * (1 if self.pingpong else self.groups)

    @property
    def threads(self) -> int:
        return 128 * self.groups + 128

    def columns(self, gated: bool) -> int:
        """Of the output, in one tile."""
        return self.block_n // 2 if gated else self.block_n

    def width(self, gated: bool) -> int:
        """Columns of the output that one block stores."""
        return self.block_n // 2 if gated else self.block_n // self.split

    def problem(self, gated: bool, norm: bool = False, quantised: bool = False) -> str | None:
        """Why the kernel does not have this tile; None if it does."""
        if self.pingpong and (self.groups != 2 or self.split != 1):
            return "pingpong needs two warpgroups and no split"
        if self.split > 1 and (gated or self.m_tiles > 1):
            return "geglu and m_tiles of 2 do not split K"
        if self.shared and (self.split > 1 or self.shared not in ("weight", "x")):
            return 'shared is "weight" or "x", without split'
        if self.block_n % (16 if self.shared == "weight" else 8):
            return "a shared weight tile is loaded as two halves of whole octets"
        if self.block_n % (16 if gated else 8 * self.split) or not 16 <= self.block_n <= 256:
            return "block_n must be 16 to 256, whole octets for each block of the cluster"
        if quantised and self.width(gated) // self.parts(gated) % 16:
            return "strips of e4m3 must be whole 16 bytes wide"
        # What is left of 65536 registers beside the accumulators: about 48, with statistics 56.
        limit = REGISTERS.get(self.groups, 0)
        needed = self.m_tiles * self.block_n // 2 + (56 if norm else 48)
        if needed > limit:
            return f"a thread needs about {needed} registers and may have {limit}"
        return None

    def parts(self, gated: bool) -> int:
        """Strips of 16 rows that a warp stores after one another."""
        width = self.width(gated)
        return 1 if width <= 112 else 2 if width <= 192 else 4

    def layout(
        self, stages: int, gated: bool, factors: bool, residual: bool, quantised: bool = False
    ) -> dict[str, int]:
        """Where the slices, strips, vectors and barriers lie; BYTES: all of the shared memory."""
        width, warps = self.width(gated), 4 * self.groups
        parts, size = self.parts(gated), 1 if quantised else 2
        strips = 16 * (size * width // parts + 16) * (parts * self.m_tiles if residual else 1)
        vectors = (self.block_n if gated else width) * (8 if factors else 2)
        staged = 256 * self.groups * self.block_n if self.split > 1 else 0
        received = max(stages * 128 * (self.block_m + self.block_n), staged)
        strips_at = received + staged // self.split * (self.split - 1)
        vectors_at = strips_at + warps * strips
        bars = vectors_at + warps * vectors
        places = {"RECEIVED": received, "STRIPS": strips_at, "VECTORS": vectors_at, "BARS": bars}
        return {**places, "BYTES": bars + 16 * stages + 8}

    def tiles(self, rows: int, n: int, gated: bool) -> tuple[int, int]:
        """Of an output [rows, n]: (all, in a column); of pairs where they share an operand."""
        down, across = -(-rows // self.block_m), -(-n // self.columns(gated))
        if self.shared == "weight":
            down = -(-down // 2)
        elif self.shared == "x":
            across = -(-across // 2)
        return down * across, down

    def fitted(
        self, loads: int, gated: bool = False, factors: bool = False, residual: bool = False
    ) -> "Tile":
        """With `stages` filled in, at most `loads`: the K blocks of all tiles of one block.

        Raises:
            ValueError: nothing fits the shared memory.
        """
        if self.stages:
            return self
        for stages in range(min(max(loads, 2), MAX_STAGES), 1, -1):
            if self.layout(stages, gated, factors, residual)["BYTES"] <= SMEM_BYTES:
                return replace(self, stages=stages)
        raise ValueError(
            f"{self}: a block may have {SMEM_BYTES} bytes of shared memory; use a smaller tile"
        )

    def variables(
        self, gated: bool, factors: bool, residual: bool, quantised: bool = False
    ) -> dict[str, int | bool | str]:
        """Template variables of a fitted tile."""
        assert self.stages is not None
        places: dict[str, int | bool | str] = {}
        places |= self.layout(self.stages, gated, factors, residual, quantised)
        del places["BYTES"]
        return {
            "GROUPS": self.groups,
            "M_TILES": self.m_tiles,
            "BLOCK_N": self.block_n,
            "PINGPONG": self.pingpong,
            "SPLIT": self.split,
            "STAGES": self.stages,
            "SHARED": self.shared,
            "RESIDUAL": residual,
            "QUANTISE": quantised,
            **places,
        }

    def grid(self, tiles: int) -> int:
        """Blocks of a launch over `tiles` tiles, or pairs of them."""
        if self.split > 1:
            return tiles * self.split
        if self.shared:
            return 2 * min(tiles, MULTIPROCESSORS // 2)
        return min(tiles, MULTIPROCESSORS)

    def loads(self, tiles: int, blocks: int) -> int:
        """K blocks that one block of the launch loads, at most."""
        together = 2 if self.shared else self.split
        return -(-blocks // self.split) * -(-tiles * together // self.grid(tiles))

    def boxes(self, gated: bool) -> tuple[int, int]:
        """Rows of x and of the weight that one TMA load brings."""
        rows = self.block_m // 2 if self.shared == "x" else self.block_m
        halves = gated or self.shared == "weight"
        return rows, self.block_n // 2 if halves else self.block_n

    def clocks(self, rows: int, n: int, blocks: int, gated: bool = False) -> float:
        """Estimated clocks of out[rows][n] with `blocks` K blocks.

        A K block takes the longest of its products, of shared memory's work (wgmma reads x and
        weight, TMA writes them) and of its loads. An epilogue hides where another tile multiplies.
        """
        tiles, _ = self.tiles(rows, n, gated)
        area = self.block_m // 64 * self.block_n
        loaded = 128 * (self.block_m + self.block_n)
        read = 4 * (self.block_m // 64) * (2048 + 32 * self.block_n)
        step = max(2 * PRODUCTS * area, READS * read + WRITES * loaded, LOAD * loaded)
        depth = -(-blocks // self.split)
        values = 64 * self.m_tiles * self.width(gated)
        store = values * (STORE + (GATE if gated else 0))
        if self.split > 1:
            sent = 256 * self.groups * self.block_n * (self.split - 1) / self.split
            waves = -(-tiles // RESIDENT[self.split])
            return LAUNCH + waves * (depth * step + SPLIT + EXCHANGE * sent + store)
        if self.shared:  # in step with the other block of the pair: for `mirage tune` to decide
            step *= 1.1
        turns = -(-tiles // (MULTIPROCESSORS // 2 if self.shared else MULTIPROCESSORS))
        if self.pingpong:
            return LAUNCH + turns * max(depth * step, store / 2) + store
        return LAUNCH + turns * (depth * step + store)


def choose_tile(
    op: str,
    rows: int,
    n: int,
    blocks: int,
    norm: bool = False,
    fp8: bool = False,
    quantised: bool = False,
) -> Tile:
    """The measured tile of this shape, else the one with the least estimated time (docs/linear.md).

    Args:
        op: linear or geglu.
        rows, n: of the output.
        blocks: K blocks of 128 bytes.
        norm: shares its measurements with the plain op: the product is the same.
        fp8, quantised: variants that are tuned under names of their own.
    """
    gated = op == "geglu"
    return tuning.tile_for(
        op + ("_fp8" if fp8 else "") + ("_to_e4m3" if quantised else ""),
        {"m": rows, "n": n, "blocks": blocks},
        lambda: candidates(blocks, gated, norm, quantised),
        lambda tile: tile.clocks(rows, n, blocks, gated),
    )


def candidates(
    blocks: int, gated: bool = False, norm: bool = False, quantised: bool = False
) -> list[Tile]:
    """Every tile whose registers and shared memory fit."""
    found = []
    for block_n in WIDTHS:
        tiles = [Tile(1, block_n), Tile(2, block_n), Tile(1, block_n, 2)]
        tiles += [Tile(2, block_n, m, pingpong=True) for m in (1, 2)]
        tiles += [Tile(g, block_n, split=s) for g in (1, 2) for s in range(2, min(blocks, 8) + 1)]
        tiles += [replace(t, shared=s) for t in tiles if t.split == 1 for s in ("weight", "x")]
        tiles = [t for t in tiles if not t.problem(gated, norm, quantised)]
        found += [t for t in tiles if _fits(t, blocks, gated, norm)]
    return found


def _fits(tile: Tile, blocks: int, gated: bool, norm: bool) -> bool:
    """Whether three stages fit beside a residual, or as many as there are K blocks."""
    stages = min(3, max(2, -(-blocks // tile.split)))
    needed = tile.layout(stages, gated, norm, residual=not gated)["BYTES"]
    return needed <= SMEM_BYTES


def choose_softmax_tile(
    rows: int, n: int, blocks: int, width: int, fp8: bool = False, quantised: bool = False
) -> Tile:
    """As choose_tile, among the tiles that hold whole softmaxes of `width` columns."""
    op = "linear_softmax" + ("_fp8" if fp8 else "") + ("_to_e4m3" if quantised else "")

    def fits(tile: Tile) -> bool:
        return tile.split == 1 and tile.block_n % width == 0

    return tuning.tile_for(
        op,
        {"m": rows, "n": n, "blocks": blocks, "width": width},
        lambda: [t for t in candidates(blocks, norm=True, quantised=quantised) if fits(t)],
        lambda tile: tile.clocks(rows, n, blocks),
    )
