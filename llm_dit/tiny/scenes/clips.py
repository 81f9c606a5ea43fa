"""Clips of one thing that moves, with a tone whose pitch tells its shape: drawn, and read again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from .drawing import SIDE, ground, shade, shape_mask
from .reading import Found, Score, read
from .scene import COLOURS, SHAPES, SIZES, THING, Thing, is_drawn_out

FRAMES: Final = 17
FRAME_RATE: Final = 24
SOUND_RATE: Final = 16000
SAMPLES: Final = FRAMES * SOUND_RATE // FRAME_RATE
DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Where a thing moves, as (x, y) with y downwards."""
PITCHES: Final = {"circle": 400.0, "square": 800.0, "triangle": 1600.0, "cross": 3200.0}
"""Of the tone, in Hz: whole periods in a hundredth of a second, so that every frame of a spectrogram sees the same wave."""
CLIP_RADII: Final = {"small": (24.0, 27.0), "large": (34.0, 37.0)}
"""Half the side of the square that a thing fills, in pixels: larger than in pictures, for a latent of LTX-2 covers twice as many
pixels across. Of small crosses as large as those of pictures an autoencoder gave one of five back as something else; of those of
15 to 18 pixels none, but a transformer in int4 drew one of two so that another was read, and of those of 18 to 21 one of five."""
_COARSER: Final = 2
"""Than those of pictures: stripes and checks of a ground. A pattern finer than a latent takes more numbers than the thing."""
_TRAVEL: Final = (24.0, 44.0)
"""From the first frame to the last, in pixels; the largest thing on the longest path still fits between the borders."""
_BORDER: Final = 4.0
_LOUDNESS: Final = (0.2, 0.8)
_MOVED: Final = 10.0
"""Pixels; what moves less stands still."""
_TONAL: Final = 0.5
"""Share of a sound's energy that lies at its pitch if it is a tone."""
_CAPTION = re.compile(rf"{THING} moving ({'|'.join(DIRECTIONS)})")


@dataclass(frozen=True)
class Clip:
    """One thing and the direction in which it moves."""

    thing: Thing
    direction: str

    @property
    def caption(self) -> str:
        return f"{self.thing} moving {self.direction}"


def parse_clip(caption: str) -> Clip:
    """The clip that a caption describes.

    Raises:
        ValueError: if it is none of the captions that clips have.

    Example:
        >>> parse_clip("a large red circle moving left").direction
        'left'
    """
    found = _CAPTION.fullmatch(caption)
    if found is None:
        raise ValueError(f"{caption!r} is no caption of a clip, such as 'a large red circle moving left'")
    *thing, direction = found.groups()
    return Clip(Thing(*thing), direction)


def sample_clip(generator: np.random.Generator) -> Clip:
    """A clip drawn evenly from all."""
    size, colour, shape, direction = (str(generator.choice(list(words))) for words in (SIZES, COLOURS, SHAPES, DIRECTIONS))
    return Clip(Thing(size, colour, shape), direction)


def clip_held_out(clip: Clip) -> bool:
    """True for about a tenth of the clips, always the same: no model is trained on them, and scores are theirs."""
    return is_drawn_out(clip.caption)


def draw_clip(clip: Clip, generator: np.random.Generator) -> np.ndarray:
    """Frames [17, 128, 128, 3] uint8 of a clip; what the caption leaves open is drawn from `generator`."""
    radius, travel = float(generator.uniform(*CLIP_RADII[clip.thing.size])), float(generator.uniform(*_TRAVEL))
    steps = np.linspace(-0.5, 0.5, FRAMES)[:, None] * np.array(DIRECTIONS[clip.direction]) * travel
    reach = radius + _BORDER + np.abs(steps[-1])
    places = generator.uniform(reach, SIDE - reach) + steps
    still, colour = ground(generator, _COARSER).astype(np.float64), np.array(shade(clip.thing.colour, generator))
    masks = np.stack([shape_mask(clip.thing.shape, x, y, radius) for x, y in places])[..., None]
    return np.round(still * (1 - masks) + colour * masks).astype(np.uint8)


def draw_tone(clip: Clip, generator: np.random.Generator) -> np.ndarray:
    """The sound [11333] int16 of a clip, as long as its frames; how loud it is is drawn from `generator`."""
    wave = np.sin(2 * np.pi * PITCHES[clip.thing.shape] / SOUND_RATE * np.arange(SAMPLES))
    return np.round(wave * generator.uniform(*_LOUDNESS) * 32767).astype(np.int16)


def read_pitch(sound: np.ndarray, rate: float) -> float | None:
    """The pitch in Hz of a sound [samples] or [channels, samples]; None if it is silent, or no tone."""
    wave = np.asarray(sound, dtype=np.float64).reshape(-1, sound.shape[-1]).mean(axis=0)
    energy = np.abs(np.fft.rfft((wave - wave.mean()) * np.hanning(len(wave)))) ** 2
    pitches = np.fft.rfftfreq(len(wave), 1 / rate)
    pitch = float(pitches[energy.argmax()])
    near = np.abs(pitches - pitch) <= max(0.03 * pitch, 3 * rate / len(wave))
    return pitch if energy[near].sum() > _TONAL * energy.sum() > 1e-9 * len(wave) ** 2 else None


def score_clip(frames: np.ndarray, caption: str, sound: np.ndarray | None = None, rate: float | None = None) -> Score:
    """Compares frames [F, 128, 128, 3] uint8, and a sound at `rate` Hz if it is given, with a caption of a clip.

    What the thing is has to hold at the start, in the middle and at the end.

    Raises:
        ValueError: if the sound comes without its rate.
    """
    clip = parse_clip(caption)
    seen = [read(frames[index], CLIP_RADII) for index in (0, len(frames) // 2, len(frames) - 1)]
    parts = {"count": all(len(found) == 1 for found in seen)}
    for name in ("size", "colour", "shape"):
        parts[name] = all(found and getattr(found[0].thing, name) == getattr(clip.thing, name) for found in seen)
    parts["motion"] = all(seen) and _moves(seen[0][0], seen[-1][0], clip.direction)
    if sound is not None:
        if rate is None:
            raise ValueError("a sound has to come with its rate")
        parts["pitch"] = _sounds(read_pitch(sound, rate), clip.thing.shape)
    return Score({name: bool(holds) for name, holds in parts.items()})


def _moves(first: Found, last: Found, direction: str) -> bool:
    offset, towards = np.array([last.x - first.x, last.y - first.y]), np.array(DIRECTIONS[direction])
    return bool(offset @ towards > max(_MOVED, 2 * abs(offset @ towards[::-1])))


def _sounds(pitch: float | None, shape: str) -> bool:
    """Within a quarter of an octave of the shape's pitch; the others are an octave away."""
    return pitch is not None and abs(np.log2(pitch / PITCHES[shape])) < 0.25
