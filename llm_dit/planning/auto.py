"""`from_pretrained(quantization="auto", vram_budget=...)`: plans, loads what was planned, and carries the plan out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import hub_keywords
from ..loader import method_in, read_json
from ..names import COMPONENT_TYPES
from ..quantization import get_method, get_recommended_method
from ..request import LoadOptions, configured
from .card import CPU, parse_bytes
from .detect import card_at_hand
from .placing import carry_out
from .plan import Plan, make_plan, plan_keywords

if TYPE_CHECKING:
    from ..mixin import QuantizablePipelineMixin


def load_auto(cls: type[QuantizablePipelineMixin], source: str, options: LoadOptions, kwargs: dict[str, Any]) -> Any:
    """The pipeline, planned for the budget or for what is free of the GPU.

    Without a GPU and without a budget there is nothing to fit into: the transformer gets the method for the hardware. So it does
    where a file or a passed component takes a component's place, which a plan knows nothing of.

    Raises:
        ValueError: if nothing fits, or an argument contradicts the plan.
    """
    if kwargs.get("device_map") == "balanced":
        raise ValueError(
            "device_map='balanced' spreads models over GPUs, and quantization='auto' places them itself: leave it out"
        )
    card, given = card_at_hand(), options.vram_budget
    section = configured(options.config, cls.family.name)[1]
    files = (options.transformer_file, options.encoder_file, section.transformer_file, section.encoder_file)
    replaced = any(files) or any(isinstance(value, torch.nn.Module) for value in kwargs.values())
    if given is None and (card is None or replaced):
        return cls._load(source, _by_hardware(source, options, kwargs), kwargs)
    if replaced:
        raise ValueError(
            "vram_budget plans a pipeline from its own folder, and a file or a passed component takes a part of it: leave one of "
            "the two out"
        )
    budget = parse_bytes(given) if given is not None else card.memory_bytes if card else 0
    layers = options.encoder_layers or "read"
    plan = make_plan(source, budget, card or CPU, fixed=_fixed(options), encoder_layers=layers, **hub_keywords(kwargs))
    if not plan.fits:
        raise ValueError(f"{plan}; {'; '.join(plan.would)}")
    pipe = cls._load(source, _planned(options, plan), _placed(plan, kwargs))
    pipe._recorder = carry_out(pipe, plan)
    return pipe


def plan_for(source: str, budget: int) -> Plan:
    """The plan that `vram_budget` gives on the machine at hand."""
    return make_plan(source, budget, card_at_hand() or CPU)


def _by_hardware(source: str, options: LoadOptions, kwargs: dict[str, Any]) -> LoadOptions:
    """The options with the method for the hardware, or that of a transformer that was saved quantized."""
    own = not options.transformer_file and "transformer" not in kwargs
    config = read_json(source, "transformer/config.json", hub_keywords(kwargs)) if own else {}
    if saved := method_in(config):
        note = f"quantization='auto' left the transformer in {saved}, as it was saved"
        return replace(options, quantization=saved, notes=(note,))
    if options.quantization_transformer is not None:
        return replace(options, quantization=None)
    method = get_recommended_method()
    note = f"quantization='auto' chose {method} for the transformer, by the hardware: there is no budget to plan for"
    return replace(options, quantization=method, notes=(note,))


def _fixed(options: LoadOptions) -> dict[str, str]:
    """The methods that the caller chose, by role."""
    given = {role: getattr(options, f"quantization_{role}") for role in COMPONENT_TYPES}
    return {role: get_method(method, f"quantization_{role}").name for role, method in given.items() if method is not None}


def _planned(options: LoadOptions, plan: Plan) -> LoadOptions:
    """The options with what was planned where the caller said nothing."""
    wanted = plan_keywords(plan)
    compile = bool(wanted.get("compile")) if options.compile is None else options.compile
    return replace(
        options,
        planned=True,
        quantization=wanted["quantization"] or None,
        quantization_transformer=None,
        quantization_encoder=None,
        quantization_vae=None,
        encoder_layers=options.encoder_layers or plan.encoder_layers,
        quantization_skip=options.quantization_skip if options.quantization_skip is not None else plan.skip or None,
        compile=compile,
        compile_mode=options.compile_mode or wanted.get("compile_mode"),
    )


def _placed(plan: Plan, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The other arguments, for a load to where the plan wants the weights, in the dtype whose bytes were planned."""
    if not {"dtype", "torch_dtype"} & kwargs.keys():
        kwargs = {**kwargs, "torch_dtype": torch.bfloat16}
    resident = plan.shown.candidate.offload == "none"
    if kwargs.get("device_map") is not None and not resident:
        raise ValueError(
            f"device_map={kwargs['device_map']!r} loads everything onto the device, and {plan.source} fits into the budget with "
            f"offload {plan.shown.candidate.offload!r} only: leave device_map out"
        )
    if resident and torch.cuda.is_available() and kwargs.get("device_map") is None:
        return {**kwargs, "device_map": "cuda"}
    return kwargs
