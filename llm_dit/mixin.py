"""`QuantizablePipelineMixin`: a diffusers pipeline class that quantizes its components while they load."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .arguments import (
    check_device,
    check_encoder_layers,
    check_memory_usage,
    check_request,
    check_source,
    check_weights,
    file_device,
    hub_keywords,
    refuse_unknown,
)
from .backends import BACKENDS, Backend, ComponentRequest
from .compiling import compile_component
from .config import RuntimeConfig
from .decoding import fit_decoding, told_of_decoding
from .dtypes import check_saved_dtypes, check_vae_dtype, in_dtypes, load_dtypes, read_saved_dtypes, saved_dtype
from .encoding import EncodingMixin
from .families.base import Family
from .files import plan_files
from .loader import (
    PipelineLoader,
    inspect_component,
    models_of,
    passed_without_a_word,
    quantize_passed_component,
    read_json,
    saved_method,
)
from .lora.mixin import QuantizedLoraMixin
from .moving import KEEP_DTYPES, MovingMixin
from .notes import compared, skip_notes, speed_notes
from .parallel import ParallelMixin
from .quantization import (
    ComponentReport,
    QuantizationReport,
    detect_hardware,
    get_method,
    get_quant_compile_warnings,
    quantized_by,
)
from .quantization.sizes import model_tensors
from .quantization.torchao_tensors.staging import staged
from .request import LoadOptions, LoadRequest, Quantization
from .saved import layerwise_skip, was_layerwise, was_quantized
from .saving import SavingMixin, refuse_unfinished

if TYPE_CHECKING:
    from .planning.measured import Recorder

logger = logging.getLogger(__name__)


class QuantizablePipelineMixin(QuantizedLoraMixin, MovingMixin, SavingMixin, EncodingMixin, ParallelMixin):
    """Mixed into a diffusers pipeline class, before it in the bases.

    A subclass changes what happens to a component by overriding `component_role`, `component_request` or
    `component_backend`; `from_pretrained` stays as it is.
    """

    family: ClassVar[Family]
    _report: QuantizationReport | None = None
    _later_notes: Mapping[str, tuple[str, ...]] = {}
    _recorder: Recorder | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        quantization: Quantization | None = None,
        quantization_transformer: str | None = None,
        quantization_encoder: str | None = None,
        quantization_vae: str | None = None,
        quantization_granularity: str | None = None,
        quantization_backend: str | Mapping[str, str] | None = None,
        quantization_skip: Sequence[str] | None = None,
        transformer_file: str | PathLike[str] | None = None,
        encoder_file: str | PathLike[str] | None = None,
        activation_scale: str = "dynamic",
        encoder_layers: str | None = None,
        config: str | PathLike[str] | RuntimeConfig | None = None,
        compile: bool | None = None,
        compile_mode: str | None = None,
        vram_budget: str | int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a pipeline, quantizing its components as they are read.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub.
            quantization: a method for the transformer, "auto", a mapping from roles ("encoder", "transformer", "vae")
                or component names to methods, or a `PipelineQuantConfig`.
            quantization_transformer, quantization_encoder, quantization_vae: a method each; win over `quantization`.
            quantization_granularity: "per-row" (default) or "per-tensor", for the fp8 methods.
            quantization_backend: "torchao" (default), "layerwise" or "checkpoint", or a mapping by role or component.
            quantization_skip: name patterns left alone, e.g. ["proj_out", "transformer_blocks.0"].
            transformer_file: a single-file checkpoint of the transformer: a path, or owner/repository/file on the Hub. An
                official fp8 file stays in fp8; a bf16 one, e.g. a finetune, is quantized as `quantization` says while it is read.
            encoder_file: the same for the text encoder, e.g. ComfyUI's scaled fp8.
            activation_scale: "dynamic", or "static" for the scales of activations that an fp8 file holds.
            encoder_layers: "all" (the default, but for quantization="auto"), or "read" to leave those parts of the text encoder
                unread that no call of the pipeline uses (29 % of FLUX.2-klein-9B's); the pictures are the same. Upsampling
                prompts and saving need all.
            config: the path of a config.toml, or a `RuntimeConfig`; keyword arguments win over it.
            compile, compile_mode: compile the transformer's repeated blocks (False and "default" if no `config` says else).
            vram_budget: with quantization="auto", the device memory to stay inside of, e.g. "24GB" (10^9 bytes each) or a number
                of bytes; what is free of the GPU if it is not given. The pipeline is planned, loaded, placed and, where the plan
                says so, offloaded; `quantization_report` compares the plan with what was measured.
            **kwargs: everything else means what it means in diffusers, except that `torch_dtype` defaults to bfloat16
                when something is quantized.

        Returns:
            The pipeline, with `quantization_report` saying what was done.

        Raises:
            ValueError: for unknown, removed or contradictory arguments, or a method the hardware lacks.
            RuntimeError: if something asked for could not be done, or a quantized layer gives NaN.
        """
        options = LoadOptions(
            quantization,
            quantization_transformer,
            quantization_encoder,
            quantization_vae,
            quantization_granularity,
            quantization_backend,
            quantization_skip,
            transformer_file,
            encoder_file,
            activation_scale,
            encoder_layers,
            config,
            compile,
            compile_mode,
            vram_budget,
        )
        if quantization == "auto":
            from .planning.auto import load_auto  # plans know the pipelines, which are made of this module

            return load_auto(cls, str(pretrained_model_name_or_path), options, kwargs)
        return cls._load(str(pretrained_model_name_or_path), options, kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass of a pipeline that a family covers belongs to that family, unless it says otherwise."""
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "family"):
            from .families import quantizable_class  # the families import this module

            cls.family = quantizable_class(diffusers_class(cls).__name__).family

    @classmethod
    def _load(cls, source: str, options: LoadOptions, kwargs: dict[str, Any]) -> Self:
        components, init_keywords = cls._get_signature_keys(cls)
        refuse_unknown(cls.__name__, kwargs, (*components, *init_keywords))
        given = {name for name in components if name in kwargs}
        roles = {name: role for name in components if (role := cls.component_role(name))}
        request = LoadRequest.resolve(options, cls.family.name, tuple(roles), given)
        request = replace(request, hooked=any(cls.component_request(name, role, request) for name, role in roles.items()))
        if request.quantizes:
            request = replace(request, dtypes=load_dtypes(kwargs, components))
            check_request(request, roles, diffusers_class(cls).__name__, kwargs)
            without = {name for name, value in kwargs.items() if value is None} | request.files.keys()
            cls._check_components(request, roles, without)
        check_encoder_layers(request, kwargs)
        hub = hub_keywords(kwargs)
        check_device(kwargs.get("device_map"))
        refuse_unfinished(source)
        check_source(cls.__name__, cls.family.name, read_json(source, "model_index.json", hub))
        loader = PipelineLoader(source, hub, lambda name, saved: cls._choose(name, saved, request))
        configs = {name: loader.saved_config(name) for name in roles if name not in given and name not in request.files}
        active = request.quantizes or any(map(was_quantized, configs.values()))
        if active:
            check_memory_usage(kwargs)
            request = in_dtypes(request, kwargs, components, read_saved_dtypes(source, configs))
        from_files = plan_files(source, hub, request, cls.family, roles, given, partial(cls._wanted, request))
        check_weights(source, configs.keys() - {component.name for component in from_files})
        passed = {name: kwargs[name] for name in given if isinstance(kwargs[name], nn.Module)}
        user_config = kwargs.pop("quantization_config", None)
        if "torch_dtype" in kwargs and "dtype" not in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")  # diffusers 0.42 warns of the old name, which our users know
        with staged(), torch.inference_mode(False), torch.no_grad():
            read = {component.name: component.load(file_device(kwargs)) for component in from_files}
            kwargs.update({name: model for name, (model, _) in read.items()})
            kwargs.update(cls._read_parts(loader, request, {*given, *read}, kwargs))
            with passed_without_a_word():
                pipe = super().from_pretrained(source, quantization_config=user_config or loader, **kwargs)
            loader.close_timer()
            pipe._report = pipe._finish(loader, request, passed, {name: report for name, (_, report) in read.items()})
        if user_config is None:
            # diffusers keeps the loader as `pipe.quantization_config`; it has served, and it holds the plans.
            del pipe.quantization_config
        if active and not cls.family.casts_latents:
            check_vae_dtype(cls.family.title, pipe.components.get("vae"), pipe.components.get("transformer"))
        pipe._compile(request)
        for name, model in models_of(pipe).items():
            if cls.component_role(name) == "vae":
                fit_decoding(model)
        return pipe

    @classmethod
    def component_role(cls, name: str) -> str | None:
        """Hook: the role of a component, "encoder", "transformer" or "vae", or None for one that stays as it is."""
        return cls.family.role(name)

    @classmethod
    def component_request(cls, name: str, role: str, request: LoadRequest) -> ComponentRequest | None:
        """Hook: what is asked for a component, or None to leave it unquantized."""
        return request.component(name, role)

    @classmethod
    def component_backend(cls, name: str, role: str, request: LoadRequest) -> Backend:
        """Hook: the backend that quantizes a component."""
        return BACKENDS[request.backend_of(name, role)]

    @property
    def quantization_report(self) -> QuantizationReport:
        """What was quantized, how, and what it takes; print it, or take `.to_dict()`."""
        if self._report is None:
            reports = (inspect_component(n, self.component_role(n), model) for n, model in models_of(self).items())
            self._report = QuantizationReport(tuple(reports), detect_hardware().name)
        models = models_of(self)
        later = {
            part.name: inspect_component(part.name, part.role, models[part.name], came="quantized after it was loaded")
            for part in self._report
            if part.method == "none" and part.name in models and quantized_by(models[part.name])
        }
        if later:
            self._report = replace(self._report, components=tuple(later.get(part.name, part) for part in self._report))
        told = [f"{name}: {line}" for name, model in models.items() for line in told_of_decoding(model)]
        if self._recorder is not None:
            told += self._recorder.lines({part.name: part.bytes_after for part in self._report})
        return replace(self._report, notes=(*self._report.notes, *told)) if told else self._report

    @property
    def planned(self) -> bool:
        """True if quantization="auto" made a plan, which says where everything is."""
        return self._recorder is not None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As in diffusers, but quantized components are shared as they are: no dtype is applied unless one is given."""
        quantized = any(quantized_by(model) for model in models_of(pipeline).values())
        keep = quantized and kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None
        token = KEEP_DTYPES.set(keep)
        try:
            pipe = super().from_pipe(pipeline, **kwargs)
        finally:
            KEEP_DTYPES.reset(token)
        before, models = models_of(pipeline), models_of(pipe)
        reported = getattr(pipeline, "quantization_report", ())
        known = {report.name: report for report in reported if before.get(report.name) is models.get(report.name)}
        reports = [
            known[name] if name in known else inspect_component(name, cls.component_role(name), model)
            for name, model in models.items()
        ]
        pipe._report = QuantizationReport(tuple(reports), detect_hardware().name)
        pipe._turns = getattr(pipeline, "_turns", None)
        return pipe

    def to_json_string(self) -> str:
        """model_index.json names the diffusers class, so that plain diffusers loads the folder."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = diffusers_class(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _note(self, about: str, notes: list[str]) -> None:
        """Takes what the report is to say about something that was done after loading, in the place of what it said before."""
        report = self._report or self.quantization_report
        kept = [note for note in report.notes if note not in self._later_notes.get(about, ())]
        self._later_notes = {**self._later_notes, about: tuple(notes)}
        self._report = replace(report, notes=(*kept, *notes))

    @classmethod
    def _check_components(cls, request: LoadRequest, roles: Mapping[str, str], without: Container[str]) -> None:
        """Lets the backends refuse what they cannot do, before a byte is read."""
        for name, role in roles.items():
            wanted = cls.component_request(name, role, request)
            if wanted is not None and name not in without:
                cls.component_backend(name, role, request).check(wanted)

    @classmethod
    def _choose(cls, name: str, saved: Mapping[str, Any], request: LoadRequest) -> tuple[Backend, ComponentRequest] | None:
        """The backend and the request for a component that is about to load, or None to load it as it is."""
        role = cls.component_role(name)
        if role is None or saved.get("quantization_config") is not None:
            return None
        wanted = cls.component_request(name, role, request)
        if was_layerwise(saved):
            if wanted is not None and wanted.method.name != "fp8-weight-only":
                said = f"{name}: cast layerwise as it was saved, although {wanted.method.name} was asked for"
                warnings.warn(f"{said}: load the bf16 weights to change the method", stacklevel=6)
            method, skip = get_method("fp8-weight-only"), layerwise_skip(saved)
            cast = ComponentRequest(name, role, method, skip=skip, dtype=request.dtype_of(name))
            return BACKENDS["layerwise"], cast
        return (cls.component_backend(name, role, request), wanted) if wanted is not None else None

    @classmethod
    def _read_parts(
        cls, loader: PipelineLoader, request: LoadRequest, there: Container[str], kwargs: Mapping[str, Any]
    ) -> dict[str, nn.Module]:
        """The text encoders of which a part is left in the folder, loaded before diffusers loads the rest."""
        if request.encoder_layers != "read":
            return {}
        index = read_json(loader.source, "model_index.json", loader.hub)
        found = {}
        for name, part in cls.family.parts.items():
            entry = index.get(name)
            wanted = cls.component_role(name) == "encoder" and name not in there
            if wanted and part.unread.in_folders and isinstance(entry, list) and entry[0] is not None:
                place = {"device_map": {"": kwargs["device_map"]}} if kwargs.get("device_map") else {}
                given = {key: kwargs[key] for key in ("variant", "use_safetensors") if kwargs.get(key) is not None}
                dtype = kwargs.get("dtype")
                if isinstance(dtype, Mapping):
                    dtype = dtype.get(name, dtype.get("default", torch.float32))  # as diffusers has it
                kind = {"dtype": dtype} if dtype is not None else {}
                found[name] = loader.load_read_parts(name, tuple(entry), part.unread, **place, **given, **kind)
        return found

    @classmethod
    def _wanted(cls, request: LoadRequest, name: str, role: str) -> ComponentRequest | None:
        return cls.component_request(name, role, request)

    def _finish(
        self,
        loader: PipelineLoader,
        request: LoadRequest,
        passed: Mapping[str, nn.Module],
        from_files: Mapping[str, ComponentReport],
    ) -> QuantizationReport:
        reports = []
        saved: dict[str, torch.dtype] = {}
        counted: set[int] = set()
        for name, model in models_of(self).items():
            role = self.component_role(name)
            wanted = self.component_request(name, role, request) if role else None
            if name in from_files:
                reports.append(from_files[name])
            elif name in loader.loads:
                report = loader.finish(name, role, model, counted)
                if report.method == "already_quantized":
                    named = bool({name, role} & request.named)
                    report = compared(report, wanted.method.name if wanted else "none" if named else None, model)
                    if (dtype := saved_dtype(model)) is not None:
                        saved[name] = dtype
                reports.append(report)
            elif name in passed and role and wanted is not None:
                reports.append(quantize_passed_component(model, self.component_backend(name, role, request), wanted))
            else:
                came = "it was passed as it is" if name in passed else "loaded as it was saved"
                reports.append(inspect_component(name, role, model, came=came))
            counted.update(map(id, model_tensors(model)))
        check_saved_dtypes(saved, request)
        notes = list(request.notes)
        if request.quantizes and not loader.loads and not passed and not from_files:
            raise RuntimeError(f"{type(self).__name__} loaded no model to quantize")
        as_saved = [part.name for part in reports if part.name in loader.loads and was_quantized(loader.saved_config(part.name))]
        notes += [*skip_notes(request.skip, reports, as_saved), *speed_notes(reports)]
        return QuantizationReport(tuple(reports), detect_hardware().name, tuple(notes))

    def _compile(self, request: LoadRequest) -> None:
        if not request.compile:
            return
        self._compile_mode = request.compile_mode
        for name, model in models_of(self).items():
            if self.component_role(name) != "transformer":
                continue
            method = saved_method(model) or "none"
            for warning in get_quant_compile_warnings(method, request.compile_mode):
                warnings.warn(f"{name}: {warning}", stacklevel=3)
            compile_component(model, request.compile_mode)


def diffusers_class(cls: type) -> type:
    """The diffusers pipeline class that a `Quantizable*` class extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
