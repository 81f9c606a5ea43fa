"""What a caption says: one thing, or two and how they lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np

SHAPES: Final = ("circle", "square", "triangle", "cross")
COLOURS: Final = {
    "red": (225, 45, 45),
    "yellow": (235, 205, 40),
    "green": (50, 180, 60),
    "cyan": (40, 200, 205),
    "blue": (45, 75, 225),
    "purple": (165, 50, 200),
}
"""RGB; the hues lie 40 degrees and more apart."""
SIZES: Final = ("small", "large")
RELATIONS: Final = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
"""Where the first thing lies from the second, as (x, y) with y downwards."""
_HELD_OUT_IN: Final = 10
"""Of so many captions one is held out."""
THING: Final = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{THING}(?: ({'|'.join(RELATIONS)}) {THING})?")


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two with the relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        return f" {self.relation} ".join(map(str, self.things))


def parse(caption: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: if it is none of the captions that scenes have.

    Example:
        >>> parse("a small red circle above a large blue square").relation
        'above'
    """
    found = _CAPTION.fullmatch(caption)
    if found is None:
        raise ValueError(f"{caption!r} is no caption of a scene, such as 'a small red circle above a large blue square'")
    size, colour, shape, relation, *other = found.groups()
    first = Thing(size, colour, shape)
    return Scene((first, Thing(*other)), relation) if relation else Scene((first,))


def sample(generator: np.random.Generator, single: float = 0.15) -> Scene:
    """A scene drawn evenly from all; with probability `single` it has one thing."""
    first, second = (
        Thing(str(generator.choice(SIZES)), str(generator.choice(list(COLOURS))), str(generator.choice(SHAPES))) for _ in range(2)
    )
    if generator.random() < single:
        return Scene((first,))
    return Scene((first, second), str(generator.choice(list(RELATIONS))))


def held_out(scene: Scene) -> bool:
    """True for a tenth of the scenes of two things, always the same: no model is trained on them, and scores are theirs."""
    return len(scene.things) == 2 and is_drawn_out(scene.caption)


def is_drawn_out(caption: str) -> bool:
    """True for about a tenth of all captions, always the same."""
    return blake2b(caption.encode(), digest_size=2).digest()[0] % _HELD_OUT_IN == 0
