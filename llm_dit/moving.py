"""What is done to a loaded pipeline as a whole: moving, offloading, copying."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .loader import models_of
from .quantization import get_quant_compile_warnings, quantized_by
from .quantization.report import QuantizationReport
from .quantization.torchao_tensors.staging import move_model_to_gpu, staged

if TYPE_CHECKING:
    from .planning.turns import Turns

logger = logging.getLogger(__name__)

KEEP_DTYPES: Final[ContextVar[bool]] = ContextVar("keep_dtypes", default=False)
"""True inside a `from_pipe` without a dtype: diffusers ends it with `.to(float32)`, whose default cannot be turned off."""


class MovingMixin(DiffusionPipeline):
    """Before a diffusers pipeline in the bases; see the methods of the same names there."""

    _turns: Turns | None = None
    _compile_mode: str | None = None
    """In which the transformer was compiled, if it was."""

    @property
    def quantization_report(self) -> QuantizationReport:
        raise NotImplementedError

    @property
    def _execution_device(self) -> torch.device:
        """As in diffusers; where models take turns it is the device that they take them on, wherever they lie."""
        return self._turns.device if self._turns is not None else super()._execution_device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in diffusers; another dtype is refused, before anything is touched, where a component is quantized.

        Where models take turns on a GPU, to which they come when they run, a move to a GPU does nothing.
        """
        if KEEP_DTYPES.get():
            return self
        dtype = kwargs.get("dtype") or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
        quantized = [name for name, model in models_of(self).items() if quantized_by(model)] if dtype is not None else []
        if quantized:
            if {getattr(model, "dtype", dtype) for model in models_of(self).values()} != {dtype}:
                raise ValueError(
                    f"this pipeline cannot be cast to {dtype}, because {', '.join(quantized)} is quantized: give "
                    "torch_dtype to from_pretrained instead; .to(device) alone works"
                )
            args = tuple(arg for arg in args if not isinstance(arg, torch.dtype))  # `to(device, dtype)` is usual
            kwargs, dtype = {name: value for name, value in kwargs.items() if name != "dtype"}, None
        given = (kwargs.get("device"), *args)
        device = next((arg for arg in given if isinstance(arg, int | str | torch.device)), None)
        device = f"cuda:{device}" if isinstance(device, int) else device
        target = torch.device(device) if device is not None else None
        if target is not None and target.type == "cuda":
            if self._turns is not None:
                logger.warning(
                    "%s was planned to take turns on %s and is not moved there as a whole", type(self).__name__, target
                )
                return self.to(dtype=dtype) if dtype is not None else self
            if not torch.cuda.is_available():
                raise ValueError(f"{type(self).__name__}.to({device!r}), and there is no CUDA device: leave it on the CPU")
            if not self._is_pipeline_device_mapped():
                _upload(models_of(self).values(), target)
        with torch.inference_mode(False), torch.no_grad():  # quantized weights cannot be moved inside of inference_mode
            return super().to(*args, **kwargs)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; warns where the compile mode does not go with it."""
        self._warn_of_offloading()
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; warns where the compile mode does not go with it."""
        self._warn_of_offloading()
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; refused where torch cannot move compiled blocks of quantized weights.

        Autoencoders are offloaded leaf by leaf in any case: diffusers brings what is in no block to the device when `forward`
        is called, and a pipeline calls `decode`.
        """
        self._warn_of_offloading()
        given = signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        excluded = given.get("exclude_modules") or ()
        excluded = [excluded] if isinstance(excluded, str) else list(excluded)
        models = {name: model for name, model in models_of(self).items() if name not in excluded}
        if given.get("offload_type", "block_level") != "block_level":
            super().enable_group_offload(*args, **kwargs)
            return
        for name, model in models.items():
            if _is_compiled(model) and quantized_by(model):
                raise ValueError(
                    f"{name} is quantized and compiled, and torch cannot swap the weights of compiled blocks "
                    "(pytorch#190604): use offload_type='leaf_level', enable_model_cpu_offload(), or load with compile=False"
                )
        autoencoders: dict[str, Any] = {name: model for name, model in models.items() if hasattr(model, "decode")}
        super().enable_group_offload(**{**given, "exclude_modules": [*excluded, *autoencoders]})
        given = {name: value for name, value in given.items() if name != "exclude_modules"}
        for model in autoencoders.values():
            model.enable_group_offload(**{**given, "offload_type": "leaf_level"})

    def _warn_of_offloading(self) -> None:
        if self._compile_mode is not None:
            for warning in get_quant_compile_warnings("none", self._compile_mode, offload=True):
                warnings.warn(warning, stacklevel=3)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Refused where a component is cast layerwise: the hooks of its copy would run the modules of the original."""
        for name, model in models_of(self).items():
            if any(_is_cast(module) for module in model.modules()):
                raise ValueError(
                    f"{name} is cast layerwise, by hooks that hold its modules and cannot be copied: load the pipeline once more"
                )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        if twin._turns is not None:
            twin._turns.of(models_of(twin))
        return twin


def move_models(models: Iterable[nn.Module], device: torch.device) -> None:
    """Moves models of a pipeline as its own `to` does; quantized weights cannot be moved inside of inference_mode."""
    models = list(models)
    if device.type == "cuda":
        _upload(models, device)
    with torch.inference_mode(False), torch.no_grad():
        for model in models:
            model.to(device=device)


def _upload(models: Iterable[nn.Module], device: torch.device) -> None:
    """To a GPU through page-locked memory, except models with hooks, which their own `to` moves."""
    with staged():
        for model in models:
            move_model_to_gpu(model, device)


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())


def _is_cast(module: nn.Module) -> bool:
    registry: Any = module.__dict__.get("_diffusers_hook")
    return registry is not None and registry.get_hook("layerwise_casting") is not None
