"""Pictures whose captions a program can check: what the tiny models are trained on, and how what they draw is scored."""

from .drawing import draw
from .reading import Score, read, score
from .scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing, held_out, parse, sample

__all__ = [
    "COLOURS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Score",
    "Thing",
    "draw",
    "held_out",
    "parse",
    "read",
    "sample",
    "score",
]
