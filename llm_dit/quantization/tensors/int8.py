"""int8 weights as stock torchao `Int8Tensor`s, one scale per output row, quantized in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8Tensor, PerGroup, PerRow

from .stream import register_weight_handler, require_finite, row_chunks


@dataclass
class Int8StreamConfig(AOBaseConfig):
    """int8 weights, symmetric, scale [N, 1]; see `quantize_int8` for float16."""


@register_weight_handler(Int8StreamConfig)
def quantize_int8(weight: Tensor, config: AOBaseConfig, target: torch.device, compute: torch.device) -> Tensor:
    """[N, K] -> `Int8Tensor` with qdata [N, K] int8, scale [N, 1] float32 and zero_point [N, 1] int8 (zeros).

    float16 weights get two groups per row (scale [N, 2]) where K is even: torchao multiplies a one-scale row by the
    raw int8 values and scales afterwards, and sums of products of up to 127 overflow float16; grouped weights are
    dequantized first.
    """
    columns = weight.shape[1]
    grouped = weight.dtype == torch.float16 and columns % 2 == 0
    granularity = PerGroup(columns // 2) if grouped else PerRow()
    scales = 2 if grouped else 1
    qdata = torch.empty(weight.shape, dtype=torch.int8, device=target)
    scale = torch.empty((weight.shape[0], scales), dtype=torch.float32, device=target)
    zero_point = torch.zeros((weight.shape[0], scales), dtype=torch.int8, device=target)
    for chunk in row_chunks(weight, compute):
        quantized = Int8Tensor.from_hp(weight[chunk].to(compute), granularity=granularity)
        qdata[chunk], scale[chunk] = quantized.qdata, quantized.scale
    require_finite(scale)
    return Int8Tensor(qdata, scale, [1, columns // scales], weight.dtype, zero_point=zero_point)
