"""What is where: an endless seeded city, its cars and balloons, the camera's paths and the cuts.

Everything is a function of (seed, frame), so any frame can be made directly: cars and cameras
follow closed formulas, and what accumulates (snow, puddles, tracks) is a formula of the time.
The ground is a grid of square cells; streets run along the cell borders; a cell holds a podium
box, a tower box and a sphere (a tree's crown, a dome, a tank), any of which may be absent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_hello.model.data.noise import fractal_textures, uniform

CELL = 10.0  # world units a side; one unit is about 1.5 m
GRID = 64  # the city repeats after 64 cells = 640 units, beyond the fog
LANE = 0.95  # a car's centre from the cell border
CAR_LENGTH, CAR_WIDTH, CAR_HEIGHT = 1.05, 0.42, 0.95  # half, half, full
CAR_PERIOD = 27.0  # units between cars of one lane; > CELL + 2 CAR_LENGTH: one car a cell
BALLOONS = 3
CLIP_SCALARS = 32
HELD_OUT = 1 << 30  # training draws seeds below, evaluation at or above

# Columns of the cell table.
HALF_X, HALF_Z, PODIUM, TOWER_X, TOWER_Z, TOWER, SPHERE_Y, SPHERE_R = range(8)


@dataclass
class City:
    """The per-clip state that does not change with the frame.

    seeds int [B]; cells float32 [B, GRID * GRID, 8] (columns above); kinds float32
    [B, GRID * GRID] (0 building, 1 park); scalars float32 [B, 32], uniform, a clip's private
    dice (palette, wind, ...); textures float32 [B, 4, 256, 256].
    """

    seeds: Tensor
    cells: Tensor
    kinds: Tensor
    scalars: Tensor
    textures: Tensor


def build(seeds: Tensor) -> City:
    """The cities of these seeds (int [B]), on the device of `seeds`."""
    row = torch.arange(GRID, device=seeds.device, dtype=torch.int32)
    i, j, s = row[None, :, None], row[None, None, :], seeds[:, None, None]

    def dice(key: int) -> Tensor:
        return uniform(s, i, j, 1000 + key)

    park = dice(0) < 0.2
    domed = ~park & (dice(1) < 0.22)
    low = dice(2)
    podium = torch.where(dice(3) < 0.35, 1.3 + 1.2 * low, 2.5 + 4.0 * low)
    half_x, half_z = 2.3 + 1.1 * dice(4), 2.3 + 1.1 * dice(5)
    tower_x, tower_z = half_x * (0.35 + 0.4 * dice(6)), half_z * (0.35 + 0.4 * dice(7))
    tower = torch.where(dice(8) < 0.6, podium + 1.0 + 4.0 * dice(9).square(), podium * 0)
    radius = 1.0 + 0.9 * dice(10)
    trunk = torch.full_like(podium, 0.16)
    sphere_r = torch.where(park, radius, torch.where(domed, tower_x.minimum(tower_z), 0 * radius))
    crown = 1.5 + radius
    sphere_y = torch.where(park, crown, torch.maximum(tower, podium))
    columns = (
        torch.where(park, trunk, half_x),
        torch.where(park, trunk, half_z),
        torch.where(park, crown, podium),
        torch.where(park, trunk, tower_x),
        torch.where(park, trunk, tower_z),
        torch.where(park, 0 * tower, tower),
        sphere_y,
        sphere_r,
    )
    cells = torch.stack(columns, -1).flatten(1, 2)
    key = torch.arange(CLIP_SCALARS, device=seeds.device, dtype=torch.int32)
    scalars = uniform(seeds[:, None], key[None], 17)
    kinds = park.float().flatten(1)
    return City(seeds.to(torch.int32), cells, kinds, scalars, fractal_textures(seeds))


def scene_of(seeds: Tensor, frames: Tensor, cut_frames: int) -> tuple[Tensor, Tensor]:
    """Which scene a frame belongs to: cut k is at k L + (u_k - 1/2) L / 2, L = cut_frames.

    Args:
        seeds, frames: int [B].
        cut_frames: mean frames between cuts; 0 means no cut ever.

    Returns:
        (scene number int32 [B], frame number of its first frame int32 [B]).
    """
    frames = frames.to(torch.int32)
    if cut_frames == 0:
        return torch.zeros_like(frames), torch.zeros_like(frames)

    def start_of(k: Tensor) -> Tensor:
        jitter = (uniform(seeds, k, 31) - 0.5) * (0.5 * cut_frames)
        return torch.where(k <= 0, 0 * k, (k * cut_frames + jitter).to(torch.int32))

    k = torch.div(frames, cut_frames, rounding_mode="floor")
    k = torch.where(frames >= start_of(k + 1), k + 1, torch.where(frames < start_of(k), k - 1, k))
    return k, start_of(k)


@dataclass
class Camera:
    """position float32 [B, 3]; axes float32 [B, 3, 3], rows right, up, forward; scene int [B]."""

    position: Tensor
    axes: Tensor
    scene: Tensor


def camera_at(seeds: Tensor, frames: Tensor, cut_frames: int) -> Camera:
    """The camera of (seed, frame): a street dolly, a pan at a crossing, or an orbit above roofs.

    Each path is a closed loop of 200 to 500 frames, so what leaves the view comes back.

    Args:
        seeds, frames: int [B].
        cut_frames: as in `scene_of`.
    """
    scene, first = scene_of(seeds, frames, cut_frames)

    def dice(key: int) -> Tensor:
        return uniform(seeds, scene, 2000 + key)

    time = (frames - first).float()
    mode = torch.floor(3 * dice(0))
    base_x, base_z = CELL * torch.floor(GRID * dice(1)), CELL * torch.floor(GRID * dice(2))
    turn = torch.pi / 2 * torch.floor(4 * dice(3))
    phase = 2 * torch.pi * dice(4)
    wave = 2 * torch.pi * time / (240 + 240 * dice(5)) + phase
    slow = torch.sin(2 * torch.pi * time / (170 + 90 * dice(6)) + 5 * dice(7))
    # Street dolly: along the middle of a street, looking along it, gently to the sides.
    along = 22 * torch.sin(wave)
    dolly = (
        base_x + along * torch.cos(turn),
        1.7 + 1.3 * dice(8) + 0.4 * slow,
        base_z + along * torch.sin(turn),
        turn + 0.3 * slow,
        -0.02 + 0.05 * dice(9),
    )
    # Pan at a crossing, as from a lamp post.
    pan = (
        base_x,
        3.2 + 3.5 * dice(8) + 0.6 * slow,
        base_z,
        turn + 0.78 + 1.1 * torch.sin(wave),
        -0.12 - 0.08 * dice(9),
    )
    # Orbit around a cell's middle, above the roofs (14 is the tallest dome).
    radius, centre_x, centre_z = 13 + 5 * dice(9), base_x + CELL / 2, base_z + CELL / 2
    orbit = (
        centre_x + radius * torch.cos(wave),
        14.5 + 3 * dice(8) + 0.4 * slow,
        centre_z + radius * torch.sin(wave),
        wave + torch.pi + 0.12 * slow,
        -0.62 - 0.08 * slow,
    )
    x, y, z, yaw, pitch = (
        torch.where(mode == 0, a, torch.where(mode == 1, b, c))
        for a, b, c in zip(dolly, pan, orbit, strict=True)
    )
    forward = torch.stack(
        (torch.cos(yaw) * torch.cos(pitch), torch.sin(pitch), torch.sin(yaw) * torch.cos(pitch)), -1
    )
    right = torch.stack((-torch.sin(yaw), torch.zeros_like(yaw), torch.cos(yaw)), -1)
    up = torch.linalg.cross(right, forward)
    return Camera(torch.stack((x, y, z), -1), torch.stack((right, up, forward), 1), scene)


def car_speed(seeds: Tensor, lane: Tensor, axis: int) -> Tensor:
    """Signed speed of a street's cars in units a frame: 0.08 to 0.2, direction by the dice.

    Args:
        seeds: int, broadcastable with lane.
        lane: int, the cell row (axis 0: cars along x) or column (axis 1: cars along z).
    """
    sign = torch.where(uniform(seeds, lane, 41 + axis) < 0.5, -1.0, 1.0)
    return sign * (0.08 + 0.12 * uniform(seeds, lane, 43 + axis))


def car_near(
    seeds: Tensor, frames: Tensor, lane: Tensor, middle: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """The car of a lane that is nearest to a place: x_k = phase + v t + k CAR_PERIOD.

    Args:
        seeds, frames: int [B, 1].
        lane: int [B, N]; middle: float32 [B, N], the place along the lane.

    Returns:
        (its position along the lane [B, N], its number k int32 [B, N]).
    """
    phase = CAR_PERIOD * uniform(seeds, lane, 45 + axis)
    moved = phase + car_speed(seeds, lane, axis) * frames
    k = torch.round((middle - moved) / CAR_PERIOD)
    return moved + k * CAR_PERIOD, k.to(torch.int32)


def balloons_at(seeds: Tensor, frames: Tensor, camera: Camera) -> Tensor:
    """Balloons that drift on ellipses around the scene: float32 [B, BALLOONS, 4], x y z radius.

    They belong to the scene (its dice), and hang where that scene's camera looks most.
    """
    number = torch.arange(BALLOONS, device=seeds.device, dtype=torch.int32)[None]
    s, scene = seeds[:, None], camera.scene[:, None]

    def dice(key: int) -> Tensor:
        return uniform(s, scene, number, 3000 + key)

    base_x = CELL * torch.floor(GRID * uniform(s, scene, 2001))
    base_z = CELL * torch.floor(GRID * uniform(s, scene, 2002))
    wave = 2 * torch.pi * (frames[:, None].float() / (300 + 300 * dice(0)) + dice(1))
    reach = 7 + 9 * dice(2)
    x = base_x + 8 * (dice(3) - 0.5) + reach * torch.cos(wave)
    z = base_z + 8 * (dice(4) - 0.5) + reach * torch.sin(wave)
    y = 8.5 + 4 * dice(5) + 0.8 * torch.sin(3 * wave)
    return torch.stack((x, y, z, 0.6 + 0.5 * dice(6)), -1)
