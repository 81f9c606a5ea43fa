"""Whether a LoRA is of the model that it is loaded into, before anything of it is.

diffusers logs names that have no place and goes on, with a picture that the LoRA moves a little or not at all; of another size it
raises what torch says of every weight. What a file holds is asked for where diffusers has brought its names into the model's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_LAYER = re.compile(r"(?P<layer>.+?)\.(?P<part>lora|lokr)_")
_EXPECTED: ContextVar[tuple[Mapping[str, nn.Module], list[str]] | None] = ContextVar("expected", default=None)


@contextmanager
def checked_against(models: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """While it lasts, `check_lora` compares with these models, by their names in the pipeline; yields notes for the report."""
    notes: list[str] = []
    token = _EXPECTED.set((models, notes))
    try:
        yield notes
    finally:
        _EXPECTED.reset(token)


def check_lora(state: Mapping[str, Tensor]) -> None:
    """Compares the weights of a LoRA, by their names in the pipeline, with the models that wait for them.

    Raises:
        ValueError: if it has nothing for them, if they have no place for most of it, or if it is of another size.
    """
    expected = _EXPECTED.get()
    if expected is None:
        return
    models, notes = expected
    modules = {f"{name}.{path}": module for name, model in models.items() for path, module in model.named_modules()}
    layers = list(dict.fromkeys(found["layer"] for key in state if (found := _LAYER.match(key))))
    own = [layer for layer in layers if layer.partition(".")[0] in models]
    if layers and not own:
        raise ValueError(
            f"the LoRA has no weight for {' or '.join(models) or 'any model of this pipeline'}: its names, such as "
            f"{layers[0]!r}, belong to another family, or to a text encoder alone; nothing was loaded"
        )
    lost = [layer for layer in own if layer not in modules]
    if 2 * len(lost) > len(own):
        raise ValueError(
            f"{len(lost)} of the {len(own)} layers of the LoRA are not in this pipeline, the first of them {lost[0]!r}: it is of "
            "another model, and nothing was loaded"
        )
    for key, weight in state.items():
        _check_size(key, weight, modules)
    without = [layer for layer in layers if layer not in modules]
    if without:
        note = f"{len(without)} of the {len(layers)} layers of the LoRA have no place here and were left out: {without[0]!r}"
        notes.append(f"{note} and others" if len(without) > 1 else note)
        warnings.warn(notes[-1], stacklevel=2)


def _check_size(key: str, weight: Tensor, modules: Mapping[str, Any]) -> None:
    layer, end, part = key.rpartition(".lora_A.") if ".lora_A." in key else key.rpartition(".lora_B.")
    linear: Any = modules.get(layer)
    if not end or part != "weight" or weight.ndim != 2 or not hasattr(linear, "in_features"):
        return
    found, wanted = (weight.shape[1], linear.in_features) if end == ".lora_A." else (weight.shape[0], linear.out_features)
    if found != wanted:
        side = "inputs" if end == ".lora_A." else "outputs"
        raise ValueError(
            f"the LoRA is of another size: it has {found} {side} for {layer!r}, and the model {wanted}: give one that was "
            "trained for this model; nothing was loaded"
        )
