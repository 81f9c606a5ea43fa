"""float8 weights with the activation scale that their checkpoint was calibrated with.

torchao's own tensor for this (`PrototypeFloat8Tensor`) wants the scale in as many dimensions as the input and cannot be saved;
this one takes inputs of any rank. Values beyond the scale's range are clamped, which is what a static scale costs: quantizing
activations dynamically is the default everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.quantize_rows import FLOAT8_MAX
from .base import DequantizedWeight, aten, run_dequantized, serializable
from .fused import multiply_float8, operands, wants_gradient


@serializable
class StaticFloat8Tensor(DequantizedWeight):
    """A float8 weight [N, K] whose inputs are quantized with one fixed scale: w = qdata * scale, x = fp8 * input_scale.

    Tensor attributes:
        qdata: [N, K] float8_e4m3fn.
        scale: [N, 1] float32.
        input_scale: [1, 1] float32, positive.

    Non-tensor attributes:
        dtype: dtype that the weight stands for.
    """

    tensor_data_names = ["qdata", "scale", "input_scale"]
    tensor_attribute_names = ["dtype"]

    def __new__(cls, qdata: Tensor, scale: Tensor, input_scale: Tensor, dtype: torch.dtype) -> StaticFloat8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, device=qdata.device, dtype=dtype, requires_grad=False)

    def __init__(self, qdata: Tensor, scale: Tensor, input_scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.input_scale = input_scale

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in `dtype`."""
        return (self.qdata.float() * self.scale).to(dtype or self.dtype)


@StaticFloat8Tensor.implements(aten.linear.default)
@StaticFloat8Tensor.implements_torch_function(torch.nn.functional.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    activation, weight, bias = operands(args, kwargs)
    if wants_gradient(activation):
        return run_dequantized(func, args, kwargs)
    shape = (*activation.shape[:-1], weight.shape[0])
    rows = activation.reshape(-1, activation.shape[-1])
    if rows.numel() == 0:
        return activation.new_zeros(shape)
    quantized = (rows.float() / weight.input_scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).contiguous()
    row_scale = weight.input_scale.expand(rows.shape[0], 1).contiguous()
    return multiply_float8(quantized, row_scale, weight.qdata, weight.scale, bias, activation.dtype).view(shape)
