"""Backend "layerwise": diffusers' layerwise casting, fp8 storage without scales and 16-bit compute.

The weights are cast while they are read. Which ones, diffusers says itself: its casting is applied to a copy of the
meta model, and what became fp8 there is cast here. Once loaded, the same call puts the casting hooks on the model.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_layerwise_casting
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..quantization.component import layer_stats, require_quantizable
from ..quantization.detect import quantized_by
from ..quantization.filters import Layer, decide_layers, matches, named_layers
from ..quantization.hardware import require_support
from ..quantization.probe import probe_finite
from ..quantization.sizes import model_bytes
from ..quantization.torchao_tensors.staging import drain_staging
from ..quantization.torchao_tensors.stream import allocate, fetch, row_chunks, store
from .base import ComponentRequest, LoadPlan
from .saving import detach_saver

STORAGE_DTYPE = torch.float8_e4m3fn
ENCODER_SKIPS = ("norm", "embed", "lm_head", "vision", "visual")
"""`.dtype` of a transformers model is that of its first parameter, an embedding or a vision tower's, and pipelines
cast prompts
and latents to it: an fp8 one would cast them to fp8."""


class LayerwiseBackend:
    """Layerwise casting; see `Backend`."""

    name = "layerwise"

    def check(self, request: ComponentRequest) -> None:
        if request.role == "vae":
            raise ValueError(
                f"{request.name}: layerwise casting is not offered for a vae, because fp8 without scales costs it 4 to 14 dB of "
                "PSNR against int8: use backend 'torchao' with method 'int8'"
            )
        if request.method.name != "fp8-weight-only":
            raise ValueError(
                f"{request.name}: layerwise casting stores fp8 and computes in 16 bits, which is 'fp8-weight-only', not "
                f"{request.method.name!r}: use 'fp8-weight-only', or backend 'torchao'"
            )
        require_support(request.method)

    def plan(self, model: nn.Module, request: ComponentRequest) -> LoadPlan:
        cast = copy.deepcopy(model)
        _apply(cast, request)
        parameters = {name for name, parameter in cast.named_parameters() if parameter.dtype == STORAGE_DTYPE}
        layers = _layers(model, request, parameters)
        require_quantizable(layers, request.method, request.name)
        return LoadPlan(tuple(layers), dict.fromkeys(parameters, _cast_read))

    def finish(self, model: nn.Module, request: ComponentRequest, plan: LoadPlan) -> None:
        detach_saver(model)
        # By now a Z-Image controlnet also holds modules of the transformer, which follow the transformer's plan.
        _apply(model, request, {name.rpartition(".")[0] for name in plan.transforms})
        for layer in plan.layers:
            cast = model.get_submodule(layer.name).weight.dtype == STORAGE_DTYPE
            if cast != (layer.config is not None):
                raise RuntimeError(
                    f"{request.name}: layer {layer.name!r} {'is' if cast else 'is not'} in fp8 against the plan; "
                    "this is a fault in llm_dit or in its use of the loader, please report it"
                )
        probe_finite(model)

    def quantize_in_place(self, model: nn.Module, request: ComponentRequest) -> dict[str, Any]:
        source = quantized_by(model)
        if source is not None:
            raise ValueError(f"{request.name} is already quantized ({source}): layerwise casting would add nothing")
        before = model_bytes(model)
        _apply(model, request)
        parameters = {name for name, parameter in model.named_parameters() if parameter.dtype == STORAGE_DTYPE}
        layers = _layers(model, request, parameters)
        require_quantizable(layers, request.method, request.name)
        probe_finite(model)
        return layer_stats(layers, request.method, request.role, request.granularity, before, model_bytes(model))


def _apply(model: nn.Module, request: ComponentRequest, planned: set[str] | None = None) -> None:
    """Puts diffusers' casting on `model`; where `planned` is given, on those of its modules alone."""
    names = [re.escape(name) for name, module in model.named_modules() if _must_stay(name, module, request, planned)]
    # One pattern: diffusers searches every module's name for each, and Python keeps no more than 512 compiled.
    left = (f"^({'|'.join(names)})$",) if names else ()
    if isinstance(model, ModelMixin):
        model.enable_layerwise_casting(STORAGE_DTYPE, request.dtype, skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *left))
    else:
        apply_layerwise_casting(model, STORAGE_DTYPE, request.dtype, skip_modules_pattern=(*ENCODER_SKIPS, *left))


def _must_stay(name: str, module: nn.Module, request: ComponentRequest, planned: set[str] | None) -> bool:
    """True for what the user names, what its owner reads past the hook, and what is not in the plan."""
    unplanned = planned is not None and name not in planned and not any(module.children())
    read_past_hook = isinstance(module, NonDynamicallyQuantizableLinear)
    return unplanned or read_past_hook or any(matches(name, pattern) for pattern in request.skip)


def _layers(model: nn.Module, request: ComponentRequest, parameters: set[str]) -> list[Layer]:
    """The layers with diffusers' decision; the reasons are ours where our filters say the same. A cast takes any dimensions."""
    cast = replace(request.method, dims_multiple_of=1, in_features_multiple_of=1)
    ours = {layer.name: layer for layer in decide_layers(model, cast, request.role, "per-row", request.skip)}
    marker = request.method.make_config
    assert marker is not None
    layers = []
    for name, module in named_layers(model, request.role):
        if f"{name}.weight" in parameters:
            layers.append(Layer(name, module, marker("per-row")))
        else:
            reason = ours[name].reason or "diffusers' layerwise casting leaves it"
            layers.append(Layer(name, module, None, reason))
    return layers


def _cast_read(value: Tensor, device: torch.device) -> Tensor:
    """`value` as fp8 on `device`, in chunks; values beyond 448, which the cast would turn into NaN, are clamped."""
    if value.dtype == STORAGE_DTYPE:
        return value.to(device)
    limit = torch.finfo(STORAGE_DTYPE).max
    result = allocate(value.shape, STORAGE_DTYPE, device)
    rows, out = torch.atleast_1d(value), torch.atleast_1d(result)
    for chunk in row_chunks(rows, device):
        store(out[chunk], fetch(rows[chunk], device).clamp(-limit, limit).to(STORAGE_DTYPE))
    drain_staging()
    return result
