"""Light, weather and colour that the styles share.

Colours are linear float32 [B, 3, N]; amounts are float32 [B, N]; both for N rays.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.model.data import city as c
from mirage_hello.model.data import raycast as r
from mirage_hello.model.data.city import CELL
from mirage_hello.model.data.noise import hashed, uniform
from mirage_hello.model.data.raycast import Vector
from mirage_hello.model.data.surface import Look, Surface, smooth


def mix(a: Tensor, b: Tensor, amount: Tensor | float) -> Tensor:
    """a + (b - a) amount, where an amount [B, N] applies to colours [B, 3, N]."""
    if isinstance(amount, Tensor) and amount.dim() == 2:
        amount = amount[:, None]
    return a + (b - a) * amount


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A constant on a device, copied there once: each copy would wait for the device."""
    return torch.tensor(values, device=device).view(1, -1, 1)


def rgb(like: Tensor, red: float, green: float, blue: float) -> Tensor:
    """A constant colour [1, 3, 1] on the device of `like`."""
    return constant((red, green, blue), like.device)


def hue(angle: Tensor, saturation: float = 1.0) -> Tensor:
    """1 - s + s (1/2 + 1/2 cos(2 pi (angle - k/3))), k = 0, 1, 2: angles [B, N] -> [B, 3, N]."""
    k = torch.arange(3, device=angle.device).view(1, 3, 1) / 3
    wheel = 0.5 + 0.5 * torch.cos(2 * torch.pi * (angle[:, None] - k))
    return 1 - saturation + saturation * wheel


def sun_direction(look: Look, elevation: float, die: int = 1) -> Vector:
    """Toward the light, at this elevation (radians) and the clip's own azimuth: [B, 1] each."""
    azimuth = 2 * torch.pi * look.scalar(die)
    flat, high = math.cos(elevation), math.sin(elevation)
    return (flat * torch.cos(azimuth), high + 0 * azimuth, flat * torch.sin(azimuth))


def sunlight(look: Look, sun: Vector, cells: int = 5) -> Tensor:
    """max(0, n . sun) where no cell on the way blocks the light, else 0: [B, N]."""
    n, p = look.hits.normals, look.hits.points
    facing = r.dot(n, sun)
    origin = tuple(a + 0.02 * b for a, b in zip(p, n, strict=True))
    direction = tuple(k.expand_as(facing) for k in sun)
    distance, _, _, _ = r.trace(look.scene, origin, direction, cells, look.fused)
    return facing.clamp_min(0) * (distance >= r.FAR)


def ambient(look: Look, s: Surface) -> Tensor:
    """Open-sky share, analytic: dark where ground meets walls and cars, and under tree crowns."""
    scene, hits = look.scene, look.hits
    x, y, z = hits.points
    row = r.cell_columns(scene.city.cells, hits.cell_x, hits.cell_z)
    mid_x, mid_z = (hits.cell_x + 0.5) * CELL, (hits.cell_z + 0.5) * CELL
    away_x = ((x - mid_x).abs() - row[c.HALF_X]).clamp_min(0)
    away_z = ((z - mid_z).abs() - row[c.HALF_Z]).clamp_min(0)
    near_wall = 0.55 + 0.45 * smooth(0.0, 2.0, (away_x**2 + away_z**2).sqrt())
    along, _ = c.car_near(scene.seeds, scene.frames, hits.cell_z, mid_x, 0)
    off_x = ((x - along).abs() - c.CAR_LENGTH).clamp_min(0)
    off_z = ((z - hits.cell_z * CELL - c.LANE).abs() - c.CAR_WIDTH).clamp_min(0)
    near_car = smooth(-0.25, 0.5, (off_x**2 + off_z**2).sqrt())
    along, _ = c.car_near(scene.seeds, scene.frames, hits.cell_x, mid_z, 1)
    off_z = ((z - along).abs() - c.CAR_LENGTH).clamp_min(0)
    off_x = ((x - hits.cell_x * CELL - c.LANE).abs() - c.CAR_WIDTH).clamp_min(0)
    near_car = near_car * smooth(-0.25, 0.5, (off_x**2 + off_z**2).sqrt())
    on_wall = 0.6 + 0.4 * smooth(0.0, 2.5, y)
    rounded = 0.65 + 0.35 * hits.normals[1]
    value = torch.where(s.ground, near_wall * near_car, torch.where(s.wall | s.trunk, on_wall, 1.0))
    return torch.where(s.tree | s.dome | s.balloon, rounded, value)


def falling(look: Look, speed: float, stretch: float, size: float, layers: int) -> Tensor:
    """Rain streaks or snow flakes between camera and scene: opacity [B, N].

    Each layer is a grid of cells on the camera's image, one drop a cell, that falls with time.
    """
    rows = torch.linspace(0, 1, look.height, device=look.time.device)
    columns = torch.linspace(0, look.width / look.height, look.width, device=look.time.device)
    y = rows.repeat_interleave(look.width)[None]
    x = columns.repeat(look.height)[None]
    total = torch.zeros_like(look.hits.distance)
    yaw = torch.atan2(look.axes[:, 2, 2], look.axes[:, 2, 0])[:, None]
    for layer in range(layers):
        density = 9.0 + 7.0 * layer
        across = density * (x + 0.9 * yaw) + 0.6 * torch.sin(look.time / 30 + layer)
        down = density / stretch * y - speed / stretch * look.time * density / 9
        i, j = across.floor(), down.floor()
        key = hashed(look.scene.seeds, i.to(torch.int32), j.to(torch.int32), 500 + layer)
        centre_x, centre_y = 0.2 + 0.6 * uniform(key, 1), 0.2 + 0.6 * uniform(key, 2)
        off = ((across - i - centre_x) ** 2 + (down - j - centre_y) ** 2 * (1.0 + 0 * y)).sqrt()
        total = torch.maximum(total, smooth(size, 0.4 * size, off) * (0.9 - 0.15 * layer))
    return total


def bloom(look: Look, colour: Tensor, threshold: float, strength: float) -> Tensor:
    """Add the light above `threshold`, blurred over about 1/24 and 1/10 of the height."""
    image = colour.view(-1, 3, look.height, look.width)
    bright = (image - threshold).clamp(0, 3)
    total = torch.zeros_like(image)
    for share in (24, 10):
        factor = max(1, look.height // (2 * share))
        small = F.avg_pool2d(bright, factor, ceil_mode=True)
        small = F.avg_pool2d(small, 3, 1, 1, count_include_pad=False)
        small = F.avg_pool2d(small, 3, 1, 1, count_include_pad=False)
        total += F.interpolate(small, image.shape[2:], mode="bilinear", align_corners=False)
    return colour + strength * total.flatten(2)


def film(colour: Tensor) -> Tensor:
    """Linear light to display: x (2.51 x + 0.03) / (x (2.43 x + 0.59) + 0.14), then gamma 2.2.

    Source: the filmic curve fitted by K. Narkowicz (2015) to the ACES reference transform.
    """
    x = colour.clamp_min(0)
    x = (x * (2.51 * x + 0.03)) / (x * (2.43 * x + 0.59) + 0.14)
    return x.clamp(0, 1) ** (1 / 2.2)


def outline(look: Look, s: Surface) -> Tensor:
    """1 where a ray and its right or lower neighbour hit different objects or faces: [B, N]."""
    n = look.hits.normals
    face = n[0] + 3 * n[1] + 5 * n[2]
    rounded = s.tree | s.dome | s.balloon
    face = torch.where(rounded, 9.0, face)
    shape = (-1, look.height, look.width)
    face, ident = face.view(shape), s.ident.view(shape)
    edge = torch.zeros_like(face)
    across = (ident[:, :, 1:] != ident[:, :, :-1]) | (
        face[:, :, 1:] != face[:, :, :-1]
    ).logical_and((face[:, :, 1:] - face[:, :, :-1]).abs() > 0.5)
    down = (ident[:, 1:] != ident[:, :-1]) | ((face[:, 1:] - face[:, :-1]).abs() > 0.5)
    edge[:, :, 1:] = across.float()
    edge[:, 1:] = torch.maximum(edge[:, 1:], down.float())
    return edge.flatten(1)


def kind_colours(look: Look, s: Surface, table: dict[str, tuple[float, float, float]]) -> Tensor:
    """One flat colour per kind of surface."""
    masks = {
        "wall": s.wall,
        "roof": s.roof,
        "ground": s.ground,
        "tree": s.tree,
        "trunk": s.trunk,
        "dome": s.dome,
        "car": s.car,
        "balloon": s.balloon,
        "sky": s.sky,
    }
    colour = torch.zeros(*s.u.shape[:1], 3, s.u.shape[1], device=s.u.device)
    for name, value in table.items():
        colour = torch.where(masks[name][:, None], rgb(s.u, *value), colour)
    return colour
