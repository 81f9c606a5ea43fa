"""Pictures and clips whose captions a program can check: what tiny models are trained on, and how what they draw is scored."""

from .clips import (
    DIRECTIONS,
    PITCHES,
    Clip,
    clip_held_out,
    draw_clip,
    draw_tone,
    parse_clip,
    read_pitch,
    sample_clip,
    score_clip,
)
from .drawing import draw
from .reading import Score, read, score
from .scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing, held_out, parse, sample

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "PITCHES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Clip",
    "Scene",
    "Score",
    "Thing",
    "clip_held_out",
    "draw",
    "draw_clip",
    "draw_tone",
    "held_out",
    "parse",
    "parse_clip",
    "read",
    "read_pitch",
    "sample",
    "sample_clip",
    "score",
    "score_clip",
]
