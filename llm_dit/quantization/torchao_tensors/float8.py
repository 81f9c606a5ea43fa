"""float8 (e4m3) weights as stock torchao `Float8Tensor`s that cannot turn a row of zeros into NaN.

torchao 0.18 computes a scale as amax / 448 without a floor (pytorch/ao#4713): a row of zeros, in a weight or, with
dynamic activations, in the zero-padded text of a prompt, becomes 0 / 0. `hp_value_lb` sets the floor, for weights and
activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

from .fused import ZERO_ROW_BOUND, as_fused, zero_row_bound
from .stream import allocate, fetch, register_weight_handler, require_finite, row_chunks, store

_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass
class Float8StreamConfig(AOBaseConfig):
    """float8 weights, quantized in chunks.

    Attributes:
        granularity: "per-row" (scale [N, 1]) or "per-tensor" (scale [1, 1]).
        dynamic: quantize activations too, at each call, and multiply on the tensor cores.
    """

    granularity: str = "per-row"
    dynamic: bool = False


@register_weight_handler(Float8StreamConfig)
def quantize_float8(weight: Tensor, config: AOBaseConfig, target: torch.device, compute: torch.device) -> Tensor:
    """[N, K] -> `Float8Tensor` with qdata [N, K] e4m3 and scale [N, 1] or [1, 1] float32; with row scales its fused subclass."""
    assert isinstance(config, Float8StreamConfig)
    rows, columns = weight.shape
    # torchao takes a scale [1, 1] over a 128 x 128 block for DeepSeek's blockwise layout, so that size gets row scales.
    per_row = config.granularity == "per-row" or (rows, columns) == (128, 128)
    qdata = allocate((rows, columns), torch.float8_e4m3fn, target)
    scale = torch.empty((rows if per_row else 1, 1), dtype=torch.float32, device=compute)
    tensor_scale = None if per_row else _tensor_scale(weight, compute)
    for chunk in row_chunks(weight, compute):
        part = fetch(weight[chunk], compute)
        part_scale = _scale(part.abs().amax(dim=1, keepdim=True)) if tensor_scale is None else tensor_scale
        store(qdata[chunk], (part.float() / part_scale).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn))
        if tensor_scale is None:
            scale[chunk] = part_scale
    if tensor_scale is not None:
        scale.copy_(tensor_scale)
    require_finite(scale)
    activation = None
    if config.dynamic:
        bound = zero_row_bound(weight.dtype)
        activation = QuantizeTensorToFloat8Kwargs(
            granularity=PerRow() if per_row else PerTensor(),
            mm_config=Float8MMConfig(use_fast_accum=True),
            hp_value_lb=bound,
        )
    stock = Float8Tensor(
        qdata,
        scale.to(target),
        block_size=[1 if per_row else rows, columns],
        mm_config=Float8MMConfig(use_fast_accum=True) if config.dynamic else None,
        act_quant_kwargs=activation,
        dtype=weight.dtype,
    )
    return as_fused(stock)


def _scale(amax: Tensor) -> Tensor:
    """amax / 448 as float32, divided in the weight's dtype as torchao divides, so that the bits are torchao's.

    float16 alone is widened first, for it would round the quotient to a subnormal.
    """
    amax = amax.float() if amax.dtype == torch.float16 else amax
    return (amax.clamp(min=ZERO_ROW_BOUND) / _MAX).float()


def _tensor_scale(weight: Tensor, compute: torch.device) -> Tensor:
    """Scale [1, 1] float32 of the whole weight, from the absolute maxima of its chunks."""
    if weight.is_meta:
        return torch.empty((1, 1), device="meta")
    amax = torch.stack([fetch(weight[chunk], compute).abs().amax() for chunk in row_chunks(weight, compute)]).amax()
    return _scale(amax).reshape(1, 1)
