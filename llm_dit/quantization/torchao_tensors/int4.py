"""int4 weights: nibbles packed in pairs, asymmetric groups of 128, dequantized and then multiplied.

Rows that 128 does not divide have groups of 64 or 32. What the 16 values of a group span is searched for and then fitted:
docs/quality.md has what that is worth, beside finer groups, HQQ and low ranks.

torchao's stock int4 kernels either need a package that no wheel index has for every card or multiply tile by tile, 14
times slower than bf16 at the thousands of tokens of a diffusion step. There the multiplication dominates and
dequantizing a weight once per call is cheap, so this layout is made for dequantizing, on every device alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig

from ..kernels import dequantize_int4, dequantize_int4_to_float8
from .base import DequantizedWeight, aten, run_dequantized, serializable
from .fused import ZERO_ROW_BOUND, multiply_float8, operands, wants_gradient
from .shared_rows import quantize_shared_rows
from .stream import allocate, fetch, register_weight_handler, require_finite, row_chunks, store

GROUP_SIZE = 128
SMALLEST_GROUP = 32
SHARES: Final = (1.0, 0.9, 0.8, 0.7)
"""Of the way from the smallest weight of a group to the largest, around its middle: what its 16 values may span."""
ROUNDS: Final = 4
"""Of fitting a line to the weights. More shares instead take as long and leave more error: eight and no round 9.43 % of Gaussian
weights in groups of 128, four and four 9.32 %; and of the sum of a group's errors half as much."""


@dataclass
class Int4GroupConfig(AOBaseConfig):
    """int4 weights in asymmetric groups of at most `group_size` along in_features."""

    group_size: int = GROUP_SIZE


def group_size_for(columns: int, largest: int = GROUP_SIZE) -> int:
    """The largest group that rows of `columns` weights divide into: `largest`, or a half or a quarter of it.

    Raises:
        ValueError: if there is none.
    """
    for size in (largest, largest // 2, largest // 4):
        if size and columns % size == 0:
            return size
    raise ValueError(f"rows of {columns} weights do not divide into groups of {largest}, or a half or a quarter of it")


def _floor(dtype: torch.dtype) -> float:
    """The smallest step: in float16 a subnormal, for a step of small weights is one; kernels flush those of float32 to 0."""
    return max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)


def searched_range(grouped: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest value of each group and the step between its 16, both [N, groups] in `dtype`: of `SHARES` the best.

    Few weights lie at the ends of a group, and cutting them off makes the steps between all others finer.

    Args:
        grouped: [N, groups, G] float32.
        dtype: what is stored; errors are those of the rounded range, so that rounding it adds none of its own.
    """
    lowest, highest = grouped.amin(-1), grouped.amax(-1)
    span = highest - lowest
    # A group of equal weights has no range. The floor keeps the step from 0; such a group is its smallest value alone.
    floor = _floor(dtype)
    # Written over for every share: on a CPU, memory that is new each time takes as long as the arithmetic.
    difference, steps = torch.empty_like(grouped), torch.empty_like(grouped)
    for share in SHARES:
        low, step = (lowest + span * ((1 - share) / 2)).to(dtype), (span * (share / 15)).to(dtype).clamp(min=floor)
        torch.sub(grouped, low.float().unsqueeze(-1), out=difference)
        _steps(difference, step, out=steps).mul_(step.float().unsqueeze(-1))
        error = difference.sub_(steps).square_().sum(-1)
        if share == SHARES[0]:
            best_low, best_step, least = low, step, error
        else:
            better = error < least
            best_low, best_step = torch.where(better, low, best_low), torch.where(better, step, best_step)
            least = torch.minimum(error, least)
    return best_low, best_step


def fitted_range(grouped: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `searched_range`, and then fitted: each round draws a line through the weights over their values, by least squares.

    Through what is nearest to that line goes the next. A fitted group's errors sum to 0, but for the rounding of its range: where
    activations have a mean, which errors of one sign would carry on, it passes nearly whole.
    """
    low, step = searched_range(grouped, dtype)
    floor = _floor(dtype)
    mean = grouped.mean(-1)
    values, products = torch.empty_like(grouped), torch.empty_like(grouped)
    for _ in range(ROUNDS):
        torch.sub(grouped, low.float().unsqueeze(-1), out=values)
        middle = _steps(values, step, out=values).mean(-1)
        covariance = torch.mul(values, grouped, out=products).mean(-1) - middle * mean
        variance = values.square_().mean(-1) - middle.square()
        # Of equal values there is no line, and their variance is exactly 0: means of whole numbers over 32, 64 or 128.
        step = torch.where(variance > 0, covariance / variance, step.float()).to(dtype).clamp(min=floor)
        low = (mean - step.float() * middle).to(dtype)
    return low, step


def _steps(difference: Tensor, step: Tensor, out: Tensor | None = None) -> Tensor:
    """How many steps [N, groups] the differences [N, groups, G] from the smallest value are, 0 to 15."""
    return torch.div(difference, step.float().unsqueeze(-1), out=out).round_().clamp_(0, 15)


@serializable
class Int4GroupTensor(DequantizedWeight):
    """An int4 weight [N, K] with a scale and an offset for every group of G weights of a row.

    w[n, k] = q[n, k] * scale[n, k // G] + zero_point[n, k // G], with q in 0..15.

    Tensor attributes:
        qdata: [N, K / 2] uint8; weight 2i in the low nibble of byte i, weight 2i + 1 in the high one.
        scale: [N, K / G], in the dtype of the weight; never 0.
        zero_point: [N, K / G], in the dtype of the weight: the value of q = 0.

    Non-tensor attributes:
        group_size: G.
        dtype: dtype of the weight that was quantized.
        fp8_compute: multiply in float8 on the tensor cores; see `llm_dit.quantization.set_int4_compute`.
    """

    tensor_data_names = ["qdata", "scale", "zero_point"]
    tensor_attribute_names = ["group_size", "dtype"]
    optional_tensor_attribute_names = ["fp8_compute"]

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        group_size: int,
        dtype: torch.dtype,
        fp8_compute: bool = False,
    ) -> Int4GroupTensor:
        shape = (qdata.shape[0], qdata.shape[1] * 2)
        return torch.Tensor._make_wrapper_subclass(cls, shape, device=qdata.device, dtype=dtype, requires_grad=False)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        group_size: int,
        dtype: torch.dtype,
        fp8_compute: bool = False,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.zero_point = zero_point
        self.group_size = group_size
        self.fp8_compute = fp8_compute

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in `dtype`; see `dequantize_int4`."""
        return dequantize_int4(self.qdata, self.scale, self.zero_point, dtype or self.dtype)


@register_weight_handler(Int4GroupConfig)
def quantize_int4(weight: Tensor, config: AOBaseConfig, target: torch.device, compute: torch.device) -> Tensor:
    """[N, K] with K divisible by a quarter of the group size -> `Int4GroupTensor`."""
    assert isinstance(config, Int4GroupConfig)
    rows, columns = weight.shape
    size = group_size_for(columns, config.group_size)
    groups = columns // size
    qdata = allocate((rows, columns // 2), torch.uint8, target)
    scale = torch.empty((rows, groups), dtype=weight.dtype, device=compute)
    zero_point = torch.empty_like(scale)
    for chunk in row_chunks(weight, compute):
        part = fetch(weight[chunk], compute).float().view(-1, groups, size)
        low, step = fitted_range(part, weight.dtype)
        q = _steps(part - low.float().unsqueeze(-1), step).to(torch.uint8).view(-1, columns)
        store(qdata[chunk], q[:, ::2] | (q[:, 1::2] << 4))
        scale[chunk] = step
        zero_point[chunk] = low
    require_finite(scale)
    require_finite(zero_point)
    return Int4GroupTensor(qdata, scale.to(target), zero_point.to(target), size, weight.dtype)


@Int4GroupTensor.implements(aten.linear.default)
@Int4GroupTensor.implements_torch_function(torch.nn.functional.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    activation, weight, bias = operands(args, kwargs)
    if not weight.fp8_compute or activation.numel() == 0 or wants_gradient(activation):
        return run_dequantized(func, args, kwargs)
    rows, scale = quantize_shared_rows(activation, ZERO_ROW_BOUND)
    qdata, weight_scale = dequantize_int4_to_float8(weight.qdata, weight.scale, weight.zero_point)
    product = multiply_float8(rows, scale, qdata, weight_scale, bias, activation.dtype)
    return product.view(*activation.shape[:-1], qdata.shape[0])
