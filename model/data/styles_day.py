"""The day styles: watercolour, desert at dusk, and clay.

A style is a function (look, surface) -> display colour [B, 3, N] in [0, 1]. What it adds to the
geometry comes from the clip's dice and textures in world coordinates, or from the time.
"""

import torch
from torch import Tensor

from mirage_hello.model.data.noise import sample_texture, uniform
from mirage_hello.model.data.raycast import dot
from mirage_hello.model.data.shading import (
    ambient,
    bloom,
    film,
    hue,
    mix,
    outline,
    rgb,
    sun_direction,
    sunlight,
)
from mirage_hello.model.data.surface import Look, Surface, smooth, texture, track_age, windows


def watercolour(look: Look, s: Surface) -> Tensor:
    """Washes of the clip's pigments on paper: blooms, granulation, dark wet edges, soft ink."""
    base = look.scalar(2)
    paper = rgb(look.time, 0.97, 0.95, 0.9)
    broad, blot, grain = (
        texture(look, s, 0, 14.0),
        texture(look, s, 2, 8.0),
        texture(look, s, 3, 5.0),
    )
    tone = base + 0.16 * torch.floor(4 * s.dice(4)) / 4
    pigment = 1 - hue(tone + 0.5, 0.85) * 0.62
    pigment = torch.where(s.ground[:, None], 1 - hue(base + 0.12, 0.3) * 0.3, pigment)
    leaf = 1 - hue(0.82 + 0.12 * look.scalar(5) + 0.1 * s.dice(6), 0.8) * 0.75
    pigment = torch.where((s.tree | s.trunk)[:, None], leaf, pigment)
    vivid = 1 - hue(base + 0.3 + 0.4 * s.dice(7), 1.0) * 0.85
    pigment = torch.where((s.car | s.balloon | s.dome)[:, None], vivid, pigment)
    strength = 0.55 + 1.1 * (broad - 0.5) + 0.9 * (blot - 0.5) + 0.35 * (grain - 0.5)
    bloomed = smooth(0.02, 0.0, (blot - 0.62).abs())
    strength = (strength + 0.25 * bloomed).clamp(0.12, 1.15)
    shade = sunlight(look, sun_direction(look, 0.75))
    dark = torch.where(s.sky, 0.0, 0.55 * (1 - smooth(0.0, 0.6, shade)) * (1.25 - 0.5 * broad))
    strength = strength + 0.3 * dark
    colour = paper * (1 - strength[:, None] * (1 - pigment))
    colour = colour * (1 - dark[:, None] * (1 - rgb(colour, 0.55, 0.58, 0.78)))
    pane, ident = windows(look, s, look.hits)
    colour = colour * (
        1 - (pane * (0.3 + 0.35 * uniform(ident, 1)))[:, None] * (1 - rgb(colour, 0.4, 0.45, 0.6))
    )
    sky = sky_wash(look, paper)
    haze = 1 - torch.exp(-look.hits.distance / 75)
    colour = mix(colour, sky, torch.where(s.sky, 1.0, haze))
    line = outline(look, s) * torch.exp(-look.hits.distance / 45)
    return mix(colour, rgb(colour, 0.24, 0.21, 0.28), 0.6 * line).clamp(0, 1)


def sky_wash(look: Look, paper: Tensor) -> Tensor:
    """A graded wash with blooms that stay put in the sky."""
    x, y, z = look.directions
    u, v = torch.atan2(z, x) * 2.5, y * 4
    cloud = sample_texture(look.scene.city.textures, 0, u, v, 2 * torch.pi * 2.5)
    tone = hue(look.scalar(2) + 0.5 + 0.1 * look.scalar(6), 0.8)
    pigment = 1 - (1 - tone) * 0.7
    amount = (0.75 * smooth(0.0, 0.7, y) + 0.9 * (cloud - 0.42)).clamp(0.03, 0.9)
    return paper * (1 - amount[:, None] * (1 - pigment))


def desert_dusk(look: Look, s: Surface) -> Tensor:
    """A low sun over sandstone: strata and ripples, long shadows, sand that gathers at walls."""
    n = look.hits.normals
    grain, broad, blot = (
        texture(look, s, 3, 6.0),
        texture(look, s, 0, 20.0),
        texture(look, s, 2, 9.0),
    )
    warm = 0.035 + 0.06 * look.scalar(2)
    stone = hue(warm + 0.035 * (s.dice(4) - 0.5), 0.62) * (0.42 + 0.25 * s.dice(5))[:, None]
    bands = torch.sin(s.v * (3.0 + 3 * s.dice(6)) + 5 * (broad - 0.5))
    stone = stone * (0.85 + 0.2 * smooth(-0.3, 0.3, bands) + 0.5 * (grain - 0.5))[:, None]
    ripple = torch.sin(s.u * 2.2 + 0.6 * s.v + 9 * broad + 2 * look.scalar(7))
    sand = rgb(stone, 0.72, 0.47, 0.26) * (0.82 + 0.13 * ripple + 0.5 * (blot - 0.5))[:, None]
    colour = torch.where(s.ground[:, None], sand, stone)
    palm = hue(0.2 + 0.06 * s.dice(7), 0.7) * (0.12 + 0.2 * blot)[:, None]
    colour = torch.where(s.tree[:, None], palm, colour)
    glaze = hue(0.48 + 0.15 * look.scalar(6) + 0.06 * s.dice(9), 0.75) * 0.5
    colour = torch.where(s.dome[:, None], glaze, colour)
    cloth = hue(look.scalar(8) + 0.4 * s.dice(8), 0.75) * 0.6
    striped = 0.65 + 0.35 * torch.sign(torch.sin(4 * s.u))
    cloth = cloth * torch.where(s.balloon, striped, 1.0)[:, None]
    colour = torch.where((s.car | s.balloon)[:, None], cloth, colour)
    pane, ident = windows(look, s, look.hits, floor=1.9, bay=1.7)
    colour = colour * (1 - 0.85 * pane * (uniform(ident, 1) < 0.7))[:, None]
    gathered = 0.4 + 1.5 * (1 - torch.exp(-look.time / 700))
    drift = smooth(0.12, -0.12, s.v - gathered * (0.35 + 1.3 * (blot - 0.35)))
    dust = drift * s.wall + 0.75 * smooth(0.42, 0.6, broad) * s.roof
    colour = mix(colour, rgb(colour, 0.74, 0.5, 0.29) * (0.8 + 0.4 * grain)[:, None], dust)
    age, track = track_age(look, s)
    colour = colour * (1 - 0.35 * track * torch.exp(-age / 160))[:, None]
    sun = sun_direction(look, 0.3)
    direct = sunlight(look, sun, cells=6)
    light = ambient(look, s)[:, None] * rgb(colour, 0.42, 0.34, 0.5) * (1 + 0.25 * n[1])[:, None]
    colour = colour * (light + direct[:, None] * rgb(colour, 3.4, 1.75, 0.75))
    toward = dot(look.directions, sun).clamp_min(0)
    up = look.directions[1].clamp_min(0)
    low, high = rgb(colour, 1.15, 0.55, 0.3), rgb(colour, 0.3, 0.2, 0.48)
    sky = mix(low, high, smooth(0.0, 0.65, up))
    cloud = sky_clouds(look, 0.16)
    sky = mix(sky, rgb(colour, 1.3, 0.5, 0.42), 0.6 * cloud)
    sky = sky + rgb(colour, 1.5, 0.8, 0.3) * (0.5 * toward**8 + 5 * toward**900)[:, None]
    haze = 1 - torch.exp(-look.hits.distance / (95 + 60 * look.scalar(3)))
    haze_colour = (
        rgb(colour, 0.62, 0.33, 0.3) + rgb(colour, 0.7, 0.35, 0.1) * (0.5 * toward**4)[:, None]
    )
    colour = mix(mix(colour, haze_colour, haze), sky, s.sky.float())
    return film(bloom(look, colour * 0.8, 0.9, 0.25))


def sky_clouds(look: Look, flatness: float) -> Tensor:
    """Streaks of cloud that drift slowly with time: coverage [B, N]."""
    x, y, z = look.directions
    reach = 1 / (y.clamp_min(0) + flatness)
    u, v = x * reach * 3 + look.time * 0.004, z * reach * 3
    cover = sample_texture(look.scene.city.textures, 1, u, v, 14.0)
    return smooth(0.48, 0.8, cover) * smooth(0.02, 0.2, y)


def clay(look: Look, s: Surface) -> Tensor:
    """Plasticine under a studio lamp: each thing its own colour, thumb marks, soft creases."""
    n = look.hits.normals
    dents, broad = texture(look, s, 2, 4.0), texture(look, s, 1, 9.0)
    base = look.scalar(2)
    tone = base + torch.floor(5 * s.dice(4)) / 5
    colour = hue(tone, 0.72) * 0.5 + 0.02
    colour = torch.where(
        s.ground[:, None], hue(base + 0.35 + 0.1 * look.scalar(5), 0.45) * 0.34, colour
    )
    leaf = hue(0.24 + 0.14 * look.scalar(6) + 0.06 * s.dice(6), 0.6) * 0.5
    colour = torch.where(s.tree[:, None], leaf, colour)
    colour = torch.where(s.trunk[:, None], rgb(colour, 0.36, 0.22, 0.14), colour)
    bright = hue(base + 0.2 + 0.6 * s.dice(7), 0.8) * 0.75
    colour = torch.where((s.car | s.balloon | s.dome)[:, None], bright, colour)
    speckle = smooth(0.7, 0.8, texture(look, s, 2, 6.0)) * (s.dice(8) < 0.4)
    colour = mix(colour, hue(tone + 0.5, 0.5) * 0.5, 0.6 * speckle)
    pane, ident = windows(look, s, look.hits, floor=2.0, bay=1.9)
    shutter = hue(tone + 0.3 + 0.2 * (uniform(ident, 1) < 0.5), 0.55) * 0.42
    colour = mix(colour, shutter, pane)
    colour = colour * (0.8 + 0.3 * dents + 0.12 * broad)[:, None]
    lamp = sun_direction(look, 0.85)
    direct = sunlight(look, lamp)
    half = [a - b for a, b in zip(lamp, look.directions, strict=True)]
    length = dot(half, half).sqrt()
    shine = (dot(half, n) / length).clamp_min(0) ** 24
    shine = shine * (direct > 0) * (0.5 + dents)
    light = ambient(look, s)[:, None] * rgb(colour, 0.42, 0.4, 0.46) * (1 + 0.25 * n[1])[:, None]
    colour = colour * (light + direct[:, None] * rgb(colour, 1.5, 1.35, 1.1)) + 0.1 * shine[:, None]
    up = look.directions[1].clamp_min(0)
    backdrop = hue(base + 0.55, 0.3) * 0.5 + rgb(colour, 0.25, 0.22, 0.18)
    sky = mix(backdrop, backdrop * rgb(colour, 0.75, 0.8, 0.95), smooth(0.0, 0.8, up))
    haze = 1 - torch.exp(-look.hits.distance / 190)
    return film(mix(colour, sky, torch.where(s.sky, 1.0, haze)))
