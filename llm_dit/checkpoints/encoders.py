"""Text encoders from single files, as ComfyUI publishes them: names of transformers before version 5, and only what is read.

FLUX.2-dev's file, for example, has 30 of Mistral's 40 layers and neither head nor final norm nor vision tower, because the
pipeline reads the hidden states of layers 10, 20 and 30. What a file leaves out and nothing reads is taken off the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

PRUNED: str = "_llm_dit_pruned"
"""Attribute of a model that parts were taken off, with their names; it cannot be saved as the whole model that its class is."""
_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.")


def encoder_name(name: str, expected: Collection[str]) -> str | None:
    """The name in transformers 5 of a tensor of an encoder's file; None for a head that the model does not have."""
    language = name.removeprefix("model.")
    candidates = (
        name,
        f"model.{name}",
        language,
        f"language_model.{language}",
        f"model.language_model.{language}",
        f"model.{name.replace('vision_model.', 'vision_tower.', 1)}",
        f"model.{name.replace('vision_model.', 'vision_tower.vision_model.', 1)}",
    )
    found = next((candidate for candidate in candidates if candidate in expected), None)
    return None if found is None and name.startswith("lm_head.") else found or name


@dataclass(frozen=True)
class Unread:
    """What a file may leave out because no pipeline of the family reads it.

    Attributes:
        modules: the last parts of modules' names, e.g. "lm_head".
        layers_from: the share of the layers, counted from the first, that is read; what lies above may be missing.
    """

    modules: tuple[str, ...] = ()
    layers_from: float = 1.0

    def split(self, model: nn.Module, missing: Sequence[str]) -> tuple[list[str], list[str]]:
        """(missing parameters that are not read, those that are)."""
        layers = _language_layers(model)
        unread: list[str] = []
        read: list[str] = []
        for name in missing:
            layer = _LAYER.match(name)
            above = (
                layer is not None
                and layers is not None
                and layer[1] == layers[0]
                and int(layer[2]) >= layers[1] * self.layers_from
            )
            (unread if above or self.covers(name) else read).append(name)
        return unread, read

    def covers(self, name: str) -> bool:
        """True if a tensor is of one of `modules`."""
        return any(f".{part}." in f".{name}" for part in self.modules)


def prune(model: Any, absent: Sequence[str], unread: Unread) -> list[str]:
    """Takes what `absent` names off `model`; returns what was taken off, for people."""
    removed = []
    layers = _language_layers(model)
    if layers is not None:
        path, count = layers
        gone = {int(match[2]) for name in absent if (match := _LAYER.match(name)) and match[1] == path}
        if gone:
            first = min(gone)
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_submodule(path)[:first])
            config: Any = model.config.get_text_config()
            config.num_hidden_layers = first
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:first]
            removed.append(f"layers {first} to {count - 1}" if first < count - 1 else f"layer {first}")
    pruned = bool(removed)
    for part in unread.modules:
        for name, _ in list(model.named_modules()):
            named = name == part or name.endswith(f".{part}")
            # Without its last layers a model would put its final norm, and its head, behind one that is read as it is.
            if named and (pruned or any(key.startswith(f"{name}.") for key in absent)):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Identity())
                removed.append(name)
    setattr(model, PRUNED, tuple(removed))
    return removed


def _language_layers(model: Any) -> tuple[str, int] | None:
    """The name of the language model's list of layers, and how many it has."""
    config: Any = getattr(model, "config", None)
    count = config.get_text_config().num_hidden_layers if hasattr(config, "get_text_config") else 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == count and "vision" not in name:
            return name, count
    return None
