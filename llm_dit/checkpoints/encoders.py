"""Text encoders from single files, as ComfyUI publishes them: names of transformers before version 5, and only what is read.

FLUX.2-dev's file, for example, has 30 of Mistral's 40 layers and neither head nor final norm nor vision tower, because the
pipeline reads the hidden states of layers 10, 20 and 30. What a file leaves out and nothing reads is taken off the model, and can
be left unread in a whole folder too. A layer that is taken off hands its input on, so that the places of hidden states are what
they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

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


def _all(count: int) -> int:
    return count


@dataclass(frozen=True)
class Unread:
    """What no pipeline of the family reads of its text encoder, and a file may leave out.

    Attributes:
        modules: the last parts of modules' names, e.g. "lm_head".
        layers_read: from the number of layers, how many are read, counted from the first.
        only_in_files: those of `modules` that are too small to leave unread where they are there.
    """

    modules: tuple[str, ...] = ()
    layers_read: Callable[[int], int] = _all
    only_in_files: tuple[str, ...] = ()

    @property
    def in_folders(self) -> bool:
        """True if something is left unread of a model that is there whole."""
        return self.layers_read is not _all

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
                and int(layer[2]) >= self.layers_read(layers[1])
            )
            (unread if above or self.covers(name) else read).append(name)
        return unread, read

    def covers(self, name: str) -> bool:
        """True if a tensor is of one of `modules`."""
        return any(f".{part}." in f".{name}" for part in self.modules)

    def names(self, module: str) -> bool:
        """True if a module is one of `modules`."""
        return any(module == part or module.endswith(f".{part}") for part in self.modules)

    def stays(self, module: str, tied: bool) -> bool:
        """True if a module of `modules` stays in a model that is there whole: it is small, or its weight is the embedding's."""
        leaf = module.rpartition(".")[2]
        return leaf in self.only_in_files or (tied and leaf == "lm_head")


def prune(model: Any, absent: Sequence[str], unread: Unread) -> list[str]:
    """Takes what `absent` names off `model`; returns what was taken off, for people."""
    path, _ = _language_layers(model) or ("", 0)
    layers = {int(match[2]) for name in absent if (match := _LAYER.match(name)) and match[1] == path}
    modules = [
        name for name, _ in model.named_modules() if unread.names(name) and any(key.startswith(f"{name}.") for key in absent)
    ]
    return _take_off(model, path, layers, modules)


def take_off_unread(model: Any, unread: Unread) -> list[str]:
    """Takes all off `model` that nothing reads and that takes memory; returns what that was, for people."""
    path, count = _language_layers(model) or ("", 0)
    layers = set(range(unread.layers_read(count), count))
    tied = model.config.get_text_config().tie_word_embeddings
    modules = [
        name
        for name, module in model.named_modules()
        if unread.names(name) and not unread.stays(name, tied) and any(True for _ in module.parameters())
    ]
    return _take_off(model, path, layers, modules)


def _take_off(model: Any, path: str, layers: Collection[int], modules: Sequence[str]) -> list[str]:
    removed = []
    for index in layers:
        layer = model.get_submodule(f"{path}.{index}")
        layer._modules.clear()
        kind: Any = type(layer)
        layer.__class__ = _skipped(kind)
    if layers:
        first, last = min(layers), max(layers)
        removed.append(f"layers {first} to {last}" if first < last else f"layer {first}")
    for name in modules:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Identity())
        removed.append(name)
    setattr(model, PRUNED, tuple(removed))
    return removed


@cache
def _skipped(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The class of layers without weights; it is one of `layer_class`, whose outputs transformers records as hidden states."""

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    return type(f"Skipped{layer_class.__name__}", (layer_class,), {"forward": forward})


def _language_layers(model: Any) -> tuple[str, int] | None:
    """The name of the language model's list of layers, and how many it has."""
    config: Any = getattr(model, "config", None)
    count = config.get_text_config().num_hidden_layers if hasattr(config, "get_text_config") else 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == count and "vision" not in name:
            return name, count
    return None
