"""Patterns over dotted names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dit.quantization.filters import matches

part = st.text(st.sampled_from("abcdefgh_0123"), min_size=1, max_size=6)
names = st.lists(part, min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("proj_out", "proj_out", True),
        ("audio_proj_out", "proj_out", False),
        ("blocks.1.attn.to_out.0", "blocks.1", True),
        ("single_blocks.1.attn.to_out.0", "blocks.1", False),
        ("blocks.10.attn", "blocks.1", False),
        ("blocks.1.norm1.linear", "*norm*", True),
        ("all_x_embedder.2-1", "all_x_embedder.2-1", True),
        ("model.layers.3.mlp.down_proj", "down_proj", True),
        ("model.layers.3.mlp.down_proj", "layers.?.mlp", True),
    ],
)
def test_matches(name, pattern, expected):
    assert matches(name, pattern) is expected


@given(names)
def test_a_name_matches_itself_and_each_of_its_parts(name):
    assert matches(name, name)
    assert all(matches(name, piece) for piece in name.split("."))


@given(names, part)
def test_a_longer_part_does_not_match(name, piece):
    assert not matches(f"x{piece}", piece) or piece == f"x{piece}"
