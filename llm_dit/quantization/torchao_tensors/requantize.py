"""New values in a quantized weight's own memory: what holds its address, a compiled model or a CUDA graph's pool, goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor

from ..detect import FP8_DTYPES
from .float8 import Float8StreamConfig
from .int4 import Int4GroupConfig, Int4GroupTensor
from .int8 import Int8StreamConfig
from .static import StaticFloat8Tensor
from .stream import fetch, quantize_weight, row_chunks, store


def requantize_(weight: Tensor, values: Tensor) -> None:
    """Quantizes `values` as `weight` is quantized, into the memory of `weight`.

    Args:
        weight: [N, K], quantized by a method of ours, cast to raw float8, or not quantized.
        values: [N, K] in the dtype that `weight` stands for, on any device.

    Raises:
        ValueError: if `weight` is quantized in another way, or `values` hold NaN or infinity; it is then what it was.
    """
    with torch.inference_mode(False), torch.no_grad():
        if not isinstance(weight, TorchAOBaseTensor):
            _cast_(weight, values)
            return
        fresh: Any = quantize_weight(values, requantizing_config(weight), weight.device)
        names, _ = fresh.__tensor_flatten__()
        if any(getattr(weight, name).shape != getattr(fresh, name).shape for name in names):
            raise ValueError(f"a {type(weight).__name__} with scales {tuple(weight.scale.shape)} cannot take new values")
        for name in names:
            getattr(weight, name).copy_(getattr(fresh, name))


def requantizing_config(weight: Any) -> AOBaseConfig:
    """What quantizes new values for `weight`.

    Raises:
        ValueError: if no method of ours made it.
    """
    if isinstance(weight, Int4GroupTensor):
        return Int4GroupConfig(weight.group_size)
    if isinstance(weight, StaticFloat8Tensor):
        return Float8StreamConfig()
    if isinstance(weight, Float8Tensor) and list(weight.block_size) in ([1, weight.shape[1]], list(weight.shape)):
        per_row = weight.scale.shape[0] == weight.shape[0]
        return Float8StreamConfig("per-row" if per_row else "per-tensor", weight.act_quant_kwargs is not None)
    if isinstance(weight, Int8Tensor) and weight.scale.ndim == 2:
        return Int8StreamConfig()
    raise ValueError(f"a {type(weight).__name__} cannot take new values: quantize with one of this library's methods")


def _cast_(weight: Tensor, values: Tensor) -> None:
    """Casts; values beyond the range of float8 are clamped, which the cast would turn into NaN."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the weight holds NaN or infinity")
    limit = torch.finfo(weight.dtype).max
    for chunk in row_chunks(weight, weight.device):
        part = fetch(values[chunk], weight.device)
        part = part.clamp(-limit, limit) if weight.dtype in FP8_DTYPES else part
        store(weight[chunk], part.to(weight.dtype))
