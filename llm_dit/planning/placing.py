"""Puts a loaded pipeline where its plan says: offloading, freed encoders, a decode that stays in the budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from torch import nn

from ..decoding import fit_decoding, free_device_bytes
from ..loader import models_of
from ..moving import move_models
from .constants import constants
from .measured import Recorder
from .plan import Plan


def carry_out(pipe: Any, plan: Plan) -> Recorder:
    """Places a pipeline that was loaded as planned, and watches what it takes; without a GPU nothing is moved."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recorder = Recorder(plan, device)
    recorder.note()
    if device.type == "cuda":
        _place(pipe, plan, device)
    recorder.watch(models_of(pipe))  # last: a phase begins when what is to leave before it has left
    return recorder


def _place(pipe: Any, plan: Plan, device: torch.device) -> None:
    offload = plan.shown.candidate.offload
    if offload == "encode_then_free":
        Turns(pipe, plan, device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level")
    for name, model in models_of(pipe).items():
        if pipe.component_role(name) == "vae":
            _decode_within(model, plan.budget)


def _decode_within(vae: Any, budget: int) -> None:
    """A VAE tiles by what is left of the budget, which may be less than of the card."""

    def free(device: torch.device) -> int | None:
        there = free_device_bytes(device)
        within = budget - constants().context_bytes - torch.cuda.memory_allocated(device)
        return there if there is None else min(there, within)

    vars(vae).pop("decode", None)
    fit_decoding(vae, free)


class Turns:
    """The text encoder and the rest take turns on the device; the VAE stays, so that the pipeline knows where it runs.

    The one comes, and the others go, when a component of it is about to run.
    """

    def __init__(self, pipe: DiffusionPipeline, plan: Plan, device: torch.device) -> None:
        models, family = models_of(pipe), pipe.family
        self._device = device
        self._encoders = [model for name, model in models.items() if name in family.encoding.encoders]
        self._rest = [model for name, model in models.items() if name not in (*family.encoding.encoders, "vae")]
        self._turn = ""
        move_models([models["vae"]], device)
        for model in self._encoders:
            model.register_forward_pre_hook(self._encode, with_kwargs=True)
        for name in ("connectors", "transformer"):
            if name in models:
                models[name].register_forward_pre_hook(lambda *_: self._take("rest", self._rest, self._encoders))

    def _encode(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Takes the turn, and the inputs along: FLUX.2's pipelines put them where the text encoder still lies."""
        self._take("encoders", self._encoders, self._rest)
        return send_to_device((args, kwargs), self._device)

    def _take(self, turn: str, come: Iterable[nn.Module], go: Iterable[nn.Module]) -> None:
        if turn == self._turn or torch.compiler.is_compiling():
            return
        move_models(go, torch.device("cpu"))
        torch.cuda.empty_cache()
        move_models(come, self._device)
        self._turn = turn
