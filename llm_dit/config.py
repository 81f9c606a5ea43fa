"""config.toml: which method for which role, for all families and for each.

A value of a family's section wins over the `[quantization]` section, which wins over the built-in default. The whole
file is checked when it is read, the sections of other families included, so that a mistake shows before a model loads.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .families import family_names, get_family
from .names import COMPILE_MODES, COMPONENT_TYPES, check_name, nearest

if TYPE_CHECKING:
    from .quantization import PipelineQuantConfig


class QuantizationSection(BaseModel):
    """`[quantization]`: the defaults of every family."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    encoder: str = "none"
    transformer: str = "fp8-dynamic"
    vae: str = "none"
    granularity: str = "per-row"
    skip: list[str] = []


class PipelineSection(BaseModel):
    """`[flux2]`, `[ltx2]`, ...: what differs for one family; None where the default holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    quantization_encoder: str | None = None
    quantization_transformer: str | None = None
    quantization_vae: str | None = None
    quantization_granularity: str | None = None
    quantization_backend: str | dict[str, str] | None = None
    quantization_skip: list[str] | None = None
    transformer_file: str = ""
    encoder_file: str = ""
    compile: bool = False
    compile_mode: str = "default"


class RuntimeConfig(BaseModel):
    """The whole file.

    Attributes:
        quantization: the `[quantization]` section.
        pipelines: the families' sections, by family name.

    Example:
        >>> RuntimeConfig.from_toml("config.toml").get_pipeline_quant_config("flux2").transformer  # doctest: +SKIP
        'fp8-dynamic'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantization: QuantizationSection = QuantizationSection()
    pipelines: dict[str, PipelineSection] = {}

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> Self:
        """Reads and checks a file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming the file, the key and the nearest valid one, for anything that is not valid in it.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no configuration file {str(file)!r}: give the path of a config.toml")
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not valid TOML: {error}") from error
        sections = ("quantization", *family_names())
        for name in tables:
            if name not in sections:
                raise ValueError(f"{file}: unknown section [{name}]: {nearest(name, sections)}")
        try:
            quantization = _section(QuantizationSection, "quantization", tables)
            config = cls(
                quantization=quantization,
                pipelines={name: _section(PipelineSection, name, tables) for name in tables if name in family_names()},
            )
            _check_values("quantization", config.quantization)
            for name, section in config.pipelines.items():
                _check_values(name, section)
                _check_family(name, section)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return config

    def section(self, family: str) -> PipelineSection:
        """The section of a family, or the one that changes nothing."""
        if family not in family_names():
            raise ValueError(f"unknown pipeline {family!r}: {nearest(family, family_names())}")
        return self.pipelines.get(family, PipelineSection())

    def get_pipeline_quant_config(self, family: str) -> PipelineQuantConfig:
        """What holds for a family after its section, the global section and the built-in defaults are weighed.

        Raises:
            ValueError: for an unknown family or value, naming the nearest valid one.
        """
        from .quantization import PipelineQuantConfig

        section, default = self.section(family), self.quantization

        def pick(own: Any, shared: Any) -> Any:
            return shared if own is None else own

        return PipelineQuantConfig(
            encoder=pick(section.quantization_encoder, default.encoder),
            transformer=pick(section.quantization_transformer, default.transformer),
            vae=pick(section.quantization_vae, default.vae),
            granularity=pick(section.quantization_granularity, default.granularity),
            skip=tuple(pick(section.quantization_skip, default.skip)),
            backend=pick(section.quantization_backend, "torchao"),
        )


def _check_values(name: str, section: QuantizationSection | PipelineSection) -> None:
    """Raises ValueError, naming section and key, for a value that no pipeline could be quantized with."""
    from .quantization import PipelineQuantConfig

    for key, value in section:
        field = key.removeprefix("quantization_")
        if value is not None and field in PipelineQuantConfig.__dataclass_fields__:
            with _naming(name, key):
                PipelineQuantConfig(**{field: value})


def _check_family(name: str, section: PipelineSection) -> None:
    """Raises ValueError, naming section and key, for a backend of what the family has not, or an unknown mode."""
    valid = tuple(dict.fromkeys((*COMPONENT_TYPES, *get_family(name).roles)))
    backends = section.quantization_backend
    for component in backends if isinstance(backends, dict) else ():
        with _naming(name, "quantization_backend"):
            check_name(component, valid, "component")
    with _naming(name, "compile_mode"):
        check_name(section.compile_mode, COMPILE_MODES, "mode")


@contextmanager
def _naming(section: str, key: str) -> Iterator[None]:
    """Names section and key in the ValueError of a check."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"[{section}] {key}: {error}") from error


def _section(model: type[Any], name: str, tables: dict[str, Any]) -> Any:
    """One checked section; pydantic's findings as one sentence."""
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{name!r} must be a section [{name}], not the value {table!r}")
    try:
        return model(**table)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            meant = f"quantization_{key}" if f"quantization_{key}" in model.model_fields else key
            raise ValueError(f"[{name}]: unknown key {key!r}: {nearest(meant, tuple(model.model_fields))}") from None
        raise ValueError(f"[{name}]: {key} = {first['input']!r}: {first['msg']}") from None
