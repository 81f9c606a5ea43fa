"""The scenes and their reader: what is drawn is read, through the noise and blur of a small VAE; what is wrong is seen."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from llm_dit.tiny.scenes import Scene, draw, held_out, parse, read, sample, score
from llm_dit.tiny.scenes.drawing import RADII, shape_mask
from llm_dit.tiny.scenes.scene import COLOURS, RELATIONS, SHAPES, SIZES, Thing

seeds = st.integers(0, 10**6)


def drawn(seed):
    generator = np.random.default_rng(seed)
    scene = sample(generator)
    return scene, draw(scene, generator)


@given(seed=seeds)
@settings(max_examples=150, deadline=None)
def test_what_is_drawn_is_read(seed):
    scene, picture = drawn(seed)
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert len(read(picture)) == len(scene.things)
    assert score(picture, scene.caption).whole, (scene.caption, score(picture, scene.caption))


@given(seed=seeds, noise=st.floats(0, 4), blur=st.floats(0, 1.4))
@settings(max_examples=100, deadline=None)
def test_through_noise_and_blur(seed, noise, blur):
    scene, picture = drawn(seed)
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
    soft = np.clip(soft + np.random.default_rng(seed).normal(0, noise, soft.shape), 0, 255).astype(np.uint8)
    assert score(soft, scene.caption).whole, (scene.caption, score(soft, scene.caption))


@given(
    shape=st.sampled_from(SHAPES),
    size=st.sampled_from(SIZES),
    longer=st.floats(0.88, 1.12),
    aslant=st.floats(-0.12, 0.12),
    blur=st.floats(0, 1.2),
    saturation=st.integers(110, 200),
)
@settings(max_examples=150, deadline=None)
def test_a_shape_a_little_longer_than_wide_or_aslant(shape, size, longer, aslant, blur, saturation):
    """As models draw them: a square of 22 by 25 pixels is not a circle."""
    mask = Image.fromarray((255 * shape_mask(shape, 64, 64, np.mean(RADII[size]))).astype(np.uint8))
    map_back = (1 / longer, aslant, 64 * (1 - 1 / longer - aslant), 0, 1, 0)
    skewed = mask.transform(mask.size, Image.Transform.AFFINE, map_back, Image.Resampling.BILINEAR)
    soft = np.asarray(skewed.filter(ImageFilter.GaussianBlur(blur)))[..., None] / 255
    picture = (120 + soft * np.array([saturation / 2, -saturation / 2, -saturation / 2])).round().astype(np.uint8)
    assert [found.thing for found in read(picture)] == [Thing(size, "red", shape)]


@given(seed=seeds, part=st.sampled_from(["size", "colour", "shape", "relation", "count"]))
@settings(max_examples=150, deadline=None)
def test_another_caption_does_not_hold(seed, part):
    generator = np.random.default_rng(seed)
    scene = sample(generator, single=0)
    picture = draw(scene, generator)
    first, second = scene.things
    if part == "count":
        other = Scene((first,))
    elif part == "relation":
        other = Scene(scene.things, str(generator.choice([name for name in RELATIONS if name != scene.relation])))
        swapped = Scene((second, first), scene.relation)
        if first == second or other.caption == swapped.caption:
            return
    else:
        values = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES}[part]
        value = str(generator.choice([value for value in values if value != getattr(first, part)]))
        other = Scene((dataclasses.replace(first, **{part: value}), second), scene.relation)
    found = score(picture, other.caption)
    assert not found.whole
    assert 0 < found.share < 1


def test_an_empty_picture_shows_nothing():
    grey = np.full((128, 128, 3), 128, np.uint8)
    found = score(grey, "a small red circle above a large blue square")
    assert found.share == 0
    assert set(found.parts) == {"count", "relation", *(f"{name} {n}" for name in ("size", "colour", "shape") for n in (1, 2))}


@given(seed=seeds)
def test_captions_say_the_scene(seed):
    scene = sample(np.random.default_rng(seed))
    assert parse(scene.caption) == scene


def test_what_is_no_caption():
    for caption in ("a red circle", "a small red circle near a large blue square", "", "a small red circle above"):
        with pytest.raises(ValueError, match="is no caption of a scene"):
            parse(caption)
    with pytest.raises(ValueError, match="not \\[64, 64, 3\\]"):
        read(np.zeros((64, 64, 3), np.uint8))


def test_a_tenth_is_held_out():
    generator = np.random.default_rng(0)
    scenes = [sample(generator) for _ in range(4000)]
    share = sum(map(held_out, scenes)) / len(scenes)
    assert 0.06 < share < 0.12
    assert not any(held_out(scene) for scene in scenes if len(scene.things) == 1)


def test_the_same_seed_draws_the_same():
    assert np.array_equal(drawn(7)[1], drawn(7)[1])
