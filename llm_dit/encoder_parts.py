"""Loading of a text encoder what the family's pipelines read, from a whole folder."""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import nn

from .arguments import hub_keywords
from .building import component_class
from .checkpoints.encoders import Unread, take_off_unread


def load_read_parts(entry: tuple[str, str], source: str, name: str, unread: Unread, **keywords: Any) -> nn.Module:
    """The text encoder without what `unread` names; its weights are neither read nor held.

    Args:
        entry: library and class, of model_index.json.
        source, name: the pipeline's folder or repository, and the component's name in it.
        **keywords: for `from_pretrained` of the class.
    """
    cls: Any = component_class(*entry)
    # The parts are taken off where transformers makes the model, on meta, before it looks for their weights.
    partly: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__init__": _init_without(cls, unread)})
    config = transformers.AutoConfig.from_pretrained(source, subfolder=name, **hub_keywords(keywords))
    partly._keys_to_ignore_on_load_unexpected = [
        *(cls._keys_to_ignore_on_load_unexpected or ()),
        *unread_patterns(unread, config),
    ]
    model = partly.from_pretrained(source, subfolder=name, **keywords)
    model.__class__ = cls
    return model


def _init_without(cls: Any, unread: Unread) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        take_off_unread(self, unread)

    return init


def unread_patterns(unread: Unread, config: Any) -> list[str]:
    """What the names of the weights that are left in the folder look like."""
    count = config.get_text_config().num_hidden_layers
    above = "|".join(map(str, range(unread.layers_read(count), count)))
    layers = [rf"\blayers\.({above})\."] if above else []
    return [*layers, *(rf"(^|\.){re.escape(part)}\b" for part in unread.modules)]
