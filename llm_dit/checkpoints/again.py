"""Reading a weight again from where its component was loaded, in the precision it has there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from safetensors import safe_open
from torch import Tensor, nn

from .fill import read_weight
from .header import read_header
from .plan import Plan

Reader = Callable[[], Tensor]
"""Reads a weight, to the host, in the dtype of the file."""

_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """Lets `weights_of` find the file that `model` was filled from."""
    _PLANS[model] = replace(plan, layers=[])


class Weights(Protocol):
    """From a parameter's name, the ways to read it again."""

    def __call__(self, name: str) -> Iterator[Reader]: ...


@dataclass(frozen=True)
class Stamped:
    """A file as it was when it was found.

    Attributes:
        stamp: its time of change in nanoseconds and its size.
    """

    path: Path
    stamp: tuple[int, int]

    @classmethod
    def now(cls, path: Path) -> Self:
        found = path.resolve()
        return cls(found, (found.stat().st_mtime_ns, found.stat().st_size))

    def check(self) -> None:
        """Raises ValueError if the file has changed, or is gone."""
        if not self.path.is_file() or Stamped.now(self.path) != self:
            raise ValueError(f"{self.path} has changed since the model was loaded, or is gone: load the pipeline anew")


@dataclass(frozen=True)
class FileWeights:
    """In the file of a plan; fp8 that was taken over as it is has no other form, and no reader."""

    plan: Plan
    file: Stamped

    def __call__(self, name: str) -> Iterator[Reader]:
        if name in self.plan.pieces and name not in self.plan.kept:
            yield partial(_read_planned, self.plan, self.file, name)


@dataclass(frozen=True)
class FolderWeights:
    """In the safetensors files of a folder; several may hold a weight (variants), and the caller compares."""

    holders: Mapping[str, Sequence[Stamped]]

    def __call__(self, name: str) -> Iterator[Reader]:
        for file in self.holders.get(name, ()):
            yield partial(_read, file, name)


def weights_of(model: Any) -> Weights:
    """Where the weights of `model` came from: the single file that it was filled from, or the folder that its config names."""
    plan = _PLANS.get(model)
    if plan is not None:
        return FileWeights(plan, Stamped.now(plan.layout.header.path)) if plan.layout.header.path.is_file() else FolderWeights({})
    config = getattr(model, "config", None)
    source = config.get("_name_or_path", "") if isinstance(config, Mapping) else getattr(config, "_name_or_path", "")
    holders: dict[str, list[Stamped]] = {}
    for path in sorted(Path(source).glob("*.safetensors")) if source else ():
        try:
            names = read_header(path).tensors
        except (OSError, ValueError):
            continue  # a variant that was not fetched, for example
        for name in names:
            holders.setdefault(name, []).append(Stamped.now(path))
    return FolderWeights(holders)


def _read(source: Stamped, name: str) -> Tensor:
    source.check()
    with safe_open(source.path, framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def _read_planned(plan: Plan, source: Stamped, name: str) -> Tensor:
    source.check()
    return read_weight(plan, name)
