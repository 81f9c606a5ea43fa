"""llm-dit: FLUX.2, LTX-2, Z-Image and Qwen-Image pipelines of diffusers, quantized while they load.

    from llm_dit import load_pipeline

    pipe = load_pipeline("Tongyi-MAI/Z-Image-Turbo", device_map="cuda", quantization="fp8-dynamic")
    print(pipe.quantization_report)

Importing this package imports neither torch nor diffusers; using a name from it does.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "RuntimeConfig": "config",
    "PipelineQuantConfig": "quantization",
    "QuantizationReport": "quantization",
    "QuantizablePipelineMixin": "mixin",
    "load_pipeline": "load",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.startswith("Quantizable"):
        from .families import pipeline_classes

        classes = pipeline_classes()
        if name in classes:
            return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from .families import pipeline_classes

    return sorted([*_HOMES, *pipeline_classes(), "__version__"])
