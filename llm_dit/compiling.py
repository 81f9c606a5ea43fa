"""Compiling a transformer, block by block where its class allows it."""

from __future__ import annotations

from typing import Any


def compile_component(model: Any, mode: str) -> None:
    """Compiles `model` in place.

    Regional compilation compiles one block for all that are alike: seconds where the whole model takes minutes. It is
    used where the diffusers class names its repeated blocks.

    Args:
        mode: a mode of `torch.compile`.
    """
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(mode=mode)
    else:
        model.compile(mode=mode)
