"""`raycast.trace` as one Triton kernel: a ray's whole walk through the grid stays in registers.

In plain PyTorch each of the 14 cells costs about 110 elementwise kernels over all rays, bound by
memory: 14 x 110 x 12 B = 18 kB a ray. Here a ray reads its cells' rows (14 x 32 B) and writes 16 B.
The arithmetic is that of `raycast.cell_hits`, in the same order.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_hello.model.data import city as c
from mirage_hello.model.data import noise

BLOCK = 128
GOLDEN, MIX_A, MIX_B = (tl.constexpr(v) for v in (noise.GOLDEN, noise.MIX_A, noise.MIX_B))
CELL, GRID, LANE = tl.constexpr(c.CELL), tl.constexpr(c.GRID), tl.constexpr(c.LANE)
CAR_LENGTH, CAR_WIDTH = tl.constexpr(c.CAR_LENGTH), tl.constexpr(c.CAR_WIDTH)
CAR_HEIGHT, CAR_PERIOD = tl.constexpr(c.CAR_HEIGHT), tl.constexpr(c.CAR_PERIOD)
FAR = tl.constexpr(1e4)


@triton.jit
def mixed(h, key):
    """One round of `noise.hashed`."""
    h = h * GOLDEN + key
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * MIX_A
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * MIX_B
    return h ^ ((h >> 16) & 0xFFFF)


@triton.jit
def uniform(seed_hash, lane, key):
    """`noise.uniform(seed, lane, key)`; seed_hash is the first round, the same for a program."""
    h = mixed(mixed(seed_hash, lane), key)
    return (h & 0xFFFFFF).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def car_near(seed_hash, frame, lane, middle, axis: tl.constexpr):
    """`city.car_near`, the position alone."""
    sign = tl.where(uniform(seed_hash, lane, 41 + axis) < 0.5, -1.0, 1.0)
    speed = sign * (0.08 + 0.12 * uniform(seed_hash, lane, 43 + axis))
    moved = CAR_PERIOD * uniform(seed_hash, lane, 45 + axis) + speed * frame
    return moved + tl.floor((middle - moved) / CAR_PERIOD + 0.5) * CAR_PERIOD


@triton.jit
def slab(ox, oy, oz, ix, iy, iz, x, z, hx, top, hz):
    """Entry of the box |x - x0| <= hx, 0 <= y <= top, |z - z0| <= hz."""
    ax, bx = (x - hx - ox) * ix, (x + hx - ox) * ix
    ay, by = (0.0 - oy) * iy, (top - oy) * iy
    az, bz = (z - hz - oz) * iz, (z + hz - oz) * iz
    near = tl.maximum(tl.maximum(tl.minimum(ax, bx), tl.minimum(ay, by)), tl.minimum(az, bz))
    far = tl.minimum(tl.minimum(tl.maximum(ax, bx), tl.maximum(ay, by)), tl.maximum(az, bz))
    return tl.where((near <= far) & (near > 1e-3), near, FAR)


@triton.jit
def ball(ox, oy, oz, dx, dy, dz, x, y, z, radius):
    """Entry of a sphere."""
    x, y, z = ox - x, oy - y, oz - z
    half_b = x * dx + y * dy + z * dz
    discriminant = half_b * half_b - (x * x + y * y + z * z - radius * radius)
    t = -half_b - tl.sqrt(tl.maximum(discriminant, 0.0))
    t = tl.where((discriminant > 0) & (t > 1e-3), t, FAR)
    return tl.where(radius > 0, t, FAR)


@triton.jit
def trace_kernel(
    cells, seeds, frames, balloons, origin, direction,
    distance, code_out, cell_x_out, cell_z_out,
    rays, steps, balloon_count: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """origin, direction float32 [3, B, rays]; the rest as in `raycast.trace`; grid (blocks, B)."""
    batch, batches = tl.program_id(1), tl.num_programs(1)
    ray = tl.program_id(0) * block + tl.arange(0, block)
    inside = ray < rays
    at = batch * rays + ray
    plane = batches * rays

    # Load
    ox = tl.load(origin + at, inside, 0.0)
    oy = tl.load(origin + plane + at, inside, 1.0)
    oz = tl.load(origin + 2 * plane + at, inside, 0.0)
    dx = tl.load(direction + at, inside, 1.0)
    dy = tl.load(direction + plane + at, inside, 1.0)
    dz = tl.load(direction + 2 * plane + at, inside, 1.0)
    frame = tl.load(frames + batch).to(tl.float32)
    seed_hash = mixed(0, tl.load(seeds + batch))

    # Ground and balloons
    dx = tl.where(tl.abs(dx) < 1e-6, 1e-6, dx)
    dy = tl.where(tl.abs(dy) < 1e-6, 1e-6, dy)
    dz = tl.where(tl.abs(dz) < 1e-6, 1e-6, dz)
    ix, iy, iz = 1.0 / dx, 1.0 / dy, 1.0 / dz
    best = tl.where(dy < 0, -oy * iy, FAR)
    best = tl.where(best > 1e-3, best, FAR)
    code = tl.where(best < FAR, 1, 0)
    for i in tl.static_range(balloon_count):
        sphere = balloons + (batch * balloon_count + i) * 4
        # Names of their own: a name that is a scalar here may not be a block in the loop below.
        mid_x, mid_y, mid_z = tl.load(sphere), tl.load(sphere + 1), tl.load(sphere + 2)
        to_ball = ball(ox, oy, oz, dx, dy, dz, mid_x, mid_y, mid_z, tl.load(sphere + 3))
        code = tl.where(to_ball < best, 7, code)
        best = tl.minimum(best, to_ball)

    # Cells along the ray
    cell_x, cell_z = tl.floor(ox / CELL).to(tl.int32), tl.floor(oz / CELL).to(tl.int32)
    border_x = ((cell_x + (dx > 0).to(tl.int32)).to(tl.float32) * CELL - ox) * ix
    border_z = ((cell_z + (dz > 0).to(tl.int32)).to(tl.float32) * CELL - oz) * iz
    across_x, across_z = CELL * tl.abs(ix), CELL * tl.abs(iz)
    toward_x, toward_z = tl.where(dx > 0, 1, -1), tl.where(dz > 0, 1, -1)
    hit_x, hit_z = cell_x, cell_z
    for _ in range(steps):
        index = (cell_x & (GRID - 1)) * GRID + (cell_z & (GRID - 1))
        row = cells + (batch * GRID * GRID + index) * 8
        x, z = (cell_x.to(tl.float32) + 0.5) * CELL, (cell_z.to(tl.float32) + 0.5) * CELL
        near, kind = best, code
        t = slab(ox, oy, oz, ix, iy, iz, x, z, tl.load(row), tl.load(row + 2), tl.load(row + 1))
        near, kind = tl.minimum(near, t), tl.where(t < near, 2, kind)
        t = slab(ox, oy, oz, ix, iy, iz, x, z, tl.load(row + 3), tl.load(row + 5),
                 tl.load(row + 4))  # fmt: skip
        near, kind = tl.minimum(near, t), tl.where(t < near, 3, kind)
        t = ball(ox, oy, oz, dx, dy, dz, x, tl.load(row + 6), z, tl.load(row + 7))
        near, kind = tl.minimum(near, t), tl.where(t < near, 4, kind)
        along = car_near(seed_hash, frame, cell_z, x, 0)
        side = cell_z.to(tl.float32) * CELL + LANE
        t = slab(ox, oy, oz, ix, iy, iz, along, side, CAR_LENGTH, CAR_HEIGHT, CAR_WIDTH)
        near, kind = tl.minimum(near, t), tl.where(t < near, 5, kind)
        along = car_near(seed_hash, frame, cell_x, z, 1)
        side = cell_x.to(tl.float32) * CELL + LANE
        t = slab(ox, oy, oz, ix, iy, iz, side, along, CAR_WIDTH, CAR_HEIGHT, CAR_LENGTH)
        near, kind = tl.minimum(near, t), tl.where(t < near, 6, kind)
        nearer = near < best
        hit_x, hit_z = tl.where(nearer, cell_x, hit_x), tl.where(nearer, cell_z, hit_z)
        best, code = near, kind
        by_x = border_x < border_z
        cell_x = tl.where(by_x, cell_x + toward_x, cell_x)
        cell_z = tl.where(by_x, cell_z, cell_z + toward_z)
        border_x = tl.where(by_x, border_x + across_x, border_x)
        border_z = tl.where(by_x, border_z, border_z + across_z)

    # Store
    flat = code == 1
    hit_x = tl.where(flat, tl.floor((ox + best * dx) / CELL).to(tl.int32), hit_x)
    hit_z = tl.where(flat, tl.floor((oz + best * dz) / CELL).to(tl.int32), hit_z)
    tl.store(distance + at, best, inside)
    tl.store(code_out + at, code, inside)
    tl.store(cell_x_out + at, hit_x, inside)
    tl.store(cell_z_out + at, hit_z, inside)


def trace(scene, o: tuple, d: tuple, cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `raycast.trace`: (distance, code, cell_x, cell_z), each [B, N]."""
    origin, direction = torch.stack(o).contiguous(), torch.stack(d).contiguous()
    _, batch, rays = origin.shape
    distance = torch.empty(batch, rays, device=origin.device)
    code, cell_x, cell_z = (torch.empty_like(distance, dtype=torch.int32) for _ in range(3))
    balloons = scene.balloons.contiguous()
    trace_kernel[(triton.cdiv(rays, BLOCK), batch)](
        scene.city.cells.contiguous(), scene.city.seeds, scene.frames.contiguous(), balloons,
        origin, direction, distance, code, cell_x, cell_z, rays, cells, balloons.shape[1], BLOCK,
    )  # fmt: skip
    return distance, code, cell_x, cell_z


@cache
def refusal(device: torch.device) -> str | None:
    """Why the kernel cannot be used on a device: what failed, or where it differs; None if it can.

    Two small frames by both ways. Rounding may move a ray across an edge, so one in 500 may differ.
    """
    from mirage_hello.model.data.worlds import WorldConfig, Worlds

    shots = []
    for fused in (False, True):
        worlds = Worlds(WorldConfig(64, 64, 1, fused=fused), device)
        try:
            shots.append(worlds.render(worlds.clips([5, 6]), [40, 90], ["clay", "clay"]))
        except Exception as error:  # a compiler's errors have no common class
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    apart = [((a - b).abs() > 0.02 * a.abs() + 0.02).float().mean() for a, b in
             ((shots[0].depth, shots[1].depth), (shots[0].target, shots[1].target))]  # fmt: skip
    share = float(torch.stack(apart).max())
    return f"{share:.2%} of the pixels differ" if not share < 0.002 else None
