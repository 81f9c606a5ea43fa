"""LoRAs in pipelines whose models are quantized: what is loaded is checked, and what is fused is ours to fuse (`layer`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import log10
from typing import Any

import torch
from torch import nn

from ..checkpoints.again import weights_of
from ..quantization.detect import FP8_DTYPES


def require_peft() -> None:
    """Raises ImportError, saying what to install, where peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRAs need peft, which is not installed: pip install 'llm-dit[lora]'") from error


@contextmanager
def loading(models: Mapping[str, nn.Module], hotswap: bool = False) -> Iterator[None]:
    """Around diffusers' `load_lora_weights`, which loads into `models`.

    Raises:
        ValueError: if it holds NaN or infinity; nothing stays loaded then.
    """
    known = {name: _adapters(model) for name, model in models.items()}
    before = {name: _snapshot(model) for name, model in models.items()} if hotswap else {}
    with _sixteen_bit_stand_ins(models.values()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")  # fusing is ours, and needs none
        yield
    added = {name: _adapters(model) - known[name] for name, model in models.items()}
    try:
        for name, model in models.items():
            _require_finite(name, model, _adapters(model) if hotswap else added[name])
    except ValueError:
        for name, model in models.items():
            _put_back(model, added[name], before.get(name, {}))
        raise
    for model in models.values():
        adopt_layers(model)


def adopt_layers(model: nn.Module) -> None:
    """Makes every LoRA layer of `model` over a quantized weight fuse as ours do."""
    from peft.tuners.lora import LoraLayer

    from .layer import adopt

    weights = weights_of(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adopt(module, partial(weights, f"{name}.weight"))


def fusing_notes(models: Mapping[str, nn.Module]) -> Iterator[str]:
    """For every model with fused LoRAs, from what they were fused, and what it cost where that was rounded before."""
    from .layer import ExactLoraLinear

    for name, model in models.items():
        layers = [m for m in model.modules() if isinstance(m, ExactLoraLinear) and m.original is not None]
        rounded = [layer for layer in layers if layer.original and not layer.original.exact]
        if not layers:
            continue
        adapters = ", ".join(sorted({adapter for layer in layers for adapter in layer.fused}))
        if not rounded:
            yield f"{name}: LoRA {adapters} fused into {len(layers)} layers, from their weights in the checkpoint"
            continue
        noise = sum(layer.fusing_noise() for layer in rounded) / len(rounded)
        ratio = f"{-10 * log10(noise):.1f} dB" if noise > 0 else "no error"
        yield (
            f"{name}: LoRA {adapters} fused into {len(layers)} layers, {len(rounded)} of them from quantized weights, because "
            f"their checkpoint cannot be read again: rounding twice, now at {ratio}; load from the bf16 weights to round once"
        )


def _adapters(model: Any) -> frozenset[str]:
    return frozenset(getattr(model, "peft_config", None) or ())


def _require_finite(name: str, model: Any, adapters: Iterable[str]) -> None:
    """Raises ValueError if a weight of the adapters is not finite; offloaded ones are not there to be looked at."""
    for adapter in adapters:
        part = f".{adapter}."
        sound = {key: torch.isfinite(value).all() for key, value in _adapter_weights(model, part) if not value.is_meta}
        bad = [key for key, finite in sound.items() if not bool(finite)]
        if bad:
            more = f" and {len(bad) - 1} more weights" if len(bad) > 1 else ""
            raise ValueError(
                f"the LoRA {adapter!r} holds NaN or infinity in {bad[0].replace(part, '.')!r} of the {name}{more}, and was not "
                "loaded"
            )


def _adapter_weights(model: Any, part: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    return ((key, value) for key, value in model.named_parameters() if "lora_" in key and part in key)


def _snapshot(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' weights, before others are swapped into their memory."""
    return {key: value.detach().clone() for key, value in _adapter_weights(model)}


def _put_back(model: Any, added: Iterable[str], before: Mapping[str, torch.Tensor]) -> None:
    """Takes adapters off again, with peft's layers if none is left, and undoes a swap."""
    for adapter in added:
        model.delete_adapters(adapter)
    if added and not _adapters(model):
        model.unload_lora()
    with torch.no_grad():
        for key, value in _adapter_weights(model):
            if key in before:
                value.copy_(before[key])


@contextmanager
def _sixteen_bit_stand_ins(models: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, Linears that are cast to raw float8 seem to be in bfloat16, to which peft then casts the adapters.

    It casts them to the dtype of the weight beside them, and adapters in float8 have lost most of their digits and cannot be
    multiplied.
    """
    cast = [
        (module, module.weight)
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.dtype in FP8_DTYPES
    ]
    for module, weight in cast:
        stand_in = torch.zeros((), dtype=torch.bfloat16, device=weight.device).expand(weight.shape)
        module.weight = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in cast:
            module.weight = weight


@contextmanager
def fusing(models: Iterable[nn.Module]) -> Iterator[None]:
    """Around diffusers' `fuse_lora`, which multiplies an adapter's scale by `lora_scale` and never divides it again.

    A layer of ours keeps what it fused with; its adapter keeps its own scale, so that fusing once more is fusing the same. If one
    layer cannot be fused, no layer is.
    """
    from .layer import ExactLoraLinear

    layers = [module for model in models for module in model.modules() if isinstance(module, ExactLoraLinear)]
    before = [(dict(layer.scaling), dict(layer.fused)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, (_, fused) in zip(layers, before, strict=True):
            layer.back_to(fused)
        raise
    finally:
        for layer, (scaling, _) in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
