"""Quantizers of ours for the loaders of diffusers and transformers, registered in both as `llm_dit`.

They replace pattern lists by exact names: before the weights are read, both loaders show their quantizer the model on
meta; the plan is made there, and afterwards a parameter is looked up by its full name. Reading, sharding, device
placement and key conversion stay the libraries' own. Saved models whose tensors torchao has no stock class for (int4,
convolutions) name this quantizer in their config.json; all others name torchao's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfigMixin
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor
from tqdm.auto import tqdm
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto as transformers_auto
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from ..quantization.filters import Layer
from .base import LoadPlan, Transform
from .host_memory import HostMemory
from .stock import DiffusersStockQuantizer, TransformersStockQuantizer


class Planner:
    """Makes the plan of a meta model; never copied.

    transformers copies configurations deeply (`PreTrainedConfig.to_dict`), and through the plans of the components that are
    loaded already a copy would reach their weights.
    """

    def __init__(self, make: Callable[[nn.Module], LoadPlan]) -> None:
        self._make = make

    def __call__(self, model: nn.Module) -> LoadPlan:
        return self._make(model)

    def __copy__(self) -> Planner:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        return self


QUANT_METHOD = "llm_dit"


class QuantMethod(enum.StrEnum):
    """The name under which both libraries find the quantizers; they want an enum member."""

    LLM_DIT = QUANT_METHOD


class _StreamingConfig:
    """What both configurations share.

    Attributes:
        planner: makes the plan of a meta model; None in a configuration that was read from a saved model.
        saved: what config.json records, e.g. {"method": "int4", "component_type": "transformer"}.
        bits: width of a quantized weight, from which the loaders size their first allocation.
    """

    def __init__(self, planner: Planner | None = None, bits: int = 8, **saved: Any) -> None:
        self.quant_method = QuantMethod.LLM_DIT
        self.planner = planner
        self.bits = bits
        self.saved = saved

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, "bits": self.bits, **self.saved}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config


class DiffusersStreamingConfig(_StreamingConfig, DiffusersConfigMixin):
    """Goes to `ModelMixin.from_pretrained(quantization_config=...)`."""


class TransformersStreamingConfig(_StreamingConfig, TransformersConfigMixin):
    """Goes to `PreTrainedModel.from_pretrained(quantization_config=...)`."""

    quant_type = None  # transformers before 5.23 reads it of any configuration that its torchao quantizer gets


class _Streaming:
    """State and steps that both quantizers share."""

    quantization_config: _StreamingConfig
    transforms: Mapping[str, Transform]
    layers: Sequence[Layer]
    progress: tqdm
    host_memory: HostMemory

    def make_plan(self, model: nn.Module) -> None:
        if self.quantization_config.planner is None:
            raise ValueError(
                f"{type(model).__name__} names the quantizer {QUANT_METHOD!r} in its configuration but is not quantized: "
                "load it through an llm_dit pipeline, or remove quantization_config from its config.json"
            )
        plan = self.quantization_config.planner(model)
        self.transforms, self.layers = plan.transforms, plan.layers
        self.host_memory = HostMemory()
        self.progress = tqdm(total=len(plan.transforms), desc=f"Quantizing {type(model).__name__}", delay=2, leave=False)

    def transform(self, name: str, value: Tensor, device: torch.device) -> nn.Parameter:
        try:
            quantized = self.transforms[name](value, device)
        except ValueError as error:
            raise ValueError(f"parameter {name!r} cannot be quantized: {error}") from error
        self.progress.update()
        if device.type == "cpu":
            self.host_memory.quantized(value.numel() * value.element_size())
        return nn.Parameter(quantized, requires_grad=False)


class DiffusersStreamingQuantizer(_Streaming, DiffusersStockQuantizer):
    """Quantizes parameter by parameter inside `load_model_dict_into_meta`, or reads our saved tensors back."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if torch_dtype is None else torch_dtype

    def adjust_target_dtype(self, target_dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def get_cuda_warm_up_factor(self) -> int:
        return 32 // self.quantization_config.bits

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs: Any) -> None:
        self.modules_to_not_convert: list[str] = []
        if not self.pre_quantized:
            self.make_plan(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Any], **kwargs: Any
    ) -> bool:
        if self.pre_quantized:
            return isinstance(param_value, TorchAOBaseTensor)
        return param_name in self.transforms

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        owner, _, name = param_name.rpartition(".")
        device = torch.device(target_device)
        parameter = (
            nn.Parameter(param_value.to(device), requires_grad=False)
            if self.pre_quantized
            else self.transform(param_name, param_value, device)
        )
        model.get_submodule(owner)._parameters[name] = parameter

    def _process_model_after_weight_loading(self, model: nn.Module) -> nn.Module:
        if not self.pre_quantized:
            self.progress.close()
        return model


class StreamedQuantize(ConversionOps):
    """The step of transformers' loader that puts a quantized parameter in the place of the one it read."""

    def __init__(self, quantizer: TransformersStreamingQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        owner, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = self.quantizer.transform(full_layer_name, value, value.device)
        # The mark keeps transformers' weight initialization, which runs for whatever it deems missing, off the
        # parameter.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[name] = parameter
        missing_keys.discard(full_layer_name)
        return {}


class TransformersStreamingQuantizer(_Streaming, TransformersStockQuantizer):
    """Quantizes parameter by parameter inside `convert_and_load_state_dict_in_model`, or reads our saved tensors back."""

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element, from which the loader sizes its first allocation on a device."""
        quantized = self.param_needs_quantization(model, param_name)
        return self.quantization_config.bits / 8 if quantized else param.element_size()

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.make_plan(model)
        elif checkpoint_files is not None:
            self.set_metadata(checkpoint_files)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return param_name.endswith(".weight")
        return param_name in self.transforms

    def get_quantize_ops(self) -> StreamedQuantize:
        return StreamedQuantize(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            self.progress.close()
        return model


def _register() -> None:
    """Both libraries' own tables; transformers has decorators for it, diffusers (0.42) only the dictionaries."""
    if QUANT_METHOD not in diffusers_auto.AUTO_QUANTIZER_MAPPING:
        diffusers_auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DiffusersStreamingQuantizer
        diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = DiffusersStreamingConfig
    if QUANT_METHOD not in transformers_auto.AUTO_QUANTIZER_MAPPING:
        transformers_auto.register_quantization_config(QUANT_METHOD)(TransformersStreamingConfig)
        transformers_auto.register_quantizer(QUANT_METHOD)(TransformersStreamingQuantizer)


_register()
