"""What a ray sees: the object's identity, texture coordinates, window panes, tyre tracks.

Amounts are float32 [B, N] and colours float32 [B, 3, N] for N rays; masks are bool [B, N].
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mirage_hello.model.data import city as c
from mirage_hello.model.data import raycast as r
from mirage_hello.model.data.city import CELL, GRID
from mirage_hello.model.data.noise import hashed, sample_texture, uniform
from mirage_hello.model.data.raycast import Hits, Scene, Vector


@dataclass
class Look:
    """All that a style needs for one batch of frames.

    scene, hits, directions (unit, components [B, N]); time float32 [B, 1] in frames; height,
    width of the ray grid; pixel float32 scalar, world units a ray's footprint grows by per
    unit of distance; axes float32 [B, 3, 3] of the camera; fused as in `raycast.trace`.
    """

    scene: Scene
    hits: Hits
    directions: Vector
    time: Tensor
    height: int
    width: int
    pixel: float
    axes: Tensor
    fused: bool

    def scalar(self, number: int) -> Tensor:
        """The clip's die `number`, uniform in [0, 1): [B, 1]."""
        return self.scene.city.scalars[:, number : number + 1]


def take(value, rows: Tensor):
    """The rows of a batch: of a tensor, a tuple of them, or a dataclass that holds them."""
    if isinstance(value, Tensor):
        return value if value.dim() == 0 else value[rows]
    if isinstance(value, tuple):
        return tuple(take(v, rows) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: take(getattr(value, f.name), rows) for f in fields(value)})
    return value


@dataclass
class Surface:
    """Surface of each hit: texture coordinates u, v in world units, dice of the object, masks.

    ident int32 (the same for all points of one object, in every frame); kind masks are bool.
    along, extent: position across a wall from its left edge, and the wall's width.
    """

    u: Tensor
    v: Tensor
    ident: Tensor
    along: Tensor
    extent: Tensor
    top: Tensor
    wall: Tensor
    roof: Tensor
    ground: Tensor
    tree: Tensor
    trunk: Tensor
    dome: Tensor
    car: Tensor
    balloon: Tensor
    sky: Tensor

    def dice(self, key: int) -> Tensor:
        """A uniform number of the object, [B, N]."""
        return uniform(self.ident, key)


def surface_of(look: Look, hits: Hits | None = None) -> Surface:
    """The surface behind these hits (default: the camera's)."""
    hits = hits or look.hits
    scene, code = look.scene, hits.code
    index = r.cell_index(hits.cell_x, hits.cell_z)
    park = torch.gather(scene.city.kinds, 1, index) > 0.5
    centre, half = r.hit_boxes(scene, code, hits.cell_x, hits.cell_z)
    x, y, z = hits.points
    _, k_x = c.car_near(scene.seeds, scene.frames, hits.cell_z, (hits.cell_x + 0.5) * CELL, 0)
    _, k_z = c.car_near(scene.seeds, scene.frames, hits.cell_x, (hits.cell_z + 0.5) * CELL, 1)
    car_x, car_z = code == r.CAR_X, code == r.CAR_Z
    car = car_x | car_z
    # A car's paint moves with it; its number k is per lane, so the lane is part of the identity.
    first = torch.where(car_x, k_x, torch.where(car_z, k_z, hits.cell_x & (GRID - 1)))
    second = torch.where(car_x, hits.cell_z, torch.where(car_z, hits.cell_x, hits.cell_z))
    balloon, ground, sky = code == r.BALLOON, code == r.GROUND, code == r.SKY
    second = torch.where(balloon, 0, second & (GRID - 1))
    ident = hashed(scene.seeds, first, second, code)
    ident = torch.where(ground | sky, hashed(scene.seeds, code), ident)
    local_x = torch.where(car, x - centre[0], x)
    local_z = torch.where(car, z - centre[2], z)
    on_x, on_y = hits.normals[0].abs() > 0.9, hits.normals[1].abs() > 0.9
    sphere = (code == r.SPHERE) | balloon
    built = ((code == r.PODIUM) | (code == r.TOWER)) & ~park
    u = torch.where(sphere, x + z, torch.where(on_x & ~on_y, local_z, local_x))
    v = torch.where(on_y & ~sphere, local_z, y)
    along = torch.where(on_x, z - centre[2] + half[2], x - centre[0] + half[0])
    extent = 2 * torch.where(on_x, half[2], half[0])
    return Surface(
        u,
        v,
        ident,
        along,
        extent,
        centre[1] + half[1],
        built & ~on_y,
        built & on_y,
        ground,
        (code == r.SPHERE) & park,
        (code == r.PODIUM) & park,
        (code == r.SPHERE) & ~park,
        car,
        balloon,
        sky,
    )


def smooth(low: float | Tensor, high: float, x: Tensor) -> Tensor:
    """3 s^2 - 2 s^3 with s = clamp((x - low) / (high - low), 0, 1); low > high falls."""
    s = ((x - low) / (high - low)).clamp(0, 1)
    return s * s * (3 - 2 * s)


def texture(look: Look, s: Surface, channel: int, period: float) -> Tensor:
    """The clip's own texture on each surface, [B, N]: about 0.5 +- 0.2; still in the world."""
    shift = torch.where(s.ground, 0.0, 37.0 * s.dice(11))
    return sample_texture(look.scene.city.textures, channel, s.u + shift, s.v, period)


def windows(look: Look, s: Surface, hits: Hits, floor: float = 1.25, bay: float = 1.15):
    """Window panes of the walls: (pane in [0, 1], the window's dice ident int32), both [B, N].

    Far away, where a ray's footprint nears a pane, the pane fades into its mean (0.36), so that
    distant walls do not flicker.
    """
    bays = torch.round(s.extent / bay).clamp_min(1)
    column = s.along / s.extent * bays
    storey = s.v / floor
    inside = torch.minimum(
        (column.frac() - 0.5).abs() * -1 + 0.32, (storey.frac() - 0.52).abs() * -1 + 0.3
    )
    print_size = (hits.distance * look.pixel).clamp_min(0.02)
    pane = (0.5 + inside / print_size).clamp(0, 1)
    fade = smooth(0.35, 0.8, print_size)
    pane = pane + (0.36 - pane) * fade
    ground_floor = s.v < 0.35
    pane = torch.where(s.wall & ~ground_floor & (s.v < s.top - 0.3), pane, 0.0)
    face = (hits.normals[0] * 2 + hits.normals[2]).to(torch.int32)
    ident = hashed(s.ident, column.floor().to(torch.int32), storey.floor().to(torch.int32), face)
    return pane, ident


def track_age(look: Look, s: Surface) -> tuple[Tensor, Tensor]:
    """Frames since a tyre passed each ground point, and how deep inside the tyre's track it is.

    Returns:
        (age float32 [B, N], coverage float32 [B, N] in [0, 1]; 0 off the ground).
    """
    scene, hits = look.scene, look.hits
    x, _, z = hits.points
    best = torch.full_like(x, r.FAR)
    cover = torch.zeros_like(x)
    for axis, place, across, lane in ((0, x, z, hits.cell_z), (1, z, x, hits.cell_x)):
        speed = c.car_speed(scene.seeds, lane, axis)
        rear, _ = c.car_near(scene.seeds, scene.frames, lane, place, axis)
        behind = torch.remainder((rear - place) * speed.sign(), c.CAR_PERIOD)
        off = ((across - lane * CELL - c.LANE).abs() - 0.3).abs()
        inside = smooth(0.17, 0.08, off) * s.ground
        age = behind / speed.abs()
        newer = inside > cover
        best, cover = torch.where(newer, age, best), torch.where(newer, inside, cover)
    return best, cover
