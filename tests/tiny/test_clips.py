"""The clips and their reader: what is drawn is read, through noise and blur; what is wrong is seen and heard."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from llm_dit.tiny.scenes import (
    COLOURS,
    DIRECTIONS,
    PITCHES,
    SHAPES,
    SIZES,
    Clip,
    Thing,
    clip_held_out,
    draw_clip,
    draw_tone,
    parse_clip,
    read_pitch,
    sample_clip,
    score_clip,
)
from llm_dit.tiny.scenes.clips import FRAMES, SAMPLES, SOUND_RATE

seeds = st.integers(0, 10**6)
EVERY = [Clip(Thing(size, colour, shape), way) for size in SIZES for colour in COLOURS for shape in SHAPES for way in DIRECTIONS]


def drawn(seed):
    generator = np.random.default_rng(seed)
    clip = sample_clip(generator)
    return clip, draw_clip(clip, generator), draw_tone(clip, generator)


@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_what_is_drawn_is_read(seed):
    clip, frames, sound = drawn(seed)
    assert (frames.shape, frames.dtype) == ((FRAMES, 128, 128, 3), np.uint8)
    assert (sound.shape, sound.dtype) == ((SAMPLES,), np.int16)
    found = score_clip(frames, clip.caption, sound / 32768, SOUND_RATE)
    assert set(found.parts) == {"count", "size", "colour", "shape", "motion", "pitch"}
    assert found.whole, (clip.caption, found)


@given(seed=seeds, noise=st.floats(0, 4), blur=st.floats(0, 0.7))
@settings(max_examples=30, deadline=None)
def test_through_noise_and_blur(seed, noise, blur):
    clip, frames, sound = drawn(seed)
    generator = np.random.default_rng(seed)
    soft = np.stack([np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(blur))) for frame in frames[::8]])
    soft = np.clip(soft + generator.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)
    rough = sound / 32768 + generator.normal(0, 0.03, SAMPLES)
    assert score_clip(soft, clip.caption, rough, SOUND_RATE).whole


@given(seed=seeds, part=st.sampled_from(["size", "colour", "shape", "motion"]))
@settings(max_examples=60, deadline=None)
def test_another_caption_does_not_hold(seed, part):
    clip, frames, sound = drawn(seed)
    words = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(DIRECTIONS)}[part]
    said = clip.direction if part == "motion" else getattr(clip.thing, part)
    word = str(np.random.default_rng(seed).choice([other for other in words if other != said]))
    thing = clip.thing if part == "motion" else dataclasses.replace(clip.thing, **{part: word})
    other = Clip(thing, word if part == "motion" else clip.direction)
    found = score_clip(frames, other.caption, sound / 32768, SOUND_RATE)
    wrong = {name for name, holds in found.parts.items() if not holds}
    assert wrong == ({"shape", "pitch"} if part == "shape" else {part})


def test_what_stands_still_or_changes_is_seen():
    clip, frames, _ = drawn(3)
    assert not score_clip(np.repeat(frames[:1], FRAMES, axis=0), clip.caption).parts["motion"]
    backwards = score_clip(frames[::-1], clip.caption)
    assert [name for name, holds in backwards.parts.items() if not holds] == ["motion"]
    other = draw_clip(Clip(dataclasses.replace(clip.thing, colour="cyan"), clip.direction), np.random.default_rng(0))
    assert not score_clip(np.concatenate((frames[:9], other[9:])), clip.caption).parts["colour"]
    empty = score_clip(np.full((FRAMES, 128, 128, 3), 128, np.uint8), clip.caption, np.zeros(SAMPLES), SOUND_RATE)
    assert not any(empty.parts.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_pitches_are_heard_at_any_rate(shape):
    for rate in (16000, 24000, 48000):
        tone = np.sin(2 * np.pi * PITCHES[shape] * np.arange(rate // 2) / rate)
        assert read_pitch(np.stack([tone, tone]), rate) == pytest.approx(PITCHES[shape], rel=0.01)


def test_noise_and_silence_have_no_pitch():
    assert read_pitch(np.random.default_rng(0).normal(0, 0.3, SAMPLES), SOUND_RATE) is None
    assert read_pitch(np.zeros(SAMPLES), SOUND_RATE) is None
    with pytest.raises(ValueError, match="come with its rate"):
        score_clip(drawn(0)[1], drawn(0)[0].caption, np.zeros(SAMPLES))


def test_captions_say_the_clip():
    assert len({clip.caption for clip in EVERY}) == 192
    assert all(parse_clip(clip.caption) == clip for clip in EVERY)
    for caption in ("a large red circle", "a red circle moving left", "a large red circle moving away", ""):
        with pytest.raises(ValueError, match="is no caption of a clip"):
            parse_clip(caption)


def test_a_tenth_is_held_out_and_no_word_with_it():
    held = [clip for clip in EVERY if clip_held_out(clip)]
    trained = [clip for clip in EVERY if not clip_held_out(clip)]
    assert 0.06 < len(held) / len(EVERY) < 0.14
    for words in (SIZES, COLOURS, SHAPES, DIRECTIONS):
        assert all(any(word in clip.caption.split() for clip in trained) for word in words)


def test_the_same_seed_draws_the_same():
    assert all(np.array_equal(one, other) for one, other in zip(drawn(7)[1:], drawn(7)[1:], strict=True))
