"""Reading a weight again from where its component was loaded, in the precision it has there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from .fill import read_weight
from .header import read_header
from .plan import Plan

Reader = Callable[[], Tensor]
"""Reads a weight, to the host, in the dtype of the file."""

_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """Lets `weight_readers` find the file that `model` was filled from."""
    _PLANS[model] = replace(plan, layers=[])


def weight_readers(model: Any) -> Callable[[str], Iterator[Reader]]:
    """From a parameter's name, the ways to read it again; none for fp8 that was taken over as it is, which has no other form.

    A component of a single file is found there, any other in the folder that its configuration names. Several files of a folder
    may hold a weight (variants): the caller compares.
    """
    plan = _PLANS.get(model)
    if plan is not None:
        return lambda name: iter(() if name in plan.kept or name not in plan.pieces else (partial(read_weight, plan, name),))
    config = getattr(model, "config", None)
    source = config.get("_name_or_path", "") if isinstance(config, dict) else getattr(config, "_name_or_path", "")
    holders: dict[str, list[Path]] = {}
    for path in sorted(Path(source).glob("*.safetensors")) if source else ():
        for name in read_header(path).tensors:
            holders.setdefault(name, []).append(path)
    return lambda name: (partial(_read, path, name) for path in holders.get(name, ()))


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt", device="cpu") as file:
        return file.get_tensor(name)
