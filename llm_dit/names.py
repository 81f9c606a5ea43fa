"""Names users write, sizes they read, and errors that name the nearest valid one. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Final

VALID_METHODS: Final = ("none", "fp8-dynamic", "fp8-weight-only", "int8", "int4")
"""What `llm_dit.quantization.methods` has a row for, where a name is wanted and torch is not."""
ALIASES: Final[Mapping[str, str]] = {"fp8": "fp8-dynamic"}
REMOVED_METHODS: Final[Mapping[str, str]] = {
    "4bit": "int4",
    "8bit": "int8",
    "diffsynth-fp8": "fp8-dynamic",
    "fp8-filtered": "fp8-weight-only",
}
COMPONENT_TYPES: Final = ("encoder", "transformer", "vae")
GRANULARITIES: Final = ("per-row", "per-tensor")
BACKENDS: Final = ("torchao", "layerwise", "checkpoint")
ACTIVATION_SCALES: Final = ("dynamic", "static")
ENCODER_LAYERS: Final = ("all", "read")
CONTEXT_PARALLEL: Final = ("ulysses", "ring")
GRAPH_MODE: Final = "cuda-graph"
EAGER_GRAPH_MODE: Final = "cuda-graph-eager"
GRAPH_MODES: Final = (GRAPH_MODE, EAGER_GRAPH_MODE)
CALL_FILE: Final = "call.json"
"""In a pipeline's folder, the arguments that it is called with; not diffusers': our tiny models have one."""
COMPILE_MODES: Final = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", *GRAPH_MODES)


def format_bytes(count: int) -> str:
    """`count` in the unit a person would choose: "1.46 GiB", "845.2 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def nearest(value: object, valid: Sequence[str]) -> str:
    """The tail of an error message: "did you mean 'int8'? Valid: int8, int4", or only the list when nothing is near."""
    close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    listed = ", ".join(valid)
    return f"did you mean {close[0]!r}? Valid: {listed}" if close else f"valid: {listed}"


def check_name(value: str, valid: Sequence[str], what: str) -> str:
    """Returns `value`; raises ValueError, naming `what` and the nearest valid name, if it is not one of `valid`."""
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}: {nearest(value, valid)}")
    return value


def method_name(name: object, where: str = "quantization method") -> str:
    """The method that `name` stands for, aliases resolved; see `llm_dit.quantization.get_method`."""
    if not isinstance(name, str):
        raise ValueError(f"{where} must be one of {', '.join(VALID_METHODS)}, not {name!r}")
    if name in REMOVED_METHODS:
        raise ValueError(f"{where} {name!r} was removed: use {REMOVED_METHODS[name]!r} instead")
    resolved = ALIASES.get(name, name)
    if resolved not in VALID_METHODS:
        raise ValueError(f"unknown {where} {name!r}: {nearest(name, VALID_METHODS)}")
    return resolved


def first_line(error: Exception) -> str:
    """What an error says first; its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
