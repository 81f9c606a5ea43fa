"""Making a quantized component save like one that its library quantized.

Both libraries save quantized tensors only through a quantizer object on the model. Where every tensor is a stock
torchao one, that is torchao's own quantizer with a stock configuration, so plain diffusers and transformers load the
folder; otherwise it is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import transformers
from diffusers import ModelMixin
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..quantization.filters import Layer
from ..quantization.torchao_tensors.fused import FusedFloat8Tensor, FusedInt8Tensor
from .base import ComponentRequest
from .streaming import DiffusersStreamingConfig, TransformersStreamingConfig

STOCK_TENSORS = (Float8Tensor, Int8Tensor, FusedFloat8Tensor, FusedInt8Tensor)


def attach_saver(model: nn.Module, request: ComponentRequest, layers: Sequence[Layer]) -> None:
    """Gives `model` the quantizer that `save_pretrained` asks for; a module of neither library is left alone."""
    stock = request.method.make_stock_config
    library: Any = diffusers if isinstance(model, ModelMixin) else transformers
    if stock is not None and _all_stock(model):
        # Full parameter names: diffusers compares these as substrings of module names otherwise, so that "proj_out"
        # would also hit "audio_proj_out".
        left = [layer.parameter for layer in layers if layer.config is None]
        _attach(model, library.TorchAoConfig(stock(request.granularity), modules_to_not_convert=left))
        return
    kind = DiffusersStreamingConfig if library is diffusers else TransformersStreamingConfig
    _attach(model, kind(**_record(request)))


def attach_plain_saver(model: nn.Module) -> None:
    """Gives a model that somebody quantized without a request, e.g. with `quantize_component`, our quantizer to save with."""
    _attach(model, DiffusersStreamingConfig() if isinstance(model, ModelMixin) else TransformersStreamingConfig())


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


def _attach(model: nn.Module, config: Any) -> None:
    """Sets what `save_pretrained` of either library looks at; a module of neither has nothing of the kind."""
    if isinstance(model, ModelMixin):
        quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
        model.register_to_config(quantization_config=config)
    elif isinstance(model, PreTrainedModel):
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        model.config.quantization_config = config
    else:
        return
    model.hf_quantizer = quantizer
    model.hf_quantizer.validate_environment()
    model.is_quantized = True
    model.quantization_method = config.quant_method
