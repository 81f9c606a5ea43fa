"""One load of a pipeline: what diffusers asks of us for each component, and what we check and record afterwards."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .backends import Backend, ComponentRequest, LoadPlan
from .backends.streaming import DiffusersStreamingConfig, Planner, TransformersStreamingConfig
from .checkpoints.encoders import PRUNED, Unread
from .encoder_parts import load_read_parts
from .quantization import ComponentReport, quantized_by
from .quantization.component import layer_stats
from .quantization.filters import named_layers
from .quantization.methods import recorded_method, weights_method
from .quantization.probe import probe_finite
from .quantization.sizes import dense_bytes, model_bytes
from .quantization.torchao_tensors.fused import fuse_weights
from .saved import LAYERWISE_KEY, layerwise_mark, was_layerwise, was_quantized
from .writing import read_json_file

logger = logging.getLogger(__name__)


@dataclass
class _Load:
    """One component on its way."""

    request: ComponentRequest | None = None
    backend: Backend | None = None
    plan: LoadPlan | None = None
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


class PipelineLoader(PipelineQuantizationConfig):
    """Given to diffusers as `quantization_config`; its `_resolve_quant_config` is called right before each model loads.

    diffusers' own class holds one configuration per component, chosen beforehand. Here the choice is made component by
    component, from the folder's contents and the pipeline's hooks.

    Args:
        source: the folder or repository.
        hub: keyword arguments for reading its small files, e.g. `revision`.
        choose: from a component's name and its saved config.json, the backend and the request, or None to load it as
            it is.
    """

    def __init__(
        self,
        source: str,
        hub: Mapping[str, Any],
        choose: Callable[[str, Mapping[str, Any]], tuple[Backend, ComponentRequest] | None],
    ) -> None:
        self.quant_backend = None
        self.quant_kwargs: dict[str, Any] = {}
        self.components_to_quantize = None
        self.quant_mapping: dict[str, Any] = {}
        self.is_granular = True
        self.config_mapping: dict[str, Any] = {}
        self.source = source
        self.hub = dict(hub)
        self.choose = choose
        self.loads: dict[str, _Load] = {}
        self._configs: dict[str, dict[str, Any]] = {}

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        assert module_name is not None
        self.close_timer()
        load = self.loads[module_name] = _Load()
        saved = self.saved_config(module_name)
        chosen = self.choose(module_name, saved)
        if chosen is None:
            return None
        load.backend, load.request = chosen
        kind = DiffusersStreamingConfig if is_diffusers else TransformersStreamingConfig
        bits = round(load.request.method.bytes_per_weight * 8)
        config = kind(planner=Planner(partial(self._plan, load)), bits=bits)
        self.config_mapping[module_name] = config
        return config

    def close_timer(self) -> None:
        """Ends the time of the component that loaded last; the next one, or the end of the load, does so."""
        for load in self.loads.values():
            load.seconds = load.seconds or time.perf_counter() - load.started

    def saved_config(self, component: str) -> dict[str, Any]:
        """config.json of a component as saved, or {}; it is read once, as a repository is asked for it every time."""
        if component not in self._configs:
            self._configs[component] = read_json(self.source, f"{component}/config.json", self.hub)
        return self._configs[component]

    def _plan(self, load: _Load, model: nn.Module) -> LoadPlan:
        assert load.backend is not None
        assert load.request is not None
        load.plan = load.backend.plan(model, load.request)
        return load.plan

    def load_read_parts(self, name: str, entry: tuple[str, str], unread: Unread, **keywords: Any) -> nn.Module:
        """A text encoder without what nothing reads of it, quantized like any component that diffusers loads."""
        config = self._resolve_quant_config(is_diffusers=False, module_name=name)
        quantization = {"quantization_config": config} if config is not None else {}
        return load_read_parts(entry, self.source, name, unread, **self.hub, **keywords, **quantization)

    def finish(self, name: str, role: str | None, model: nn.Module, counted: Container[int]) -> ComponentReport:
        """Checks a loaded component against its plan and reports on it.

        Args:
            counted: ids of tensors that another component's report counts: a Z-Image controlnet shares some of the transformer's.

        Raises:
            RuntimeError: if something asked for was not done.
        """
        load = self.loads[name]
        if load.request is None or load.backend is None:
            fuse_weights(model)
            return _with_parts_left_out(inspect_component(name, role, model, load.seconds, counted), model)
        if load.plan is None:
            raise RuntimeError(
                f"{name} was to be quantized with {load.request.method.name}, and {type(model).__name__}'s loader never "
                "asked for it: load the component yourself and pass it in, it is quantized in place then"
            )
        before = dense_bytes(model, load.request.dtype, counted)
        load.backend.finish(model, load.request, load.plan)
        if load.backend.name == "layerwise":
            mark_layerwise(model, load.request.skip)
        stats = layer_stats(
            load.plan.layers,
            load.request.method,
            load.request.role,
            load.request.granularity,
            before,
            model_bytes(model, counted),
        )
        return _with_parts_left_out(component_report(name, model, stats, load.backend.name, load.seconds), model)


def _with_parts_left_out(report: ComponentReport, model: nn.Module) -> ComponentReport:
    parts = getattr(model, PRUNED, ())
    if not parts:
        return report
    note = f"left out, because nothing reads it: {', '.join(parts)}"
    return replace(report, note="; ".join(filter(None, (report.note, note))))


def names_repository(source: str) -> bool:
    """True if a repository could have this name, "owner/repository"."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return "/" in source


def read_json(source: str, filename: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """A small JSON file of a folder or repository, or {} where there is none."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / filename
        if not path.is_file():
            return {}
    elif not names_repository(source):
        return {}
    else:
        try:
            path = Path(hf_hub_download(source, filename, **hub))
        except GatedRepoError:
            raise  # one that is not there in its type, and its words say how to get access
        except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
            return {}
    return read_json_file(path)


def quantize_passed_component(model: nn.Module, backend: Backend, request: ComponentRequest) -> ComponentReport:
    """Quantizes a component that the caller passed in, in place."""
    backend.check(request)
    start = time.perf_counter()
    stats = backend.quantize_in_place(model, request)
    if backend.name == "layerwise" and stats["quantized_layers"] > 0:
        mark_layerwise(model, request.skip)
    report = component_report(request.name, model, stats, backend.name, time.perf_counter() - start)
    if stats["method"] == "already_quantized":
        warnings.warn(f"{request.name}: {report.note}", stacklevel=4)
    return report


def component_report(
    name: str,
    model: nn.Module,
    stats: Mapping[str, Any],
    backend: str | None,
    seconds: float,
    note: str = "",
    dequantized: tuple[str, ...] = (),
) -> ComponentReport:
    """A report from the stats of `quantize_component`."""
    if stats["method"] == "already_quantized":
        note = note or f"it came quantized ({saved_method(model) or stats['quantized_by']}) and was left as it is"
        backend = None
    return ComponentReport(
        name=name,
        role=stats["component_type"],
        class_name=type(model).__name__,
        method=stats["method"],
        backend=backend,
        granularity=None if backend == "layerwise" else stats["granularity"],
        quantized_layers=stats["quantized_layers"],
        total_layers=stats["total_layers"],
        skip_reasons=stats["skip_reasons"],
        bytes_before=stats["bytes_before"],
        bytes_after=stats["bytes_after"],
        seconds=seconds,
        dtype=_dtype_name(model),
        note=note,
        dequantized=dequantized,
    )


def inspect_component(
    name: str,
    role: str | None,
    model: nn.Module,
    seconds: float = 0.0,
    counted: Container[int] = (),
    came: str = "loaded as it was saved",
) -> ComponentReport:
    """A report on a component that nobody asked to quantize, as it is now; if it is quantized, `came` says how it came so."""
    source = quantized_by(model)
    layers = [layer for layer, _ in named_layers(model, role or "transformer")]
    size = model_bytes(model, counted)
    if source is not None:
        probe_finite(model)
    return ComponentReport(
        name=name,
        role=role,
        class_name=type(model).__name__,
        method="already_quantized" if source else "none",
        total_layers=len(layers),
        skip_reasons=dict.fromkeys(layers, f"{came} ({source})" if source else "not asked for"),
        bytes_before=dense_bytes(model, torch.bfloat16, counted) if source else size,
        bytes_after=size,
        seconds=seconds,
        dtype=_dtype_name(model),
        note=f"{came}: {saved_method(model) or source}, not quantized again" if source else "",
    )


def saved_method(model: nn.Module) -> str | None:
    """The method that the configuration of a loaded quantized model records, or that its weights are of, or None."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    recorded = recorded_method(config.to_dict()) if config is not None else None
    return recorded or weights_method(model)


def method_in(saved: Mapping[str, Any]) -> str | None:
    """The method that a component's config.json records, or None."""
    return "fp8-weight-only" if was_layerwise(saved) else recorded_method(saved.get("quantization_config") or {})


def mark_layerwise(model: Any, skip: Sequence[str]) -> None:
    """Writes into the model's configuration that it is cast layerwise, so that a saved folder loads that way again."""
    if hasattr(model, "register_to_config"):
        model.register_to_config(**{f"_{LAYERWISE_KEY}": layerwise_mark(skip)})
    elif hasattr(model, "config"):
        setattr(model.config, LAYERWISE_KEY, layerwise_mark(skip))


def quantized_in(source: str, **hub: Any) -> tuple[str, ...]:
    """The components of a folder or repository that were saved quantized."""
    index = read_json(source, "model_index.json", hub)
    models = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    return tuple(name for name in models if was_quantized(read_json(source, f"{name}/config.json", hub)))


@contextmanager
def passed_without_a_word() -> Iterator[None]:
    """Keeps diffusers from printing whole modules.

    It cannot check classes of its pipelines' own, as LTX-2's connectors, and says so with the module's text. Those that we pass
    were built from the class that model_index.json names.
    """
    loading = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("You have passed a non-standard module")

    loading.addFilter(other)
    try:
        yield
    finally:
        loading.removeFilter(other)


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models of a pipeline by component name, in the pipeline's order; compiled ones unwrapped."""
    found = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            found[name] = getattr(component, "_orig_mod", component)
    return found


def _dtype_name(model: nn.Module) -> str:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
