"""The keyword arguments of `from_pretrained`, ours and diffusers', and what is refused about them before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP

from .names import nearest
from .quantization import PipelineQuantConfig
from .request import LoadOptions, LoadRequest

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".h5")
"""Endings of files that diffusers or transformers may read weights from."""
DIFFUSERS_KEYWORDS: Final = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "torch_dtype",
    "dtype",
    "custom_pipeline",
    "custom_revision",
    "provider",
    "sess_options",
    "provider_options",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "low_cpu_mem_usage",
    "variant",
    "use_safetensors",
    "use_onnx",
    "load_connected_pipeline",
    "quantization_config",
    "use_flashpack",
    "disable_mmap",
    "trust_remote_code",
    "output_loading_info",
    "mirror",
)
"""Keyword arguments of `DiffusionPipeline.from_pretrained`, which takes them as `**kwargs` and ignores others with a warning."""
HUB_KEYWORDS: Final[tuple[str, ...]] = ("cache_dir", "force_download", "local_files_only", "token", "revision")
"""Those of them that find files on the Hub."""
OWN_KEYWORDS: Final = tuple(field.name for field in fields(LoadOptions) if field.name not in ("planned", "notes"))


def hub_keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that find files on the Hub."""
    return {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}


def refuse_unknown(pipeline: str, kwargs: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    """Raises ValueError for a keyword argument that nobody takes, naming the nearest; diffusers only warns.

    Args:
        pipeline: name of the class, for the error.
        expected: components and other arguments of the pipeline's `__init__`.
    """
    valid = sorted({*OWN_KEYWORDS, *DIFFUSERS_KEYWORDS, *expected})
    if isinstance(kwargs.get("quantization_config"), str | PipelineQuantConfig):
        raise ValueError(
            "quantization_config is diffusers' argument, for its own PipelineQuantizationConfig: give a method or a "
            "PipelineQuantConfig as quantization="
        )
    for name in kwargs:
        if name not in valid:
            raise ValueError(f"{pipeline}.from_pretrained has no argument {name!r}: {nearest(name, valid)}")


def check_source(pipeline: str, family: str, index: Mapping[str, Any]) -> None:
    """Raises ValueError if a model_index.json names a pipeline of another family than `pipeline`'s, with the class to use."""
    from .families import pipeline_classes

    if pipeline == f"Quantizable{index.get('_class_name')}":
        return  # which is the rule, and needs no import of the other families
    named = pipeline_classes().get(f"Quantizable{index.get('_class_name')}")
    if named is not None and named.family.name != family:
        raise ValueError(f"{pipeline} cannot load a {named.family.title} pipeline: use {named.__name__}, or load_pipeline")


def check_weights(source: str, components: Iterable[str]) -> None:
    """Raises ValueError if a folder has the configuration of a component and no weights: diffusers then names a .bin file."""
    for name in components:
        place = Path(source) / name
        if (place / "config.json").is_file() and not any(file.suffix in _WEIGHTS for file in place.iterdir()):
            raise ValueError(f"{str(place)!r} holds a config.json and no weights: download the model, or save it, again")


def check_device(device_map: Any) -> None:
    """Raises ValueError if `device_map` is nothing that diffusers takes, as a CUDA device by its number, or there is none."""
    if device_map is None:
        return
    if str(device_map).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device_map={device_map!r}, and there is no CUDA device: leave device_map out to load on the CPU")
    if str(device_map).startswith("cuda:"):
        raise ValueError(
            f"device_map={device_map!r}, and diffusers takes 'cuda', 'cpu' or 'balanced': give 'cuda', or leave it out and call "
            f".to({str(device_map)!r})"
        )
    if device_map not in SUPPORTED_DEVICE_MAP:
        listed = ", ".join(map(repr, dict.fromkeys(SUPPORTED_DEVICE_MAP)))
        raise ValueError(
            f"device_map={device_map!r}, and on this machine diffusers takes {listed} for a pipeline: give one of them"
        )


def file_device(kwargs: Mapping[str, Any]) -> torch.device:
    """The device on which components are read from files: that of `device_map`, or the CPU.

    Raises:
        ValueError: for a `device_map` that spreads components, which diffusers decides before it has them.
    """
    device_map = kwargs.get("device_map")
    try:
        return torch.device(device_map or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"a component from a file goes to one device, and device_map is {device_map!r}: give 'cuda' or 'cpu', or leave it out"
        ) from error


def check_memory_usage(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for `low_cpu_mem_usage=False` beside anything quantized."""
    if kwargs.get("low_cpu_mem_usage") is False:
        raise ValueError(
            "low_cpu_mem_usage=False loads whole bf16 models first and cannot be combined with quantization: leave it out"
        )


def check_encoder_layers(request: LoadRequest, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for what a text encoder that we load in part cannot follow."""
    if request.encoder_layers != "read":
        return
    if kwargs.get("device_map") == "balanced":
        raise ValueError(
            "encoder_layers='read' loads the text encoder to one device, and device_map is 'balanced': leave one out"
        )
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "encoder_layers='read' loads the text encoder where diffusers' quantization_config does not reach: leave one out"
        )


def check_request(request: LoadRequest, roles: Mapping[str, str], pipeline: str, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where a request to quantize contradicts the other arguments or the pipeline.

    Args:
        roles: role by component name, of the pipeline's components that have one.
        pipeline: name of the diffusers class, for the error.
    """
    if kwargs.get("quantization_config") is not None:
        raise ValueError("quantization_config is diffusers' way to quantize and quantization* is llm_dit's: give one of the two")
    for asked in request.asked:
        if asked not in roles and asked not in roles.values():
            listed = ", ".join(f"{name} ({role})" for name, role in roles.items())
            raise ValueError(f"{pipeline} has no component for quantization_{asked}: it has {listed}")
