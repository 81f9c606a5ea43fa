"""The pipeline families, one module each: the classes `Quantizable<Name>` and what is particular to them.

A module of this package that defines `FAMILY` is a family; its name is its section in config.toml. Listing the names
imports nothing, so the command line can check a configuration before it loads torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..mixin import QuantizablePipelineMixin
    from .base import Family, Published


@cache
def family_names() -> tuple[str, ...]:
    """The families' names, without importing them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def get_family(name: str) -> Family:
    """The family of that name."""
    return importlib.import_module(f"{__name__}.{name}").FAMILY


@cache
def pipeline_classes() -> dict[str, type[QuantizablePipelineMixin]]:
    """Every `Quantizable*` class by its name; imports all families."""
    classes = {}
    for name in family_names():
        module = importlib.import_module(f"{__name__}.{name}")
        classes.update({key: value for key, value in vars(module).items() if key.startswith("Quantizable")})
    del classes["QuantizablePipelineMixin"]
    return classes


def published_models() -> dict[str, Published]:
    """Every published model that a family knows the sizes of, by its offline name."""
    return {model.name: model for name in family_names() for model in get_family(name).published}


def quantizable_class(name: str) -> type[QuantizablePipelineMixin]:
    """Our class for a diffusers pipeline class of that name.

    Raises:
        ValueError: if no family has it.
    """
    classes = pipeline_classes()
    key = name if name.startswith("Quantizable") else f"Quantizable{name}"
    if key not in classes:
        covered = ", ".join(sorted(known.removeprefix("Quantizable") for known in classes))
        raise ValueError(f"llm_dit has no quantizable pipeline for {name!r}: it covers {covered}")
    return classes[key]
