"""Tiny pipelines of every class of every family: real diffusers and transformers classes, a few megabytes of random
weights.

from llm_dit.tiny import build

build("z-image").save_pretrained("tiny-z-image")
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache

from diffusers import DiffusionPipeline

from ..families import family_names
from ..names import nearest
from .spec import TinyPipeline


@cache
def tiny_pipelines() -> Mapping[str, TinyPipeline]:
    """Every tiny pipeline by its name; a family's are in the module of this package that bears the family's name."""
    modules = (importlib.import_module(f"{__name__}.{family}") for family in family_names())
    return {row.name: row for module in modules for row in module.PIPELINES}


def get(name: str) -> TinyPipeline:
    """The tiny pipeline of that name.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    rows = tiny_pipelines()
    if name not in rows:
        raise ValueError(f"no tiny pipeline {name!r}: {nearest(name, tuple(rows))}")
    return rows[name]


def build(name: str) -> DiffusionPipeline:
    """Builds a tiny pipeline.

    Raises:
        ValueError: if there is none of that name.
        ImportError: if a package it needs is not installed, naming it.
    """
    row = get(name)
    if row.missing():
        raise ImportError(f"the tiny pipeline {name!r} needs {', '.join(row.missing())}: install it, then try again")
    return row.build()
