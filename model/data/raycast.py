"""First hit of each ray with the city: exact intersections, cell by cell along the ray.

A ray visits the cells it crosses in order (the grid traversal of Amanatides and Woo, 1987) and
tests what a cell holds: two boxes, a sphere, and at most one car of each of its two lanes. The
number of cells is fixed, so all the rays of a batch run the same elementwise program.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.model.data import city as c
from mirage_hello.model.data.city import CELL, GRID, City

SKY, GROUND, PODIUM, TOWER, SPHERE, CAR_X, CAR_Z, BALLOON = range(8)
FAR = 1e4

Vector = tuple[Tensor, ...]  # x, y, z


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """a_x b_x + a_y b_y + a_z b_z."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@dataclass
class Scene:
    """What the rays of one batch of frames meet: cities, frame numbers [B, 1], balloons."""

    city: City
    frames: Tensor
    balloons: Tensor

    @property
    def seeds(self) -> Tensor:
        return self.city.seeds[:, None]


@dataclass
class Hits:
    """First hits of rays, each field [B, N].

    distance float32 (FAR for the sky); code int32 (names above); cell_x, cell_z int32, the cell
    of what was hit (a balloon: its number in cell_x); points, normals: three float32 each.
    """

    distance: Tensor
    code: Tensor
    cell_x: Tensor
    cell_z: Tensor
    points: Vector
    normals: Vector


def slab(o: Vector, inverse: Vector, low: tuple, high: tuple) -> Tensor:
    """Distance to the entry of an axis-aligned box, FAR where the ray misses or starts inside."""
    near, far = torch.full_like(o[0], -FAR), torch.full_like(o[0], FAR)
    for origin, inv, lo, hi in zip(o, inverse, low, high, strict=True):
        a, b = (lo - origin) * inv, (hi - origin) * inv
        near = torch.maximum(near, torch.minimum(a, b))
        far = torch.minimum(far, torch.maximum(a, b))
    return torch.where((near <= far) & (near > 1e-3), near, FAR)


def ball(o: Vector, d: Vector, centre: Vector, radius: Tensor) -> Tensor:
    """Distance to the entry of a sphere, FAR where the ray misses or starts inside."""
    x, y, z = (a - b for a, b in zip(o, centre, strict=True))
    half_b = dot((x, y, z), d)
    discriminant = half_b * half_b - (dot((x, y, z), (x, y, z)) - radius * radius)
    t = -half_b - discriminant.clamp_min(0).sqrt()
    return torch.where((discriminant > 0) & (t > 1e-3) & (radius > 0), t, FAR)


def cell_index(cell_x: Tensor, cell_z: Tensor) -> Tensor:
    """Row of the cell table for cells [B, N] anywhere on the endless grid: int64 [B, N]."""
    return ((cell_x & (GRID - 1)) * GRID + (cell_z & (GRID - 1))).long()


def cell_columns(cells: Tensor, cell_x: Tensor, cell_z: Tensor) -> tuple[Tensor, ...]:
    """The eight columns of the cell table at these cells, each [B, N]."""
    index = cell_index(cell_x, cell_z)
    rows = torch.gather(cells, 1, index[..., None].expand(-1, -1, cells.shape[-1]))
    return rows.unbind(-1)


def cell_hits(
    cells: Tensor,
    seeds: Tensor,
    frames: Tensor,
    o: Vector,
    d: Vector,
    inverse: Vector,
    cell_x: Tensor,
    cell_z: Tensor,
) -> tuple[Tensor, Tensor]:
    """The nearest hit among what one cell holds: (distance, code), both [B, N]."""
    row = cell_columns(cells, cell_x, cell_z)
    x, z = (cell_x + 0.5) * CELL, (cell_z + 0.5) * CELL
    hx, hz, tx, tz = row[c.HALF_X], row[c.HALF_Z], row[c.TOWER_X], row[c.TOWER_Z]
    ground = torch.zeros_like(x)
    found = [
        (PODIUM, slab(o, inverse, (x - hx, ground, z - hz), (x + hx, row[c.PODIUM], z + hz))),
        (TOWER, slab(o, inverse, (x - tx, ground, z - tz), (x + tx, row[c.TOWER], z + tz))),
        (SPHERE, ball(o, d, (x, row[c.SPHERE_Y], z), row[c.SPHERE_R])),
    ]
    length, width, top = c.CAR_LENGTH, c.CAR_WIDTH, ground + c.CAR_HEIGHT
    along, _ = c.car_near(seeds, frames, cell_z, x, 0)
    side = cell_z * CELL + c.LANE
    box = ((along - length, ground, side - width), (along + length, top, side + width))
    found.append((CAR_X, slab(o, inverse, *box)))
    along, _ = c.car_near(seeds, frames, cell_x, z, 1)
    side = cell_x * CELL + c.LANE
    box = ((side - width, ground, along - length), (side + width, top, along + length))
    found.append((CAR_Z, slab(o, inverse, *box)))
    best = torch.full_like(x, FAR)
    code = torch.zeros_like(cell_x)
    for name, t in found:
        nearer = t < best
        best, code = torch.where(nearer, t, best), torch.where(nearer, name, code)
    return best, code


def traverse_step(
    cells: Tensor,
    seeds: Tensor,
    frames: Tensor,
    o: Vector,
    d: Vector,
    inverse: Vector,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Test the ray's cell, keep the nearest hit, move to the next cell."""
    cell_x, cell_z, border_x, border_z, best, code, hit_x, hit_z = state
    t, kind = cell_hits(cells, seeds, frames, o, d, inverse, cell_x, cell_z)
    nearer = t < best
    best, code = torch.where(nearer, t, best), torch.where(nearer, kind, code)
    hit_x, hit_z = torch.where(nearer, cell_x, hit_x), torch.where(nearer, cell_z, hit_z)
    by_x = border_x < border_z
    step_x = torch.where(d[0] > 0, 1, -1).to(torch.int32)
    step_z = torch.where(d[2] > 0, 1, -1).to(torch.int32)
    cell_x = torch.where(by_x, cell_x + step_x, cell_x)
    cell_z = torch.where(by_x, cell_z, cell_z + step_z)
    border_x = torch.where(by_x, border_x + CELL * inverse[0].abs(), border_x)
    border_z = torch.where(by_x, border_z, border_z + CELL * inverse[2].abs())
    return cell_x, cell_z, border_x, border_z, best, code, hit_x, hit_z


def trace(
    scene: Scene, o: Vector, d: Vector, cells: int, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(distance, code, cell_x, cell_z) of the first hit, each [B, N].

    Args:
        scene: what the rays meet.
        o, d: origins and unit directions, components [B, N].
        cells: how many cells a ray crosses before it counts as sky; 14 reach about 110 units.
        fused: as one Triton kernel (CUDA); the same arithmetic.
    """
    if fused:
        from mirage_hello.model.data import raycast_triton

        return raycast_triton.trace(scene, o, d, cells)
    d = tuple(torch.where(k.abs() < 1e-6, 1e-6, k) for k in d)
    inverse = tuple(1.0 / k for k in d)
    cell_x, cell_z = (torch.floor(k / CELL).to(torch.int32) for k in (o[0], o[2]))
    border_x = ((cell_x + (d[0] > 0)) * CELL - o[0]) * inverse[0]
    border_z = ((cell_z + (d[2] > 0)) * CELL - o[2]) * inverse[2]
    best = torch.where(d[1] < 0, -o[1] * inverse[1], FAR)
    best = torch.where(best > 1e-3, best, FAR)
    code = torch.where(best < FAR, GROUND, SKY).to(torch.int32)
    hovering = scene.balloons
    for i in range(hovering.shape[1]):
        centre = tuple(hovering[:, i, k : k + 1] for k in range(3))
        t = ball(o, d, centre, hovering[:, i, 3:4])
        code = torch.where(t < best, BALLOON, code)
        best = torch.minimum(best, t)
    state: tuple[Tensor, ...] = (cell_x, cell_z, border_x, border_z, best, code, cell_x, cell_z)
    for _ in range(cells):
        state = traverse_step(scene.city.cells, scene.seeds, scene.frames, o, d, inverse, state)
    best, code, hit_x, hit_z = state[4:]
    # The ground lies in the cell of the point itself, not in the one the ray began in.
    flat = code == GROUND
    hit_x = torch.where(flat, torch.floor((o[0] + best * d[0]) / CELL).to(torch.int32), hit_x)
    hit_z = torch.where(flat, torch.floor((o[2] + best * d[2]) / CELL).to(torch.int32), hit_z)
    return best, code, hit_x, hit_z


def box_normal(p: Vector, centre: Vector, half: Vector) -> Vector:
    """Outward normal of the box face a point lies on: the axis with the largest |p - c| / h."""
    r = [(a - b) / h.clamp_min(1e-3) for a, b, h in zip(p, centre, half, strict=True)]
    largest = torch.maximum(torch.maximum(r[0].abs(), r[1].abs()), r[2].abs())
    on_y = r[1].abs() >= largest
    on_x = (r[0].abs() >= largest) & ~on_y
    on_z = ~on_x & ~on_y
    return (on_x * r[0].sign(), on_y * r[1].sign(), on_z * r[2].sign())


def hit_boxes(scene: Scene, code: Tensor, x: Tensor, z: Tensor) -> tuple[Vector, Vector]:
    """Centre and half extents of the box (or sphere: radius thrice) behind each hit code."""
    row = cell_columns(scene.city.cells, x, z)
    middle_x, middle_z = (x + 0.5) * CELL, (z + 0.5) * CELL
    along_x, _ = c.car_near(scene.seeds, scene.frames, z, middle_x, 0)
    along_z, _ = c.car_near(scene.seeds, scene.frames, x, middle_z, 1)
    length, width, tall = c.CAR_LENGTH, c.CAR_WIDTH, c.CAR_HEIGHT / 2

    def pick(podium, tower, sphere, car_x, car_z):
        value = torch.where(code == TOWER, tower, podium)
        value = torch.where(code == SPHERE, sphere, value)
        return torch.where(code == CAR_X, car_x, torch.where(code == CAR_Z, car_z, value))

    lane_x, lane_z = x * CELL + c.LANE, z * CELL + c.LANE
    centre = (
        pick(middle_x, middle_x, middle_x, along_x, lane_x),
        pick(row[c.PODIUM] / 2, row[c.TOWER] / 2, row[c.SPHERE_Y], tall, tall),
        pick(middle_z, middle_z, middle_z, lane_z, along_z),
    )
    r = row[c.SPHERE_R]
    half = (
        pick(row[c.HALF_X], row[c.TOWER_X], r, length, width),
        pick(row[c.PODIUM] / 2, row[c.TOWER] / 2, r, tall, tall),
        pick(row[c.HALF_Z], row[c.TOWER_Z], r, width, length),
    )
    return centre, half


def hits_of(scene: Scene, o: Vector, d: Vector, cells: int, fused: bool = False) -> Hits:
    """`trace`, with the points and the surface normals."""
    t, code, x, z = trace(scene, o, d, cells, fused)
    p = tuple(a + t * b for a, b in zip(o, d, strict=True))
    centre, half = hit_boxes(scene, code, x, z)
    box = box_normal(p, centre, half)
    toward = [a - b for a, b in zip(p, centre, strict=True)]
    hovering = scene.balloons
    nearest = torch.full_like(t, FAR)
    which = x
    for i in range(hovering.shape[1]):
        away = [p[k] - hovering[:, i, k : k + 1] for k in range(3)]
        off = (dot(away, away).sqrt() / hovering[:, i, 3:4] - 1).abs()
        mine = (code == BALLOON) & (off < nearest)
        toward = [torch.where(mine, a, b) for a, b in zip(away, toward, strict=True)]
        nearest, which = torch.where(mine, off, nearest), torch.where(mine, i, which)
    length = dot(toward, toward).sqrt().clamp_min(1e-6)
    round_hit = (code == SPHERE) | (code == BALLOON)
    flat = (code == GROUND) | (code == SKY)
    up = (0.0, 1.0, 0.0)
    n = tuple(
        torch.where(flat, up[k], torch.where(round_hit, toward[k] / length, box[k]))
        for k in range(3)
    )
    return Hits(t, code, which, z, p, n)
