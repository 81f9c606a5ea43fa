"""Exact weight bytes of a quantized component, from its meta model: nothing is read, nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from ..names import COMPONENT_TYPES, GRANULARITIES, check_name
from .detect import quantized_by
from .filters import Layer, check_patterns, decide_layers
from .methods import get_method
from .sizes import tensor_bytes
from .torchao_tensors.stream import quantize_weight


@dataclass(frozen=True)
class MemoryEstimate:
    """Weight bytes of one component under one method.

    Attributes:
        method: the method.
        bytes_before: bytes of the weights in 16 bits (`dtype`), unquantized.
        bytes_after: bytes that will be held, scales and what stays unquantized included.
        quantized_layers, total_layers: counts of layers.
    """

    method: str
    bytes_before: int
    bytes_after: int
    quantized_layers: int
    total_layers: int


def estimate_memory(
    model: nn.Module,
    method: str,
    component_type: str,
    granularity: str = "per-row",
    skip_patterns: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> MemoryEstimate:
    """The weight bytes that `model` will hold under `method`.

    The same decisions and the same quantizers as in a real load run on meta tensors, so the figure is exact by
    construction. Activations are not in it.

    Args:
        model: the component, best on the meta device (`with torch.device("meta")`); it is not changed.
        dtype: what floating-point parameters are loaded in.
        method, component_type, granularity, skip_patterns: as in `quantize_component`.

    Raises:
        ValueError: for wrong names, fp8 or int4 for a vae, or a model that is quantized already.
    """
    row = get_method(method)
    check_name(component_type, COMPONENT_TYPES, "component_type")
    check_name(granularity, GRANULARITIES, "granularity")
    check_patterns(skip_patterns, "skip_patterns")
    source = quantized_by(model)
    if source is not None:
        raise ValueError(f"{type(model).__name__} is already quantized ({source}): estimate the model in 16 bits")
    layers = decide_layers(model, row, component_type, granularity, skip_patterns)
    quantized = {id(layer.weight): layer for layer in layers if layer.config is not None}
    before = after = sum(map(tensor_bytes, model.buffers()))
    for parameter in model.parameters():
        size = parameter.numel() * (dtype if parameter.is_floating_point() else parameter.dtype).itemsize
        before += size
        after += _quantized_bytes(quantized[id(parameter)], dtype) if id(parameter) in quantized else size
    return MemoryEstimate(row.name, before, after, len(quantized), len(layers))


_SIZES: Final[dict[tuple[torch.Size, torch.dtype, str], int]] = {}
"""Bytes of quantized weights by shape, dtype and configuration: plans of one model ask again and again."""


def _quantized_bytes(layer: Layer, dtype: torch.dtype) -> int:
    assert layer.config is not None
    key = (layer.weight.shape, dtype, repr(layer.config))
    if key not in _SIZES:
        weight = torch.empty(key[0], dtype=dtype, device="meta")
        _SIZES[key] = tensor_bytes(quantize_weight(weight, layer.config))
    return _SIZES[key]
