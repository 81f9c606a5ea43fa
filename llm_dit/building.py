"""Components without weights, from their saved configuration: for estimates, and to be filled from a checkpoint file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from .saved import WEIGHTS_KEYS


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Models are made, as in `from_pretrained`, under the dtype they load in, which buffers follow."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def component_class(library: str, class_name: str) -> type:
    """The class that an entry of model_index.json names: of a library, or of a pipeline's module in diffusers."""
    module = importlib.import_module(f"diffusers.pipelines.{library}") if hasattr(diffusers.pipelines, library) else None
    return getattr(module or importlib.import_module(library), class_name)


def build_empty(
    cls: Any, config: Mapping[str, Any], source: str, component: str, dtype: torch.dtype, hub: Mapping[str, Any]
) -> nn.Module:
    """A component whose parameters are on meta, and whose buffers are real where the configuration determines them.

    Args:
        cls: its class.
        config: its config.json.
        source: the folder or repository that the configuration of a transformers model is read from again, by its own library.
        component: its name there.
    """
    with default_dtype(dtype), init_empty_weights(include_buffers=False):
        if not issubclass(cls, transformers.PreTrainedModel):
            plain = {key: value for key, value in config.items() if key not in WEIGHTS_KEYS}
            return cls.from_config(plain).eval()
        loaded = transformers.AutoConfig.from_pretrained(source, subfolder=component, **hub)
        for key in WEIGHTS_KEYS:
            if hasattr(loaded, key):
                delattr(loaded, key)
        model = cls._from_config(loaded, dtype=dtype).eval()
    model.tie_weights()  # inside, every parameter is registered as one of its own
    return model
