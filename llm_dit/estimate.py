"""What a pipeline will hold under each method, from its configuration alone: no weights are downloaded or read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from .building import build_empty, component_class, default_dtype
from .checkpoints.encoders import take_off_unread
from .checkpoints.header import read_header
from .families import get_family, pipeline_classes, published_models, quantizable_class
from .families.base import Family, Published
from .load import pipeline_class_of
from .loader import names_repository, read_json
from .mixin import QuantizablePipelineMixin, diffusers_class
from .names import first_line, nearest
from .quantization import METHODS, VALID_METHODS, MemoryEstimate, estimate_memory
from .quantization.filters import VAE_METHODS
from .saved import was_quantized
from .writing import read_json_file


@dataclass(frozen=True)
class ComponentEstimate:
    """Weight bytes of one component.

    Attributes:
        name: its name in the pipeline.
        role: "encoder", "transformer" or "vae".
        class_name: its class.
        parameters: how many parameters it has.
        methods: by method, its estimate; methods that cannot be used on it are missing.
        saved: bytes of its files if it was saved quantized, else 0; the methods do not apply to it then.
    """

    name: str
    role: str
    class_name: str
    parameters: int
    methods: Mapping[str, MemoryEstimate]
    saved: int = 0

    def bytes_for(self, method: str) -> int:
        """Bytes under `method`, or as saved."""
        return self.saved or self.methods[method].bytes_after

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return {
            "role": self.role,
            "class_name": self.class_name,
            "parameters": self.parameters,
            "saved_bytes": self.saved,
            "bytes": {name: estimate.bytes_after for name, estimate in self.methods.items()},
        }


@dataclass(frozen=True)
class PipelineEstimate:
    """Weight bytes of a pipeline, component by component."""

    source: str
    pipeline_class: str
    components: tuple[ComponentEstimate, ...]
    reading: tuple[ComponentEstimate, ...] = ()
    """The text encoders with encoder_layers="read", where that leaves something out."""
    freed: tuple[str, ...] = ()
    """The components that `encode_then_free` frees before the others come to the device."""

    def held(self, method: str) -> int:
        """Bytes of all components under `method`; one that cannot be quantized so stays in bf16."""
        return sum(self._bytes(component, method) for component in self.components)

    def held_at_once(self, method: str) -> int:
        """The same with `encode_then_free`: the larger of what encodes and the rest."""
        encoding = sum(self._bytes(component, method) for component in self.components if component.name in self.freed)
        return max(encoding, self.held(method) - encoding)

    def _bytes(self, component: ComponentEstimate, method: str) -> int:
        return component.bytes_for(method if component.saved or method in component.methods else "none")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return {
            "source": self.source,
            "pipeline_class": self.pipeline_class,
            "components": {component.name: component.to_dict() for component in self.components},
            "encoder_layers_read": {component.name: component.to_dict() for component in self.reading},
            "encode_then_free": {method: self.held_at_once(method) for method in VALID_METHODS},
        }


def estimate_pipeline(
    source: str,
    granularity: str = "per-row",
    skip_patterns: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
    **hub: Any,
) -> PipelineEstimate:
    """The exact weight bytes of every component under every method.

    Args:
        source: a folder, a repository id (only its .json files are fetched), an offline name such as "klein-9b", or
            the name of a pipeline class, which stands for the family's published model of that class.
        granularity, skip_patterns, dtype: as in `estimate_memory`.
        **hub: where to find a repository, e.g. `revision`.

    Raises:
        ValueError: if `source` is none of these.
    """
    cls, makers, _ = component_makers(source, dtype, hub)
    components, reading = [], []
    for name, make in makers.items():
        role = cls.component_role(name)
        if role is None:
            continue
        model, saved = make()
        components.append(estimate_component(name, role, model, saved, granularity, skip_patterns, dtype))
        part = cls.family.parts.get(name)
        if role == "encoder" and part is not None and part.unread.in_folders and not saved:
            take_off_unread(model, part.unread)
            reading.append(estimate_component(name, role, model, saved, granularity, skip_patterns, dtype))
    freed = tuple(name for name in cls.family.encoding.encoders if name in makers)
    return PipelineEstimate(source, diffusers_class(cls).__name__, tuple(components), tuple(reading), freed)


Maker = Callable[[], tuple[nn.Module, int]]
"""Builds a component on meta; the second value is the bytes of its files if it was saved quantized, else 0."""


def component_makers(
    source: str, dtype: torch.dtype, hub: Mapping[str, Any]
) -> tuple[type[QuantizablePipelineMixin], dict[str, Maker], Path | None]:
    """The class of a pipeline, what makes its components, and its folder, if it has one; `source` and errors as in
    `estimate_pipeline`.
    """
    published = published_models()
    classes = pipeline_classes()
    key = source if source.startswith("Quantizable") else f"Quantizable{source}"
    if source in published:
        model = published[source]
        return quantizable_class(model.pipeline_class), _published_makers(model), None
    if key in classes:
        return classes[key], _published_makers(_published_for(classes[key])), None
    folder = Path(source)
    if not folder.is_dir():
        if not names_repository(source):
            raise ValueError(_unknown(source, published, classes))
        folder = _configurations(source, hub)
    index = read_json(str(folder), "model_index.json", {})
    cls = pipeline_class_of(folder)
    makers: dict[str, Maker] = {
        name: partial(_from_config, folder / name, entry[0], entry[1], dtype)
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and (folder / name / "config.json").is_file()
    }
    return cls, makers, folder


def _unknown(source: str, published: Mapping[str, Any], classes: Iterable[str]) -> str:
    if "/" in source:
        return f"there is no folder {source!r}: give one, owner/repository, or one of {', '.join(published)}"
    known = [*published, *(name.removeprefix("Quantizable") for name in classes)]
    return f"{source!r} is no folder, published model or pipeline class: {nearest(source, known)}"


def _configurations(source: str, hub: Mapping[str, Any]) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json"], **hub))
    except Exception as error:  # offline, no such repository, no access: the Hub's many errors
        raise ValueError(f"{source!r} is no folder here, and the Hub does not give it: {first_line(error)}") from error


def _published_for(cls: type[QuantizablePipelineMixin]) -> Published:
    """The published model of a class, or, for a sibling, the family's first."""
    family: Family = get_family(cls.family.name)
    name = diffusers_class(cls).__name__
    exact = [model for model in family.published if model.pipeline_class == name]
    return (exact or list(family.published))[0]


def _published_makers(model: Published) -> dict[str, Maker]:
    def maker(make: Callable[[], nn.Module]) -> Maker:
        def build() -> tuple[nn.Module, int]:
            with torch.device("meta"), default_dtype(torch.bfloat16):
                return make(), 0

        return build

    return {name: maker(make) for name, make in model.components.items()}


def _from_config(path: Path, library: str, class_name: str, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """A component on meta from its saved configuration, and the bytes of its files if it was saved quantized."""
    config = read_json_file(path / "config.json")
    quantized = was_quantized(config)
    saved = _file_bytes(path) if quantized else 0
    if quantized and not saved:
        raise ValueError(f"{path.name} was saved quantized, and its weights are not here to be counted: download them first")
    with torch.device("meta"):
        return build_empty(component_class(library, class_name), config, str(path.parent), path.name, dtype, {}), saved


def _file_bytes(path: Path) -> int:
    """Bytes of the tensors in a component's safetensors files, from their headers."""
    return sum(read_header(file).nbytes for file in path.glob("*.safetensors"))


def estimate_component(
    name: str,
    role: str,
    model: nn.Module,
    saved: int,
    granularity: str,
    skip_patterns: Sequence[str],
    dtype: torch.dtype,
) -> ComponentEstimate:
    """The bytes of a component on meta under every method that can be used on it."""
    methods = {}
    for method in VALID_METHODS:
        if role == "vae" and method not in VAE_METHODS:
            continue
        estimate = estimate_memory(model, method, role, granularity, skip_patterns, dtype)
        if estimate.quantized_layers or METHODS[method].make_config is None:
            methods[method] = estimate
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ComponentEstimate(name, role, type(model).__name__, parameters, methods, saved)
