"""Backend "torchao": weights are quantized as they are read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.utils import TorchAOBaseTensor

from ..quantization.component import quantize_component, require_quantizable
from ..quantization.filters import decide_layers, vae_refusal
from ..quantization.hardware import require_support
from ..quantization.probe import probe_finite
from ..quantization.torchao_tensors.staging import drain_staging
from ..quantization.torchao_tensors.stream import quantize_weight
from .base import ComponentRequest, LoadPlan
from .saving import attach_saver


class TorchaoBackend:
    """Runtime quantization with torchao tensors; see `Backend`."""

    name = "torchao"

    def check(self, request: ComponentRequest) -> None:
        if request.role == "vae" and request.method.name != "int8":
            raise ValueError(f"{request.name}: {vae_refusal(request.method.name)}")
        require_support(request.method, request.granularity, request.dtype)

    def plan(self, model: nn.Module, request: ComponentRequest) -> LoadPlan:
        layers = decide_layers(model, request.method, request.role, request.granularity, request.skip)
        require_quantizable(layers, request.method, request.name)
        transforms = {
            layer.parameter: partial(_quantize_read, config=layer.config) for layer in layers if layer.config is not None
        }
        return LoadPlan(tuple(layers), transforms)

    def finish(self, model: nn.Module, request: ComponentRequest, plan: LoadPlan) -> None:
        drain_staging()
        for layer in plan.layers:
            quantized = isinstance(model.get_submodule(layer.name)._parameters.get("weight"), TorchAOBaseTensor)
            if quantized != (layer.config is not None):
                wanted, found = ("quantized", "is not") if layer.config else ("left as it was", "is quantized")
                raise RuntimeError(
                    f"{request.name}: layer {layer.name!r} was to be {wanted} and {found}; "
                    "this is a fault in llm_dit or in its use of the loader, please report it"
                )
        probe_finite(model)
        attach_saver(model, request, plan.layers)

    def quantize_in_place(self, model: nn.Module, request: ComponentRequest) -> dict[str, Any]:
        plan = LoadPlan(tuple(decide_layers(model, request.method, request.role, request.granularity, request.skip)), {})
        _, stats = quantize_component(model, request.method.name, request.role, request.granularity, skip_patterns=request.skip)
        if stats["method"] == request.method.name:
            self.finish(model, request, plan)
        return stats


def _quantize_read(value: Tensor, device: torch.device, config: AOBaseConfig) -> Tensor:
    return quantize_weight(value, config, device, wait=False)
