"""Whose checkpoint a file is, from the names in its header.

Apart from `llm_dit.families`, whose modules import diffusers: this takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from .layout import PREFIXES


@dataclass(frozen=True)
class Kind:
    """What a file is a checkpoint of.

    Attributes:
        family: name of the family's module in `llm_dit.families`, or "" for a text encoder.
        title: for people.
        names: names that every such file has, one form each; any of the groups suffices.
    """

    family: str
    title: str
    names: tuple[frozenset[str], ...]


def _kind(family: str, title: str, *names: tuple[str, ...]) -> Kind:
    return Kind(family, title, tuple(map(frozenset, names)))


KINDS: Final = (
    _kind(
        "flux2",
        "FLUX.2 transformer",
        ("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
        ("transformer_blocks.0.attn.to_q.weight", "single_stream_modulation.linear.weight"),
    ),
    _kind(
        "ltx2",
        "LTX-2 transformer",
        ("audio_patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight"),
        ("audio_proj_in.weight", "transformer_blocks.0.attn1.to_q.weight"),
    ),
    _kind(
        "z_image",
        "Z-Image transformer",
        ("layers.0.attention.qkv.weight", "cap_embedder.1.weight"),
        ("layers.0.attention.to_q.weight", "cap_embedder.1.weight"),
    ),
    _kind("qwen_image", "Qwen-Image transformer", ("transformer_blocks.0.img_mod.1.weight", "img_in.weight")),
    _kind("", "text encoder", ("model.layers.0.self_attn.q_proj.weight",), ("layers.0.self_attn.q_proj.weight",)),
)


def recognize(names: Collection[str]) -> Kind | None:
    """What the tensors of these names are a checkpoint of, or None; prefixes of single files are looked past."""
    for prefix in ("", *PREFIXES):
        for kind in KINDS:
            if any(all(prefix + name in names for name in group) for group in kind.names):
                return kind
    return None
