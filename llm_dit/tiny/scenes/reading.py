"""Reading a scene off a picture: which things, of what colour, shape and size, and how they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Final

import numpy as np

from .drawing import RADII, SIDE, shape_mask
from .scene import COLOURS, RELATIONS, SHAPES, Scene, Thing, parse

COLOURFUL: Final = 70
"""Largest minus smallest channel of a pixel that belongs to a thing; grounds are grey."""
_SMALLEST: Final = 60
"""Pixels of a thing; less is a speck."""


@dataclass(frozen=True)
class Found:
    """A thing in a picture, with its place and radius in pixels and how well the shape fits (intersection over union)."""

    thing: Thing
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Score:
    """Which parts of a caption a picture shows.

    Attributes:
        parts: by name ("count", "colour 1", "shape 2", "relation", ...), whether it holds.
    """

    parts: Mapping[str, bool]

    @property
    def whole(self) -> bool:
        """True if all of the caption holds."""
        return all(self.parts.values())

    @property
    def share(self) -> float:
        """The share of the parts that hold."""
        return sum(self.parts.values()) / len(self.parts)


def read(picture: np.ndarray, radii: Mapping[str, tuple[float, float]] = RADII) -> list[Found]:
    """The things in a picture [128, 128, 3] uint8, the largest first; `radii` are those, by size, that were drawn."""
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"a picture of a scene is [{SIDE}, {SIDE}, 3], not {list(picture.shape)}")
    channels = picture.astype(np.float64)
    saturation = channels.max(axis=-1) - channels.min(axis=-1)
    colourful = saturation > COLOURFUL
    labels = _components(colourful)
    masks = [labels == label for label in np.unique(labels[colourful])]
    limit = (radii["small"][1] + radii["large"][0]) / 2
    found = [_found(_covered(mask, saturation), channels, limit) for mask in masks if mask.sum() >= _SMALLEST]
    return sorted(found, key=lambda one: -one.radius)


def score(picture: np.ndarray, caption: str) -> Score:
    """Compares a picture [128, 128, 3] uint8 with a caption of a scene; of two ways to pair things, the better one counts."""
    scene, found = parse(caption), read(picture)
    pairings = permutations(found, len(scene.things)) if len(found) >= len(scene.things) else ()
    scores = [_paired(scene, pairing, len(found)) for pairing in pairings]
    if not scores:
        return Score(dict.fromkeys(_paired(scene, (), -1), False))
    return max((Score(parts) for parts in scores), key=lambda one: one.share)


def _paired(scene: Scene, found: tuple[Found, ...], count: int) -> dict[str, bool]:
    parts = {"count": count == len(scene.things)}
    for index, thing in enumerate(scene.things):
        seen = found[index].thing if found else None
        for name in ("size", "colour", "shape"):
            parts[f"{name} {index + 1}"] = seen is not None and getattr(seen, name) == getattr(thing, name)
    if scene.relation:
        offset = np.array([found[0].x - found[1].x, found[0].y - found[1].y]) if found else np.zeros(2)
        direction = np.array(RELATIONS[scene.relation])
        parts["relation"] = bool(offset @ direction > abs(offset @ direction[::-1]))
    return parts


def _components(mask: np.ndarray) -> np.ndarray:
    """[H, W] int: the same number for pixels of `mask` that touch, side to side; 0 outside."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        neighbours = np.stack((padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]))
        spread = np.where(mask, neighbours.max(axis=0), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _covered(mask: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """What a thing covers by half or more: a soft edge of a bright colour is colourful before it is half of the thing."""
    covered: np.ndarray = mask & (saturation >= np.median(saturation[mask]) / 2)
    return covered


def _found(mask: np.ndarray, channels: np.ndarray, limit: float) -> Found:
    """`limit` is the radius between small and large."""
    colour = _nearest_hue(np.median(channels[mask], axis=0))
    return max((_laid(mask, shape, colour, limit) for shape in SHAPES), key=lambda one: one.fit)


def _laid(mask: np.ndarray, shape: str, colour: str, limit: float) -> Found:
    """A shape where it has the area and the centre of mass of `mask`: it overlaps best there or nearly so, also where `mask` is
    a little longer than wide, of which a box would take one side.
    """
    area, below = _moments(shape)
    radius = float(np.sqrt(mask.sum() / area))
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean() + 0.5), float(rows.mean() + 0.5 - below * radius)
    wanted = shape_mask(shape, x, y, radius)
    fit = float(np.minimum(mask, wanted).sum() / np.maximum(mask, wanted).sum())
    return Found(Thing("small" if radius < limit else "large", colour, shape), x, y, radius, fit)


@cache
def _moments(shape: str) -> tuple[float, float]:
    """The area of a shape in squares of its radius, and how far below its place its centre of mass is, in radii."""
    radius = SIDE / 2 - 1
    drawn = shape_mask(shape, SIDE / 2, SIDE / 2, radius)
    rows = np.arange(SIDE) + 0.5 - SIDE / 2
    return float(drawn.sum() / radius**2), float(drawn.sum(axis=1) @ rows / drawn.sum() / radius)


def _nearest_hue(colour: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: _hue_distance(colour, np.array(COLOURS[name], dtype=np.float64)))


def _hue_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The angle between two colours around the grey axis."""
    first, second = one - one.mean(), other - other.mean()
    return float(np.arccos(np.clip(first @ second / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-9), -1, 1)))
