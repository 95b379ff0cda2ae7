"""The styles and input views by name."""

from collections.abc import Callable

from torch import Tensor

from mirage_hello.model.data.styles_day import clay, desert_dusk, watercolour
from mirage_hello.model.data.styles_night import neon_city, snow_night
from mirage_hello.model.data.surface import Look, Surface
from mirage_hello.model.data.views import camera, plain

Shader = Callable[[Look, Surface], Tensor]

# The order is the index of the style in a model's conditioning table: append, never reorder.
STYLES: dict[str, Shader] = {
    "neon_city": neon_city,
    "watercolour": watercolour,
    "desert_dusk": desert_dusk,
    "snow_night": snow_night,
    "clay": clay,
}
VIEWS: dict[str, Shader] = {"plain": plain, "camera": camera}
