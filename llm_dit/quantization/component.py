"""Quantizing a component that is in memory; the loaders quantize with the same decisions while they read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torchao.quantization import quantize_

from ..names import COMPONENT_TYPES, GRANULARITIES, check_name
from .detect import quantized_by
from .filters import Layer, check_patterns, decide_layers, named_layers
from .hardware import require_support
from .methods import Method, get_method
from .sizes import model_bytes
from .torchao_tensors.staging import staged
from .torchao_tensors.stream import require_finite

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


def quantize_component(
    model: M,
    method: str,
    component_type: str,
    granularity: str = "per-row",
    verbose: bool = False,
    skip_patterns: Sequence[str] = (),
) -> tuple[M, dict[str, Any]]:
    """Quantizes the layers of one component in place, one layer at a time.

    Args:
        model: the component, on any device; on meta the result is on meta, which is how sizes are estimated.
        method: one of `VALID_METHODS`, or an alias.
        component_type: "encoder", "transformer" or "vae"; chooses the filters. A layer is an `nn.Linear` and, in a vae,
            a convolution.
        granularity: "per-row" or "per-tensor"; only fp8 methods read it.
        verbose: log each layer.
        skip_patterns: names left alone besides the filters', as wildcards over whole dotted parts: "proj_out" matches
            "proj_out" and "blocks.0.proj_out", not "audio_proj_out".

    Returns:
        (model, stats). stats has "method", "component_type", "granularity", "quantized_layers", "skipped_layers" and
        "total_layers" (counts; quantized + skipped == total), "skip_reasons" (name -> reason), "bytes_before" and
        "bytes_after" (storage really held). A model that is already quantized is left whole: "method" is then
        "already_quantized" and "quantized_by" says by what.

    Raises:
        TypeError: for what is no `nn.Module`.
        ValueError: for wrong names, a method the hardware lacks, weights with NaN, or when no layer could be quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> model, stats = quantize_component(model, "fp8-weight-only", "transformer")
        >>> stats["quantized_layers"], stats["skip_reasons"]
        (1, {'2': '512 x 10 is not divisible by 16, which fp8-weight-only needs'})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_component takes a model, such as pipe.transformer, and not a {type(model).__name__}")
    row = get_method(method)
    check_name(component_type, COMPONENT_TYPES, "component_type")
    check_name(granularity, GRANULARITIES, "granularity")
    check_patterns(skip_patterns, "skip_patterns")
    source = quantized_by(model)
    if source is not None:
        logger.warning("%s is already quantized (%s) and is left as it is", type(model).__name__, source)
        return model, _left_whole(model, component_type, source)
    layers = decide_layers(model, row, component_type, granularity, skip_patterns)
    before = model_bytes(model)
    if row.make_config is not None:
        require_quantizable(layers, row, component_type)
        for dtype in {layer.weight.dtype for layer in layers if layer.config is not None}:
            require_support(row, granularity, dtype)
        _require_finite(layers)
    with staged():
        for layer in layers:
            if verbose:
                logger.info("%s: %s", layer.name, f"left as it is ({layer.reason})" if layer.reason else row.name)
            if layer.config is not None:
                _quantize_layer(layer)
    return model, layer_stats(layers, row, component_type, granularity, before, model_bytes(model))


def quantize_vae(vae: M, method: str = "int8") -> M:
    """Quantizes the convolutions (and the few Linears) of a VAE, audio VAE or vocoder to int8, in place.

    One scale per output channel; 1d, 2d, 3d, transposed, and subclasses with a forward of their own.

    Raises:
        ValueError: for fp8 and int4, with the reason.
    """
    return quantize_component(vae, method, "vae")[0]


def require_quantizable(layers: Sequence[Layer], method: Method, what: str) -> None:
    """Raises ValueError if `method` would quantize none of `layers`, naming `what` and the reasons."""
    if any(layer.config is not None for layer in layers):
        return
    reasons = sorted({layer.reason for layer in layers}) or ["it has no layer of a kind that is quantized"]
    raise ValueError(
        f"{method.name} quantized none of the {len(layers)} layers of the {what}: {'; '.join(reasons)}. "
        "Choose another method, or 'none' to leave it as it is"
    )


def layer_stats(
    layers: Sequence[Layer], method: Method, component_type: str, granularity: str, before: int, after: int
) -> dict[str, Any]:
    """The `stats` of `quantize_component` for decided layers."""
    reasons = {layer.name: layer.reason for layer in layers if layer.reason}
    return {
        "method": method.name,
        "component_type": component_type,
        "granularity": granularity if method.fp8 else None,
        "quantized_layers": len(layers) - len(reasons),
        "skipped_layers": len(reasons),
        "total_layers": len(layers),
        "skip_reasons": reasons,
        "bytes_before": before,
        "bytes_after": after,
    }


def _require_finite(layers: Sequence[Layer]) -> None:
    """Before the first layer is replaced: a model that is refused stays as it was."""
    for layer in layers:
        if layer.config is not None and not layer.weight.is_meta and layer.weight.dtype.itemsize > 1:  # fp8 has no minimum
            with _naming(layer):
                require_finite(torch.stack(layer.weight.detach().aminmax()))


def _quantize_layer(layer: Layer) -> None:
    with _naming(layer), torch.inference_mode(False), torch.no_grad():
        quantize_(layer.module, layer.config, filter_fn=lambda module, name: module is layer.module)


@contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Errors about a weight say of which layer it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer.name!r} cannot be quantized: {error}") from error


def _left_whole(model: nn.Module, component_type: str, source: str) -> dict[str, Any]:
    names = [name for name, _ in named_layers(model, component_type)]
    size = model_bytes(model)
    return {
        "method": "already_quantized",
        "quantized_by": source,
        "component_type": component_type,
        "granularity": None,
        "quantized_layers": 0,
        "skipped_layers": len(names),
        "total_layers": len(names),
        "skip_reasons": dict.fromkeys(names, f"the model is already quantized ({source})"),
        "bytes_before": size,
        "bytes_after": size,
    }
