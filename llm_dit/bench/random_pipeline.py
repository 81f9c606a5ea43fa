"""Whole pipelines of the published sizes with random weights, made tensor by tensor and quantized as they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torchao.quantization import quantize_
from tqdm.auto import tqdm

from ..backends import ComponentRequest
from ..backends.saving import attach_saver
from ..families import published_models, quantizable_class
from ..planning.activations import make_on_meta, shortened
from ..planning.plan import Plan
from ..quantization import METHODS, get_method
from ..quantization.filters import decide_layers
from ..quantization.torchao_tensors.stream import quantize_weight
from .geometry import STD, random_model


def published_pipeline(model: str, tiny: str, plan: Plan, device: torch.device) -> Any:
    """A pipeline of a published model, quantized as `plan` says, ready to save.

    Args:
        tiny: the tiny pipeline that lends its tokenizer and scheduler.
        device: where the weights are made and held.
    """
    from ..tiny import build

    row = published_models()[model]
    pipe = quantizable_class(row.pipeline_class)(**build(tiny).components)
    for part in tqdm(plan.components, desc="Making random weights", unit="component"):
        make = row.components[part.name]
        request = None
        if part.method != "none":
            method = get_method(part.method)
            request = ComponentRequest(part.name, part.role, method, "per-row", plan.skip, torch.bfloat16)
        setattr(pipe, part.name, fill(make, device, request))
    return pipe


def fill(
    make: Callable[[], nn.Module], device: torch.device, request: ComponentRequest | None = None, stock: str | None = None
) -> nn.Module:
    """The model that `make` constructs with random weights, of which the bf16 ones that are quantized never exist together.

    Args:
        request: how it is quantized, by us.
        stock: or the method whose stock torchao configuration quantizes every Linear but the head, as diffusers does.
    """
    if request is None and stock is None:
        return random_model(make, device)
    model: Any = make_on_meta(make)
    layers = decide_layers(model, request.method, request.role, request.granularity, request.skip) if request else []
    configs = {f"{layer.name}.weight": layer.config for layer in layers if layer.config is not None}
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(
            float(parameter.ndim == 1 and leaf != "bias"), STD, generator=generator
        )
        if name in configs:
            value = quantize_weight(value, configs[name])
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        if stock is not None and isinstance(owner, nn.Linear) and leaf == "weight" and "lm_head" not in name:
            make_config = METHODS[stock].make_stock_config
            assert make_config is not None
            quantize_(owner, make_config("per-row"), filter_fn=lambda module, _, owner=owner: module is owner)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, torch.ones_like(buffer, device=device), persistent)
    _fill_tables(model, make, device)
    if request is not None:
        attach_saver(model, request, layers)
    return model


def _fill_tables(model: nn.Module, make: Callable[[], nn.Module], device: torch.device) -> None:
    """Gives `model` the tensors that are neither parameters nor buffers and still on meta, from a short model without weights.

    Without, because a budget may be measured in this process, which the weights of another model would not be part of.
    """
    left = [
        (name, key) for name, module in model.named_modules() for key, value in vars(module).items() if torch.is_tensor(value)
    ]
    if left:
        with init_empty_weights(include_buffers=False):
            short = shortened(make)()
        for name, key in left:
            setattr(model.get_submodule(name), key, getattr(short.get_submodule(name), key).to(device))
