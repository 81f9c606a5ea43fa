"""Text encoder and the rest take turns on the device: what a plan calls encode_then_free."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..loader import models_of
from ..moving import move_models

HOST = torch.device("cpu")


class Turns:
    """The one come, and the others go, when a model of it is about to run; the VAE stays.

    Attributes:
        device: where models run, wherever they lie between the calls.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        # Held weakly, because the models' hooks hold this: their memory is to go with the pipeline, not at a collection.
        self._pipe = weakref.ref(pipe)
        self.device = device
        self._turn: bool | None = None
        models = models_of(pipe)
        move_models([models["vae"]], device)
        for name, model in models.items():
            if self._encodes(name):
                model.register_forward_pre_hook(self._encode, with_kwargs=True)
            elif name != "vae":
                model.register_forward_pre_hook(self._work)

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        """Of a pipeline's copy; pipelines copy themselves before their models, whose hooks come here."""
        twin = copy.copy(self)
        pipe = self._pipe()
        twin._pipe = weakref.ref(memo.get(id(pipe), pipe))
        memo[id(self)] = twin
        return twin

    @torch.compiler.disable  # a model that is compiled whole runs its hooks inside of what is compiled
    def take(self, encoding: bool) -> None:
        """Brings the text encoders, or all others, once those in their place have left."""
        pipe = self._pipe()
        models = models_of(pipe) if pipe is not None else {}
        come = [model for name, model in models.items() if name == "vae" or self._encodes(name) == encoding]
        if self._turn == encoding and all(_lies_on(model, self.device) for model in come):
            return
        self._turn = None  # until all have come: a move may end for want of memory
        go = [model for name, model in models.items() if name != "vae" and self._encodes(name) != encoding]
        move_models(go, HOST)
        torch.cuda.empty_cache()
        move_models(come, self.device)
        self._turn = encoding

    def _encodes(self, name: str) -> bool:
        pipe = self._pipe()
        return pipe is not None and name in pipe.family.encoding.encoders

    def _encode(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Takes the turn, and the inputs along: FLUX.2's pipelines put them where the text encoder still lies."""
        self.take(encoding=True)
        return send_to_device((args, kwargs), self.device)

    def _work(self, *_: Any) -> None:
        self.take(encoding=False)


def _lies_on(model: nn.Module, device: torch.device) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is None or parameter.device == device
