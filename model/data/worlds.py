"""Endless procedural worlds: an input view, styled truth, depth and motion for any (seed, frame).

    worlds = Worlds(WorldConfig(height=128, width=128), device="cuda")
    clips = worlds.clips(seeds)                        # once a clip: city, dice, textures
    shot = worlds.render(clips, frames, ["clay", ...]) # any frames, in any order

The styles hold what the input view does not (a clip's textures, palette, lit windows, snow that
grows, tracks that fade), still in the world: a model must remember it. See docs/worlds.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_hello.model.data import city as c
from mirage_hello.model.data import noise
from mirage_hello.model.data import raycast as r
from mirage_hello.model.data.city import Camera, City
from mirage_hello.model.data.styles import STYLES, VIEWS
from mirage_hello.model.data.surface import Look, surface_of, take


@dataclass(frozen=True)
class WorldConfig:
    """Size and motion of the rendered clips.

    height, width in pixels; supersample: rays per pixel and axis; fov: vertical field of view in
    radians; cut_frames: mean frames between scene cuts (0: none); cells, shadow_cells: how far
    rays go, in city cells; view: "plain" (flat shaded, as an engine's debug view) or "camera".
    fused traces the rays in one Triton kernel (CUDA). motion=False leaves motion, previous_depth
    and cut at zero, for training.
    """

    height: int = 256
    width: int = 256
    supersample: int = 2
    fov: float = 1.05
    cut_frames: int = 0
    cells: int = 14
    view: str = "plain"
    fused: bool = False
    motion: bool = True


@dataclass
class Shot:
    """One batch of frames.

    view, target: float32 [B, 3, H, W] in [-1, 1]; depth [B, 1, H, W] in world units (1e4 sky);
    motion [B, 2, H, W]: pixels (x, y) to add to a position to find the same surface point one
    frame earlier; previous_depth [B, 1, H, W]: how far that point then was from the camera;
    cut bool [B]: this frame begins a scene (its motion means nothing).
    """

    view: Tensor
    target: Tensor
    depth: Tensor
    motion: Tensor
    previous_depth: Tensor
    cut: Tensor


class Worlds:
    """The renderer; it keeps its configuration and the row numbers of mixed batches."""

    def __init__(self, config: WorldConfig, device: str | torch.device = "cpu"):
        if config.view not in VIEWS:
            known = ", ".join(VIEWS)
            raise ValueError(f"worlds: unknown view {config.view!r}; known views: {known}")
        self.config = config
        self.device = torch.device(device)
        self.kept_rows: dict[tuple[int, ...], Tensor] = {}

    def clips(self, seeds: Sequence[int] | Tensor) -> City:
        """The worlds of these seeds (int [B]): build once, render many frames."""
        return c.build(torch.as_tensor(seeds).to(self.device, torch.int32))

    @torch.no_grad()
    def render(
        self, clips: City, frames: Tensor | Sequence[int], styles: Sequence[str] | None
    ) -> Shot:
        """The shots of frame frames[b] of clip b in style styles[b].

        Args:
            clips: of `clips`, B of them.
            frames: int [B], any order, >= 0.
            styles: B style names; None renders the input view alone (target is then a copy of it).

        Raises:
            ValueError: a length differs from B, or a style is unknown (the known ones are named).
        """
        frames = torch.as_tensor(frames).to(self.device, torch.int32)
        batch = clips.seeds.shape[0]
        if frames.shape != (batch,) or (styles is not None and len(styles) != batch):
            raise ValueError(
                f"worlds: clips, frames and styles must have one length (got {batch}, "
                f"{tuple(frames.shape)}, {styles and len(styles)}); give each clip one of both"
            )
        unknown = [s for s in styles or () if s not in STYLES]
        if unknown:
            raise ValueError(f"worlds: unknown style {unknown[0]!r}; known: {', '.join(STYLES)}")
        token = noise.fused.set(self.config.fused)
        try:
            return self.shot(clips, frames, styles)
        finally:
            noise.fused.reset(token)

    def shot(self, clips: City, frames: Tensor, styles: Sequence[str] | None) -> Shot:
        """`render` of arguments that are known to be good."""
        config, batch = self.config, len(frames)
        height, width = config.height * config.supersample, config.width * config.supersample
        camera = c.camera_at(clips.seeds, frames, config.cut_frames)
        look = self.first_look(clips, frames, camera, height, width)
        surface = surface_of(look)
        view = VIEWS[config.view](look, surface)
        target = view.clone()
        for style in dict.fromkeys(styles or ()):
            chosen = [i for i, s in enumerate(styles or ()) if s == style]
            if len(chosen) == batch:
                target = STYLES[style](look, surface)
                break
            rows = self.rows(tuple(chosen))
            part = take(look, rows)
            target[rows] = STYLES[style](part, surface_of(part))
        motion, before, cut = self.motion(look, clips, frames, camera)
        depth = look.hits.distance.view(batch, 1, height, width)
        step = config.supersample
        return Shot(
            self.pixels(view, height, width),
            self.pixels(target, height, width),
            depth[..., step // 2 :: step, step // 2 :: step],
            motion[..., step // 2 :: step, step // 2 :: step] / step,
            before[..., step // 2 :: step, step // 2 :: step],
            cut,
        )

    def rows(self, numbers: tuple[int, ...]) -> Tensor:
        """Indices on the device, copied there once: a captured frame must not wait for a copy."""
        if numbers not in self.kept_rows:
            self.kept_rows[numbers] = torch.tensor(numbers).to(self.device)
        return self.kept_rows[numbers]

    def pixels(self, colour: Tensor, height: int, width: int) -> Tensor:
        """Display colours [B, 3, N] of all rays to pixels [B, 3, H, W] in [-1, 1]."""
        image = colour.clamp(0, 1).view(-1, 3, height, width)
        return 2 * F.avg_pool2d(image, self.config.supersample) - 1

    def first_look(self, clips: City, frames: Tensor, camera: Camera, height: int, width: int):
        """Shoot the camera's rays: a `Look` with the first hits."""
        half = torch.tan(torch.tensor(self.config.fov / 2)).item()
        v = (1 - (torch.arange(height, device=self.device) + 0.5) * (2 / height)) * half
        u = ((torch.arange(width, device=self.device) + 0.5) * (2 / width) - 1) * half
        u = u * (width / height)
        grid = torch.stack(
            (u.repeat(height), v.repeat_interleave(width), torch.ones_like(u).repeat(height)), 0
        )
        direction = torch.einsum("kn,bkc->bcn", grid, camera.axes)
        direction = direction / direction.square().sum(1, keepdim=True).sqrt()
        d = tuple(direction.unbind(1))
        o = tuple(camera.position[:, k : k + 1].expand_as(d[0]) for k in range(3))
        scene = r.Scene(clips, frames[:, None], c.balloons_at(clips.seeds, frames, camera))
        hits = r.hits_of(scene, o, d, self.config.cells, self.config.fused)
        return Look(
            scene,
            hits,
            d,
            frames[:, None].float(),
            height,
            width,
            2 * half / height,
            camera.axes,
            self.config.fused,
        )

    def motion(self, look: Look, clips: City, frames: Tensor, camera: Camera):
        """(motion [B, 2, h, w] in rays, previous distance [B, 1, h, w], cut [B])."""
        scene, hits = look.scene, look.hits
        if not self.config.motion:
            none = torch.zeros_like(hits.distance).view(-1, 1, look.height, look.width)
            return none.expand(-1, 2, -1, -1), none, torch.zeros_like(frames, dtype=torch.bool)
        earlier = c.camera_at(clips.seeds, frames - 1, self.config.cut_frames)
        points = [p.clone() for p in hits.points]
        for axis, code, lane in ((0, r.CAR_X, hits.cell_z), (2, r.CAR_Z, hits.cell_x)):
            speed = c.car_speed(scene.seeds, lane, axis // 2)
            points[axis] = torch.where(hits.code == code, points[axis] - speed, points[axis])
        moved = scene.balloons - c.balloons_at(clips.seeds, frames - 1, earlier)
        for i in range(moved.shape[1]):
            mine = (hits.code == r.BALLOON) & (hits.cell_x == i)
            points = [
                torch.where(mine, p - moved[:, i, k : k + 1], p) for k, p in enumerate(points)
            ]
        offset = torch.stack(points, 1) - earlier.position[:, :, None]
        local = torch.einsum("bcn,bkc->bkn", offset, earlier.axes)
        forward = local[:, 2].clamp_min(1e-3)
        height, width = look.height, look.width
        # pixel = 2 tan(fov / 2) / height, so a tangent t lies t / pixel rays from the middle.
        x = local[:, 0] / forward / look.pixel + width / 2 - 0.5
        y = height / 2 - 0.5 - local[:, 1] / forward / look.pixel
        grid_x = torch.arange(width, device=self.device).repeat(height)
        grid_y = torch.arange(height, device=self.device).repeat_interleave(width)
        motion = torch.stack((x - grid_x, y - grid_y), 1).view(-1, 2, height, width)
        before = offset.square().sum(1).sqrt().view(-1, 1, height, width)
        cut = (earlier.scene != camera.scene) | (frames == 0)
        return motion, before, cut
