"""Making a quantized component save like one that its library quantized.

Both libraries save quantized tensors only through a quantizer object on the model. Where every tensor is a stock torchao
one, that is torchao's own quantizer with a stock configuration, so plain diffusers and transformers load the folder;
otherwise it is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import transformers
from diffusers import ModelMixin
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..quantization.filters import Layer
from .base import ComponentRequest
from .streaming import DiffusersStreamingConfig, TransformersStreamingConfig

STOCK_TENSORS = (Float8Tensor, Int8Tensor)


def attach_saver(model: nn.Module, request: ComponentRequest, layers: Sequence[Layer]) -> None:
    """Gives `model` the quantizer that `save_pretrained` asks for; a module of neither library is left alone."""
    left = [layer.parameter for layer in layers if layer.config is None]
    stock = request.method.make_stock_config
    stock_config = stock(request.granularity) if stock and _all_stock(model) else None
    if isinstance(model, ModelMixin):
        _attach_diffusers(model, request, stock_config, left)
    elif isinstance(model, PreTrainedModel):
        _attach_transformers(model, request, stock_config, left)


def detach_saver(model: nn.Module) -> None:
    """Takes the loader's quantizer off `model` again, for components that are to count as unquantized."""
    if isinstance(model, ModelMixin):
        model.is_quantized = False
        model.quantization_method = None
        if "quantization_config" in model.config:
            config = {key: value for key, value in model.config.items() if key != "quantization_config"}
            model._internal_dict = type(model._internal_dict)(config)
        model.__dict__.pop("hf_quantizer", None)
    elif isinstance(model, PreTrainedModel):
        model.hf_quantizer.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized


def _all_stock(model: nn.Module) -> bool:
    return all(type(p) in STOCK_TENSORS for p in model.parameters() if isinstance(p, TorchAOBaseTensor))


def _record(request: ComponentRequest) -> dict[str, Any]:
    granularity = {"granularity": request.granularity} if request.method.fp8 else {}
    return {
        "bits": round(request.method.bytes_per_weight * 8),
        "method": request.method.name,
        "component_type": request.role,
        **granularity,
    }


def _attach_diffusers(
    model: ModelMixin, request: ComponentRequest, stock_config: AOBaseConfig | None, left: list[str]
) -> None:
    config: Any
    if stock_config is not None:
        # Full parameter names: diffusers compares these as substrings of module names otherwise, so that "proj_out" would
        # also hit "audio_proj_out".
        config = diffusers.TorchAoConfig(stock_config, modules_to_not_convert=left)
    else:
        config = DiffusersStreamingConfig(**_record(request))
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment()
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)


def _attach_transformers(
    model: PreTrainedModel, request: ComponentRequest, stock_config: AOBaseConfig | None, left: list[str]
) -> None:
    config: Any
    if stock_config is not None:
        config = transformers.TorchAoConfig(stock_config, modules_to_not_convert=left)
    else:
        config = TransformersStreamingConfig(**_record(request))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment()
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
