"""What a call of `from_pretrained` asks for: keyword arguments over config.toml over defaults, checked before a read."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Self

import torch

from .backends import ComponentRequest
from .config import PipelineSection, RuntimeConfig
from .names import (
    ACTIVATION_SCALES,
    BACKENDS,
    COMPILE_MODES,
    COMPONENT_TYPES,
    ENCODER_LAYERS,
    GRANULARITIES,
    GRAPH_MODES,
    check_name,
    nearest,
)
from .quantization import PipelineQuantConfig, get_method

Quantization = str | Mapping[str, str] | PipelineQuantConfig


@dataclass(frozen=True)
class LoadOptions:
    """The keyword arguments that `QuantizablePipelineMixin.from_pretrained` adds to diffusers' own; see there."""

    quantization: Quantization | None = None
    quantization_transformer: str | None = None
    quantization_encoder: str | None = None
    quantization_vae: str | None = None
    quantization_granularity: str | None = None
    quantization_backend: str | Mapping[str, str] | None = None
    quantization_skip: Sequence[str] | None = None
    transformer_file: str | PathLike[str] | None = None
    encoder_file: str | PathLike[str] | None = None
    activation_scale: str = "dynamic"
    encoder_layers: str | None = None
    config: str | PathLike[str] | RuntimeConfig | None = None
    compile: bool | None = None
    compile_mode: str | None = None
    vram_budget: str | int | None = None
    planned: bool = False
    """True where these options are those of a plan for `vram_budget`."""
    notes: tuple[str, ...] = ()
    """What the report should say about how the options came about."""


@dataclass(frozen=True)
class LoadRequest:
    """A checked request.

    Attributes:
        methods: by role or component name, the method; a component's name wins over its role.
        granularity: of the fp8 methods.
        skip: name patterns left alone in every component.
        backends: by role or component name, the backend; "" is the default.
        asked: the roles and components that keyword arguments want quantized, which the pipeline must have.
        named: those that keyword arguments name at all, "none" included.
        dtypes: by component name, the dtype to load in; "default" is every other's. Empty: diffusers decides.
        files: by component name, the checkpoint file that it is read from.
        activation_scale: "dynamic", or "static" for the scales of such a file.
        encoder_layers: "all", or "read" to leave out what the family reads nothing of.
        compile, compile_mode: whether and how the transformer is compiled.
        notes: what the report should say about the choice.
        hooked: a pipeline class quantizes something of its own accord, in its `component_request`.
    """

    methods: Mapping[str, str] = field(default_factory=dict)
    granularity: str = "per-row"
    skip: tuple[str, ...] = ()
    backends: Mapping[str, str] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    activation_scale: str = "dynamic"
    encoder_layers: str = "all"
    compile: bool = False
    compile_mode: str = "default"
    notes: tuple[str, ...] = ()
    hooked: bool = False

    @classmethod
    def resolve(cls, options: LoadOptions, family: str, components: tuple[str, ...], passed: Container[str] = ()) -> Self:
        """Weighs the options of a pipeline of `family`.

        Args:
            components: the names of the pipeline's components that have a role.
            passed: those that the caller passed, None included.

        Raises:
            ValueError: for anything unknown, removed or contradictory, with what to use instead.
        """
        check_name(options.activation_scale, ACTIVATION_SCALES, "activation_scale")
        config, section = configured(options.config, family)
        base = config if config is not None else PipelineQuantConfig()
        methods: dict[str, str] = {role: getattr(base, role) for role in COMPONENT_TYPES}
        given, notes = _given_methods(options, components), options.notes
        if options.vram_budget is not None and options.quantization != "auto" and not options.planned:
            raise ValueError("vram_budget is what quantization='auto' plans for: give both, or neither")
        methods.update(given)
        if isinstance(options.quantization, PipelineQuantConfig):
            base = options.quantization
        files = _files(options, section, components, passed)
        backends = _backends(options.quantization_backend, base.backend, components, bool(files))
        _check_files(options, files, backends)
        granularity = options.quantization_granularity or base.granularity
        idle = not files and all(method == "none" for method in methods.values())
        if options.quantization_backend is not None and idle:
            if "checkpoint" in backends.values():
                raise ValueError(
                    f"quantization_backend={options.quantization_backend!r} reads a file: give transformer_file or encoder_file "
                    "instead"
                )
            raise ValueError(
                f"quantization_backend={options.quantization_backend!r} has nothing to quantize: give a method as well, e.g. "
                "quantization='fp8-weight-only'"
            )
        if options.quantization_granularity and not files and not any(get_method(method).fp8 for method in methods.values()):
            notes = (*notes, "quantization_granularity was given, and no fp8 method that reads it")
        skip = base.skip if options.quantization_skip is None else PipelineQuantConfig(skip=options.quantization_skip).skip
        compiled = section.compile if options.compile is None else options.compile
        compile_mode = options.compile_mode or section.compile_mode
        if options.compile_mode and not compiled:
            notes = (*notes, "compile_mode was given, and not compile=True, without which nothing is compiled")
        if compile_mode in GRAPH_MODES and backends.get("transformer", backends[""]) == "layerwise":
            raise ValueError(
                f"compile_mode={compile_mode!r} cannot capture a transformer that backend 'layerwise' casts block by block: use "
                "'fp8-weight-only' with backend 'torchao', which is also faster"
            )
        return cls(
            methods=methods,
            granularity=check_name(granularity, GRANULARITIES, "quantization_granularity"),
            skip=tuple(skip),
            backends=backends,
            asked=frozenset(name for name, method in given.items() if method != "none"),
            named=frozenset(given) - _unsaid(options.quantization),
            files=files,
            activation_scale=options.activation_scale,
            encoder_layers=check_name(options.encoder_layers or "all", ENCODER_LAYERS, "encoder_layers"),
            compile=compiled,
            compile_mode=check_name(compile_mode, COMPILE_MODES, "compile_mode"),
            notes=notes,
        )

    @property
    def quantizes(self) -> bool:
        """True if any role or component has a method other than "none", or comes from a file, which may be fp8."""
        return bool(self.files) or self.hooked or any(method != "none" for method in self.methods.values())

    def backend_of(self, component: str, role: str) -> str:
        """The name of the backend for a component."""
        return self.backends.get(component) or self.backends.get(role) or self.backends[""]

    def method_of(self, component: str, role: str) -> str:
        """The name of the method for a component."""
        return self.methods.get(component, self.methods.get(role, "none"))

    def dtype_of(self, component: str) -> torch.dtype:
        """The dtype a component is loaded in."""
        return self.dtypes.get(component, self.dtypes.get("default", torch.bfloat16))

    def component(self, name: str, role: str) -> ComponentRequest | None:
        """What is asked for one component, or None if it stays unquantized."""
        method = get_method(self.method_of(name, role))
        if method.make_config is None:
            return None
        return ComponentRequest(name, role, method, self.granularity, self.skip, self.dtype_of(name))


def configured(config: Any, family: str) -> tuple[PipelineQuantConfig | None, PipelineSection]:
    if config is None:
        return None, RuntimeConfig().section(family)
    if not isinstance(config, str | PathLike | RuntimeConfig):
        raise ValueError(f"config must be the path of a config.toml or a RuntimeConfig, not {config!r}")
    if not isinstance(config, RuntimeConfig):
        config = RuntimeConfig.from_toml(config)
    return config.get_pipeline_quant_config(family), config.section(family)


def _given_methods(options: LoadOptions, components: tuple[str, ...]) -> dict[str, str]:
    """Methods that keyword arguments name, by role or component."""
    methods: dict[str, str] = {}
    given = options.quantization
    if isinstance(given, PipelineQuantConfig):
        methods = {role: getattr(given, role) for role in COMPONENT_TYPES}
    elif isinstance(given, Mapping):
        valid = tuple(dict.fromkeys((*COMPONENT_TYPES, *components)))
        for name, method in given.items():
            check_name(name, valid, "key in quantization")
            methods[name] = get_method(method, f"method for {name!r} in quantization").name
    elif given is not None:
        methods["transformer"] = get_method(given, "quantization").name
    for role in COMPONENT_TYPES:
        own = getattr(options, f"quantization_{role}")
        if own is not None:
            methods[role] = get_method(own, f"quantization_{role}").name
    return methods


def _unsaid(given: Quantization | None) -> set[str]:
    """The roles of a `PipelineQuantConfig` that are "none", which is also what it says of a role that nobody named."""
    return {role for role in COMPONENT_TYPES if isinstance(given, PipelineQuantConfig) and getattr(given, role) == "none"}


def _files(options: LoadOptions, section: PipelineSection, components: tuple[str, ...], passed: Container[str]) -> dict[str, str]:
    """The files that are given, by the component they are for.

    A keyword wins over config.toml, and "" means no file; what config.toml says of a component that the pipeline does not have,
    or that was passed, is not for this call.
    """
    given = {
        "transformer": ("transformer_file", options.transformer_file, section.transformer_file),
        "text_encoder": ("encoder_file", options.encoder_file, section.encoder_file),
    }
    files = {}
    for component, (argument, file, configured) in given.items():
        if file and component not in components:
            raise ValueError(f"{argument} is for the {component}, and this pipeline has none: it has {', '.join(components)}")
        if file and component in passed:
            raise ValueError(f"{component} was passed and {argument} names a file for it: give one of the two")
        chosen = configured if file is None and component in components and component not in passed else file
        if chosen:
            files[component] = str(chosen)
    return files


def _check_files(options: LoadOptions, files: Mapping[str, str], backends: Mapping[str, str]) -> None:
    """Refuses what contradicts the files that are given, or needs one that is not."""
    if options.activation_scale == "static" and "transformer" not in files:
        raise ValueError(
            "activation_scale='static' reads the scales of an official fp8 checkpoint: give transformer_file, or leave "
            "activation_scale at 'dynamic'"
        )
    roles = {"transformer": "transformer", "text_encoder": "encoder"}
    for component, file in files.items():
        backend = backends.get(component) or backends.get(roles[component]) or backends[""]
        if backend == "layerwise":
            raise ValueError(
                f"{file!r} is read by backend 'checkpoint', which keeps its scales, and 'layerwise' has none: leave "
                f"quantization_backend out for the {component}"
            )


def _backends(
    given: str | Mapping[str, str] | None, default: str | Mapping[str, str], components: tuple[str, ...], files: bool
) -> dict[str, str]:
    chosen = default if given is None else given
    if isinstance(chosen, str):
        check_name(chosen, BACKENDS, "quantization_backend")
        # A file is read by "checkpoint" whatever is said; the word is about it, and not about the components beside it.
        return {"": "torchao" if chosen == "checkpoint" and files else chosen}
    if not isinstance(chosen, Mapping):
        raise ValueError(f"quantization_backend must be a name or a mapping, not {chosen!r}: {nearest('', BACKENDS)}")
    valid = tuple(dict.fromkeys((*COMPONENT_TYPES, *components)))
    for name, backend in chosen.items():
        check_name(name, valid, "key in quantization_backend")
        check_name(backend, BACKENDS, f"quantization_backend for {name!r}")
    return {"": "torchao", **chosen}
