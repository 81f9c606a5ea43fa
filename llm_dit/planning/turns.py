"""Text encoder and the rest take turns on the device: what a plan calls encode_then_free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..moving import move_models

STAYS: Final = "vae"
HOST: Final = torch.device("cpu")


class Turns:
    """The one come, and the others go, when a model of it is about to run; the VAE stays.

    Attributes:
        device: where models run, wherever they lie between the calls.
    """

    def __init__(self, models: Mapping[str, nn.Module], encoders: Collection[str], device: torch.device) -> None:
        """Hooks the models of a pipeline, by name; `encoders` are those that encode a prompt."""
        # Held weakly, because their hooks hold this: their memory is to go with the pipeline, not at a collection.
        self._models = WeakValueDictionary(models)
        self._encoders = frozenset(encoders)
        self._turn: bool | None = None
        self.device = device
        move_models([models[STAYS]], device)
        for name, model in models.items():
            if name in self._encoders:
                model.register_forward_pre_hook(self._encode, with_kwargs=True)
            elif name != STAYS:
                model.register_forward_pre_hook(self._work)

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        """Comes with the hooks of a model's copy, and does nothing until `of` says what the other models are."""
        twin = memo[id(self)] = copy(self)
        twin._models, twin._turn = WeakValueDictionary(), None
        return twin

    def of(self, models: Mapping[str, nn.Module]) -> None:
        """Makes these, which have the hooks, the models that take turns."""
        self._models = WeakValueDictionary(models)

    @torch.compiler.disable  # a model that is compiled whole runs its hooks inside of what is compiled
    def take(self, encoding: bool) -> None:
        """Brings the text encoders, or all others, once those in their place have left."""
        come = [model for name, model in self._models.items() if name == STAYS or (name in self._encoders) == encoding]
        if self._turn == encoding and all(_lies_on(model, self.device) for model in come):
            return
        self._turn = None  # until all have come: a move may end for want of memory
        go = [model for name, model in self._models.items() if name != STAYS and (name in self._encoders) != encoding]
        move_models(go, HOST)
        torch.cuda.empty_cache()
        move_models(come, self.device)
        self._turn = encoding

    def _encode(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Takes the turn, and the inputs along: FLUX.2's pipelines put them where the text encoder still lies."""
        self.take(encoding=True)
        return send_to_device((args, kwargs), self.device) if self._models else None

    def _work(self, *_: Any) -> None:
        self.take(encoding=False)


def _lies_on(model: nn.Module, device: torch.device) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is None or parameter.device == device
