"""Scenes as pictures of 128 px: things of varying place and size on grey grounds, plain and textured."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from .scene import COLOURS, RELATIONS, Scene

SIDE: Final = 128
RADII: Final = {"small": (10.0, 13.0), "large": (19.0, 23.0)}
"""Half the side of the square that a thing fills, in pixels."""
GAP: Final = 8.0
"""Between the squares of two things, and to the border 4."""
_BORDER: Final = 4.0
_ASLANT: Final = 0.25
"""How far two things may lie from straight beside or above each other, across over along; at 1 nobody could say which they are.
What is generated scatters around what is drawn."""
_FINER: Final = 4
"""Pixels are averaged from so many times as fine ones."""


def draw(scene: Scene, generator: np.random.Generator) -> np.ndarray:
    """A picture [128, 128, 3] uint8 of a scene; what the caption leaves open is drawn from `generator`."""
    places = _places(scene, generator)
    image = Image.fromarray(ground(generator)).resize((SIDE * _FINER, SIDE * _FINER), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip(scene.things, places, strict=True):
        _fill(pen, thing.shape, x, y, radius, shade(thing.colour, generator))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def shade(colour: str, generator: np.random.Generator) -> tuple[int, ...]:
    """RGB of a colour by its name, a little off."""
    channels = np.clip(np.array(COLOURS[colour]) + generator.integers(-12, 13, 3), 0, 255)
    return tuple(int(channel) for channel in channels)


def shape_mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """[128, 128] float: the share of every pixel that a shape covers."""
    image = Image.new("L", (SIDE * _FINER, SIDE * _FINER))
    _fill(ImageDraw.Draw(image), shape, x, y, radius, 255)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255


def _fill(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: int | tuple[int, ...]) -> None:
    x, y, r = x * _FINER, y * _FINER, radius * _FINER
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        r *= 0.88  # as large to the eye as the circle
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "triangle":
        pen.polygon(((x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)), fill=colour)
    else:
        arm = r * 0.36
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)


def _places(scene: Scene, generator: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, radius) of every thing: inside the picture, apart, and in a relation that cannot be mistaken."""
    radii = [float(generator.uniform(*RADII[thing.size])) for thing in scene.things]
    while True:
        centres = [generator.uniform(radius + _BORDER, SIDE - radius - _BORDER, 2) for radius in radii]
        if len(centres) == 2:
            offset = centres[0] - centres[1]
            direction = np.array(RELATIONS[scene.relation])
            along, across = float(offset @ direction), float(abs(offset @ direction[::-1]))
            if along < sum(radii) + GAP or across > _ASLANT * along:
                continue
        return [(float(x), float(y), radius) for (x, y), radius in zip(centres, radii, strict=True)]


def ground(generator: np.random.Generator, coarser: int = 1) -> np.ndarray:
    """[128, 128, 3] uint8, grey: one half plain, the others shaded, or striped or checked `coarser` times as coarsely."""
    base, contrast = generator.uniform(70, 190), generator.uniform(8, 28)
    rows, columns = np.indices((SIDE, SIDE))
    kind = generator.integers(6)
    if kind >= 3:
        pattern = np.zeros((SIDE, SIDE))
    elif kind == 0:
        angle = generator.uniform(0, 2 * np.pi)
        pattern = (np.cos(angle) * rows + np.sin(angle) * columns) / SIDE
    elif kind == 1:
        along, period = rows if generator.random() < 0.5 else columns, coarser * int(generator.integers(8, 25))
        pattern = np.sign(np.sin(along * 2 * np.pi / period))
    else:
        width = coarser * int(generator.integers(6, 17))
        pattern = np.where((rows // width + columns // width) % 2, 1.0, -1.0)
    grey = np.clip(base + contrast * pattern, 0, 255).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)
