"""Bytes of activations by size, counted by running a component on meta: what a phase takes beside the weights.

The same runs, on a device, are what `llm-dit bench calibrate` measures; what a count cannot see is in `constants.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..building import default_dtype
from ..decoding import WHOLE, WORKSPACE, Cut, FittedDecode
from ..forwards import Forwards, Size, noise
from ..quantization import VALID_METHODS, get_method
from ..quantization.activations import Transient, peaks_with_transients
from ..quantization.filters import decide_layers

PHASES: Final = ("encode", "denoise", "decode")
BLOCKS: Final = 2
"""Blocks of each kind of a denoiser that are counted and measured: its activations do not grow with their number."""
_META: Final = torch.device("meta")


def shortened(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What makes the same model with at most `BLOCKS` blocks of each kind."""
    model: Any = make_on_meta(make)
    kind, config = type(model), model.config
    if isinstance(config, Mapping):
        # Called, because `from_config` puts back the defaults of what was not given.
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        fewer = {name: min(value, BLOCKS) for name, value in given.items() if name.endswith("layers") and type(value) is int}
        return lambda: kind(**{**given, **fewer})
    config = deepcopy(config)
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name in ("num_hidden_layers", "depth"):
            if hasattr(part, name):
                setattr(part, name, min(getattr(part, name), BLOCKS))
        if part is not None and getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:BLOCKS]
    return lambda: kind(config)


def make_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model in bfloat16 without memory."""
    with default_dtype(torch.bfloat16), _META:
        return make().eval()


def run_of(model: Any, component: str, phase: str, forwards: Forwards, size: Size, device: torch.device) -> Callable[[], Any]:
    """What a pipeline does with a component in a phase."""
    if phase == "denoise":
        return lambda: model(**forwards.step(model, device, size))
    if component in forwards.encoders:
        return lambda: forwards.encoders[component](model, device, size)
    if phase == "decode":
        return lambda: model.decode(**forwards.latents(model, device, size))
    return lambda: model.encode(_reference(model, forwards, size, device))


def activation_bytes(
    model: nn.Module, component: str, phase: str, role: str, forwards: Forwards, size: Size, cut: Cut = WHOLE
) -> dict[str, int]:
    """Bytes that a component on meta holds at most beside its weights, by the method that those are quantized with.

    Args:
        cut: how a decode is tiled.
    """
    if cut != WHOLE:
        taken = FittedDecode(model).needed_bytes(**forwards.latents(model, _META, size), cut=cut) - WORKSPACE
        return dict.fromkeys(VALID_METHODS, taken)
    run = run_of(model, component, phase, forwards, size, _META)
    return peaks_with_transients(run, {method: _transient(model, method, role) for method in VALID_METHODS})


def _transient(model: nn.Module, method: str, role: str) -> Transient | None:
    """What a quantized Linear makes for one product: its weight in 16 bits, or its input in float8."""
    row = get_method(method)
    if row.make_config is None or role == "vae":
        return None
    quantized = {id(layer.weight) for layer in decide_layers(model, row, role, "per-row") if layer.config is not None}

    def transient(value: Tensor, weight: Tensor) -> int:
        if id(weight) not in quantized:
            return 0
        return value.numel() if row.quantizes_activations else 2 * weight.numel()

    return transient


def _reference(model: Any, forwards: Forwards, size: Size, device: torch.device) -> Tensor:
    """One reference image, as its VAE takes it: a video of one frame where the VAE is one of videos."""
    side = int(size.reference_pixels**0.5) // forwards.pixels_per_token * forwards.pixels_per_token
    video = forwards.latents(model, _META, size)["z"].ndim == 5
    return noise(device, 1, 3, *((1,) if video else ()), side, side)
