"""Puts a loaded pipeline where its plan says: offloading, freed encoders, a decode that stays in the budget."""

from __future__ import annotations

from typing import Any

import torch

from ..decoding import fit_decoding, free_device_bytes
from ..loader import models_of
from ..quantization.hardware import current_device
from .constants import constants
from .measured import Recorder
from .plan import Plan
from .turns import Turns


def carry_out(pipe: Any, plan: Plan) -> Recorder:
    """Places a pipeline that was loaded as planned, and watches what it takes; without a GPU nothing is moved."""
    device = current_device()
    recorder = Recorder(plan, device)
    recorder.note()
    if device.type == "cuda":
        if plan.shown.candidate.offload == "encode_then_free":
            recorder.begin("encode")  # the encoders have the first turn, and come now
        _place(pipe, plan, device)
    recorder.watch(models_of(pipe))  # last: a phase begins when what is to leave before it has left
    return recorder


def _place(pipe: Any, plan: Plan, device: torch.device) -> None:
    offload = plan.shown.candidate.offload
    if offload == "encode_then_free":
        pipe._turns = Turns(models_of(pipe), pipe.family.encoding.encoders, device)
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
