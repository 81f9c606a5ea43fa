"""What a tiny pipeline is: the published architecture at a width a laptop builds in a second.

Every family file of this package lists its tiny pipelines as :class:`TinyPipeline` rows. They use the real diffusers
and transformers classes, so whatever loads, quantizes, saves or generates here takes the code path of the published
model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class TinyPipeline:
    """One tiny pipeline.

    Attributes:
        name: the name under which `llm_dit.tiny.build` finds it, e.g. ``"z-image"``.
        pipeline_class: the diffusers class that `build` returns, e.g. ``"ZImagePipeline"``.
        build: makes the pipeline in bfloat16 on the CPU; the same weights at every call.
        call: the keyword arguments of a two-step generation at the smallest size, generator included.
        requires: importable packages that building or loading needs besides the library's own dependencies.
    """

    name: str
    pipeline_class: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[], Mapping[str, Any]]
    requires: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The packages of `requires` that are not installed."""
        return [package for package in self.requires if importlib.util.find_spec(package) is None]
