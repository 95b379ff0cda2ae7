"""The input views: what a game engine or a camera would show, without any style."""

import torch
from torch import Tensor

from mirage_hello.model.data.shading import (
    ambient,
    film,
    hue,
    kind_colours,
    mix,
    outline,
    rgb,
    sun_direction,
    sunlight,
)
from mirage_hello.model.data.surface import Look, Surface, texture, windows

PLAIN = {
    "wall": (0.74, 0.74, 0.76),
    "roof": (0.88, 0.88, 0.9),
    "ground": (0.52, 0.53, 0.55),
    "tree": (0.38, 0.62, 0.4),
    "trunk": (0.45, 0.36, 0.3),
    "dome": (0.66, 0.7, 0.8),
    "car": (0.75, 0.36, 0.32),
    "balloon": (0.93, 0.7, 0.25),
    "sky": (0.7, 0.82, 0.93),
}


def plain(look: Look, s: Surface) -> Tensor:
    """Input view: one colour per kind, a fixed light by the normal, dark outlines, light haze."""
    n = look.hits.normals
    light = 0.8 + 0.2 * n[1] + 0.1 * n[0].abs() - 0.06 * n[2].abs()
    light = torch.where(s.sky | s.ground, 1.0, light)
    colour = kind_colours(look, s, PLAIN) * light[:, None]
    haze = 1 - torch.exp(-look.hits.distance / 140)
    colour = mix(colour, rgb(colour, *PLAIN["sky"]), torch.where(s.sky, 1.0, haze))
    return mix(colour, colour * 0.25, outline(look, s) * torch.exp(-look.hits.distance / 90))


def camera(look: Look, s: Surface) -> Tensor:
    """Input view like a camera's: daylight with shadows, brick, asphalt and leaf textures."""
    grain, broad = texture(look, s, 3, 6.0), texture(look, s, 1, 18.0)
    colour = kind_colours(
        look,
        s,
        {
            "wall": (0.5, 0.42, 0.35),
            "roof": (0.33, 0.32, 0.33),
            "ground": (0.2, 0.2, 0.21),
            "tree": (0.12, 0.25, 0.06),
            "trunk": (0.2, 0.13, 0.08),
            "dome": (0.3, 0.38, 0.42),
            "car": (0.5, 0.1, 0.08),
            "balloon": (0.7, 0.35, 0.08),
        },
    )
    tint = hue(s.dice(21), 0.25)
    colour = torch.where((s.wall | s.car | s.balloon)[:, None], colour * tint * 1.2, colour)
    colour = colour * (0.6 + 0.5 * grain + 0.3 * broad)[:, None]
    pane, _ = windows(look, s, look.hits)
    colour = mix(colour, rgb(colour, 0.08, 0.11, 0.15), 0.8 * pane)
    sun = sun_direction(look, 0.8)
    light = ambient(look, s)[:, None] * rgb(colour, 0.5, 0.6, 0.75)
    colour = colour * (light + sunlight(look, sun)[:, None] * rgb(colour, 2.2, 2.0, 1.7))
    up = look.directions[1].clamp_min(0)
    sky = mix(rgb(colour, 0.75, 0.85, 0.95), rgb(colour, 0.2, 0.4, 0.75), up.sqrt())
    haze = 1 - torch.exp(-look.hits.distance / 160)
    return film(mix(colour, sky, torch.where(s.sky, 1.0, haze)))
