"""Quantizing the components of diffusion pipelines with torchao: methods, filters, tensors, sizes, hardware.

Nothing here knows a pipeline. `llm_dit.backends` brings quantized weights into components while they load, and
`llm_dit.families` holds the pipelines.
"""

from typing import Any, Final

from ..names import ALIASES, BACKENDS, COMPILE_MODES, COMPONENT_TYPES, GRANULARITIES, REMOVED_METHODS, VALID_METHODS
from .compile import get_quant_compile_warnings
from .component import quantize_component, quantize_vae
from .detect import quantized_by
from .estimate import MemoryEstimate, estimate_memory
from .filters import is_fp8_compatible_layer
from .hardware import Hardware, check_fp8_support, detect_hardware, get_recommended_method
from .int4_compute import set_int4_compute
from .methods import METHODS, Method, get_method
from .pipeline_config import PipelineQuantConfig
from .report import ComponentReport, QuantizationReport
from .sizes import model_bytes, tensor_bytes

__all__ = [
    "ALIASES",
    "BACKENDS",
    "COMPILE_MODES",
    "COMPONENT_TYPES",
    "GRANULARITIES",
    "METHODS",
    "REMOVED_METHODS",
    "VALID_METHODS",
    "ComponentReport",
    "Hardware",
    "MemoryEstimate",
    "Method",
    "PipelineQuantConfig",
    "QuantizationReport",
    "check_fp8_support",
    "detect_hardware",
    "estimate_memory",
    "get_method",
    "get_quant_compile_warnings",
    "get_recommended_method",
    "is_fp8_compatible_layer",
    "model_bytes",
    "quantize_component",
    "quantize_vae",
    "quantized_by",
    "set_int4_compute",
    "tensor_bytes",
]

_REMOVED: Final = {
    "quantize_model_torchao": 'use quantize_component(m, "fp8-dynamic", "transformer")',
    "quantize_model_torchao_filtered": 'use quantize_component(m, "fp8-weight-only", "transformer")',
    "fp8_inference": 'it is built into quantize_component(m, "fp8-dynamic", "transformer")',
    "enable_fp8_weights": 'it is built into quantize_component(m, "fp8-weight-only", "transformer")',
    "create_fp8_filter_fn": "quantize_component filters automatically",
    "analyze_fp8_compatibility": "use is_fp8_compatible_layer",
}


def __getattr__(name: str) -> Any:
    if name in _REMOVED:
        raise ImportError(f"llm_dit.quantization.{name} was removed: {_REMOVED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
