"""Drawings are made once, by all cores, and none of them is held out."""

import numpy as np
import pytest
import torch

from llm_dit.tiny import scenes
from llm_dit.tiny.training.data import CLIPS, PICTURES, draw_all, to_bytes, to_float


@pytest.mark.parametrize("subject", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_what_is_drawn_is_found_again(tmp_path, subject):
    drawn = draw_all(tmp_path, 34, subject)
    assert len(drawn.captions) == 34
    again = draw_all(tmp_path, 34, subject)
    assert again.captions == drawn.captions
    for name, (shape, kind) in subject.arrays.items():
        assert (drawn.arrays[name].shape, drawn.arrays[name].dtype) == ((34, *shape), kind)
        assert np.array_equal(drawn.on(name, torch.device("cpu")).numpy(), again.arrays[name])


def test_captions_say_what_is_drawn_and_are_not_held_out(tmp_path):
    pictures, clips = draw_all(tmp_path, 6, PICTURES), draw_all(tmp_path, 6, CLIPS)
    for index, caption in enumerate(pictures.captions):
        assert scenes.score(pictures.arrays["pictures"][index], caption).whole
        assert not scenes.held_out(scenes.parse(caption))
    for index, caption in enumerate(clips.captions):
        assert scenes.score_clip(clips.arrays["clips"][index], caption, clips.arrays["sounds"][index] / 32768, 16000).whole
        assert not scenes.clip_held_out(scenes.parse_clip(caption))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 5, 8, 8, 3)])
def test_bytes_come_back(shape):
    drawn = torch.randint(256, shape, dtype=torch.uint8)
    assert to_float(drawn).shape == (shape[0], 3, *shape[1:-1])
    assert np.array_equal(to_bytes(to_float(drawn)), drawn.numpy())
