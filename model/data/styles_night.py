"""The night styles: neon city, and snow at night.

A style is a function (look, surface) -> display colour [B, 3, N] in [0, 1]. What it adds to the
geometry comes from the clip's dice and textures in world coordinates, or from the time.
"""

import torch
from torch import Tensor

from mirage_hello.model.data import raycast as r
from mirage_hello.model.data.noise import uniform
from mirage_hello.model.data.shading import (
    ambient,
    bloom,
    falling,
    film,
    hue,
    mix,
    rgb,
    sun_direction,
    sunlight,
)
from mirage_hello.model.data.surface import (
    Look,
    Surface,
    smooth,
    surface_of,
    texture,
    track_age,
    windows,
)


def stars(look: Look, density: float, brightness: float) -> Tensor:
    """Stars fixed to the sky: [B, N]."""
    x, y, z = look.directions
    cell = [torch.floor(k * density).to(torch.int32) for k in (x, y, z)]
    away = [(k * density).frac().abs() - 0.5 for k in (x, y, z)]
    off = r.dot(away, away).sqrt()
    lit = (uniform(cell[0], cell[1], cell[2]) < 0.03).float()
    return brightness * lit * smooth(0.4, 0.1, off) * smooth(0.05, 0.3, y)


def neon_light(look: Look, s: Surface, hits) -> Tensor:
    """What glows in the neon city: lit windows, edge strips of some buildings, cars' lamps."""
    pane, ident = windows(look, s, hits)
    lit = (uniform(ident, 1) < 0.18 + 0.4 * s.dice(3)).float() * pane
    base = look.scalar(2)
    tone = base + 0.45 * torch.floor(3 * uniform(s.ident, 5)) / 3 + 0.08 * uniform(ident, 2)
    colour = hue(tone, 0.75) * (lit * (0.5 + 1.0 * uniform(ident, 3)))[:, None]
    strip_tone = hue(base + 0.5 * torch.floor(2 * s.dice(7)), 0.95)
    size = (hits.distance * look.pixel).clamp_min(0.01)
    from_edge = torch.minimum(s.along, s.extent - s.along)
    from_edge = torch.minimum(from_edge, (s.top - s.v).abs())
    strip = (0.5 + (0.11 - from_edge) / (2 * size)).clamp(0, 1) * (s.dice(6) < 0.45)
    strip = torch.where(s.wall, strip * smooth(1.0, 0.3, size), 0.0)
    sign_band = ((s.v - 2.6 - 2 * s.dice(9)).abs() < 0.45) & (s.dice(8) < 0.35) & s.wall
    letters = (uniform(s.ident, torch.floor(s.along * 3).to(torch.int32)) < 0.6) & sign_band
    colour = colour + strip_tone * (1.6 * strip)[:, None]
    colour = mix(colour, hue(base + 0.25 + 0.4 * s.dice(10), 0.9) * 1.4, letters.float() * 0.9)
    car_band = s.car & (s.v > 0.5)
    colour = mix(colour, hue(base + s.dice(12), 0.7) * 0.7, car_band.float())
    ball = hue(base + 0.3 * s.dice(13), 0.8) * 1.1
    return torch.where(s.balloon[:, None], ball, colour)


def neon_city(look: Look, s: Surface) -> Tensor:
    """Night, wet streets: windows and signs in the clip's colours, mirrored in its puddles."""
    base = look.scalar(2)
    # Violet to teal whatever the palette: an olive or brown night reads as smog.
    haze_colour = hue(0.5 + 0.35 * look.scalar(9), 0.7) * 0.09 + rgb(look.time, 0.01, 0.008, 0.03)
    up = look.directions[1].clamp_min(0)
    night = mix(haze_colour, rgb(look.time, 0.008, 0.01, 0.03), smooth(0.0, 0.5, up))
    sky = night + stars(look, 70.0, 0.8)[:, None]
    grain, broad = texture(look, s, 2, 9.0), texture(look, s, 0, 26.0)
    body = hue(base + 0.1 * s.dice(4), 0.4) * (0.02 + 0.06 * grain)[:, None]
    colour = body * ambient(look, s)[:, None] * (1.3 + look.hits.normals[1])[:, None]
    colour = colour + neon_light(look, s, look.hits)
    filled = 0.47 + 0.12 * (1 - torch.exp(-look.time / 900))
    wet = smooth(0.04, -0.03, broad - filled) * s.ground
    mirrored = mirror(look, haze_colour)
    facing = (-look.directions[1]).clamp(0, 1)
    share = (0.25 + 0.75 * (1 - facing) ** 3) * (0.16 + 0.84 * wet)
    colour = torch.where(s.ground[:, None], colour * (1 - 0.6 * wet)[:, None], colour)
    colour = colour + mirrored * (share * s.ground)[:, None]
    age, cover = track_age(look, s)
    trail = torch.exp(-age / 45) * cover
    colour = colour + hue(base + 0.5, 0.9) * (0.9 * trail)[:, None]
    fog = 1 - torch.exp(-look.hits.distance / (60 + 60 * look.scalar(3)))
    colour = mix(colour, haze_colour, torch.where(s.sky, 0.0, fog))
    colour = torch.where(s.sky[:, None], sky, colour)
    rain = falling(look, 0.55, 5.0, 0.11, 2) * (look.scalar(4) > 0.4)
    colour = colour + 0.05 * rain[:, None]
    return film(bloom(look, colour * 1.5, 0.5, 0.5))


def mirror(look: Look, sky: Tensor) -> Tensor:
    """Light that the ground would mirror: [B, 3, N]; the reflected ray crosses six cells."""
    d = look.directions
    up = (d[0], d[1].abs().clamp_min(0.02), d[2])
    p = look.hits.points
    origin = (p[0], torch.full_like(p[1], 0.02), p[2])
    reflected = r.hits_of(look.scene, origin, up, 6, look.fused)
    reflected.distance = reflected.distance + look.hits.distance
    surface = surface_of(look, reflected)
    light = neon_light(look, surface, reflected)
    return torch.where(surface.sky[:, None], sky * 1.2, light + 0.1 * sky)


def snow_night(look: Look, s: Surface) -> Tensor:
    """Moonlit snow that settles with time; warm windows; wheel tracks that snow over again."""
    n = look.hits.normals
    grain, broad, blot = (
        texture(look, s, 3, 5.0),
        texture(look, s, 0, 16.0),
        texture(look, s, 2, 7.0),
    )
    depth = 0.3 + 0.7 * (1 - torch.exp(-look.time / 500))
    warm = 0.02 + 0.09 * look.scalar(2)
    brick = hue(warm + 0.5 * (s.dice(4) < 0.3) + 0.05 * s.dice(5), 0.55)
    colour = brick * (0.10 + 0.12 * grain)[:, None]
    street = rgb(colour, 0.10, 0.11, 0.14) * (0.6 + 0.8 * grain)[:, None]
    colour = torch.where(s.ground[:, None], street, colour)
    pine = rgb(colour, 0.03, 0.09, 0.07) * (0.6 + 0.8 * blot)[:, None]
    colour = torch.where(s.tree[:, None], pine, colour)
    paint = hue(s.dice(7), 0.7) * 0.25
    colour = torch.where((s.car | s.balloon)[:, None], paint, colour)
    settle = smooth(0.25, 0.75, n[1] + 0.5 * (blot - 0.5) + 0.5 * depth - 0.45)
    patchy = smooth(-0.1, 0.12, depth - 1.5 * (broad - 0.12) + 0.25 * (grain - 0.5))
    cover = torch.where(s.ground, patchy, settle * (0.35 + 0.65 * depth))
    lower = smooth(0.9 * depth, 0.2, s.v + 0.5 * (blot - 0.5)) * s.wall
    cover = torch.maximum(cover, 0.9 * lower)
    age, track = track_age(look, s)
    cover = cover * (1 - 0.85 * track * torch.exp(-age / 130))
    snow = rgb(colour, 0.72, 0.8, 0.95) * (0.82 + 0.25 * broad + 0.12 * grain)[:, None]
    colour = mix(colour, snow, cover)
    moon = sunlight(look, sun_direction(look, 0.7))
    light = ambient(look, s)[:, None] * rgb(colour, 0.16, 0.2, 0.36)
    colour = colour * (light + moon[:, None] * rgb(colour, 0.36, 0.43, 0.62))
    pane, ident = windows(look, s, look.hits)
    lit = (uniform(ident, 1) < 0.25 + 0.3 * s.dice(3)).float()
    glow = hue(0.06 + 0.07 * uniform(ident, 2), 0.7) * (0.35 + 0.9 * uniform(ident, 3))[:, None]
    dark = rgb(colour, 0.02, 0.025, 0.05)
    colour = mix(colour, mix(dark, glow, lit), pane * (1 - 0.7 * lower))
    lamp = s.car & (s.v > 0.3) & (s.v < 0.55)
    colour = mix(colour, rgb(colour, 1.0, 0.75, 0.4), 0.7 * lamp)
    up = look.directions[1].clamp_min(0)
    haze_colour = rgb(colour, 0.09, 0.12, 0.22) * (0.8 + 0.5 * look.scalar(3))[:, None]
    sky = mix(haze_colour, rgb(colour, 0.012, 0.02, 0.06), smooth(0.0, 0.55, up))
    sky = sky + stars(look, 60.0, 0.7)[:, None]
    fog = 1 - torch.exp(-look.hits.distance / (65 + 50 * look.scalar(5)))
    colour = mix(mix(colour, haze_colour, fog), sky, s.sky.float())
    flakes = falling(look, 0.09, 1.0, 0.15, 2)
    colour = bloom(look, colour * 1.8, 0.6, 0.4)
    return mix(film(colour), rgb(colour, 0.85, 0.9, 1.0), 0.4 * flakes)
