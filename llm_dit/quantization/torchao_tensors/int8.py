"""int8 weights as stock torchao `Int8Tensor`s, one scale per output row, quantized in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8Tensor

from .fused import as_fused
from .stream import allocate, fetch, register_weight_handler, require_finite, row_chunks, store

_EPS = torch.finfo(torch.float32).eps
"""torchao's floor of an int8 scale, in every dtype."""


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
    rows, columns = weight.shape
    groups = 2 if weight.dtype == torch.float16 and columns % 2 == 0 else 1
    qdata = allocate(weight.shape, torch.int8, target)
    scale = torch.empty((rows, groups), dtype=torch.float32, device=compute)
    zero_point = torch.zeros((rows, groups), dtype=torch.int8, device=target)
    for chunk in row_chunks(weight, compute):
        part = fetch(weight[chunk], compute).view(-1, groups, columns // groups)
        # Divided in the weight's dtype and multiplied by the reciprocal, as torchao does: the bits are torchao's.
        part_scale = (part.abs().amax(dim=2, keepdim=True) / 127.5).clamp(min=_EPS).float()
        q = (part * (1.0 / part_scale)).round_().clamp_(-128, 127).to(torch.int8)
        store(qdata[chunk], q.view(-1, columns))
        scale[chunk] = part_scale.squeeze(2)
    require_finite(scale)
    return as_fused(Int8Tensor(qdata, scale.to(target), [1, columns // groups], weight.dtype, zero_point=zero_point))
