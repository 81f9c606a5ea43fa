"""What a saved component's config.json says of its weights. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

LAYERWISE_KEY: Final = "llm_dit_layerwise"
"""It was saved with layerwise casting, which stores fp8 without any other mark. For diffusers it begins with _, as what is no
argument of a model does."""
WEIGHTS_KEYS: Final = ("quantization_config", LAYERWISE_KEY, f"_{LAYERWISE_KEY}")
"""All keys that say how weights were saved; the others say what the model is."""


def was_quantized(saved: Mapping[str, Any]) -> bool:
    """True if a component's config.json says that it was saved quantized."""
    return saved.get("quantization_config") is not None or was_layerwise(saved)


def layerwise_mark(skip: Sequence[str]) -> dict[str, Any]:
    """What is written under the key: the patterns of the modules that were left alone, which nothing else in the folder tells."""
    return {"skip": list(skip)}


def layerwise_skip(saved: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns that a component was cast layerwise without; none in folders that say no more than that it was cast."""
    mark = _mark(saved)
    return tuple(mark["skip"]) if isinstance(mark, Mapping) else ()


def was_layerwise(saved: Mapping[str, Any]) -> bool:
    """True if a component's config.json says that it was saved with layerwise casting."""
    return bool(_mark(saved))


def _mark(saved: Mapping[str, Any]) -> Any:
    return saved.get(LAYERWISE_KEY) or saved.get(f"_{LAYERWISE_KEY}")
