"""int4 weights in asymmetric groups, to 16 bits, or to float8 for a multiplication on the tensor cores."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .quantize_rows import FLOAT8_MAX
from .support import HAS_TRITON, on_device, power_of_two, runs_kernels, tl, triton

_BLOCK: Final = 2048
"""Packed bytes of a row that one program converts."""
_LEAST: Final = 5.26631e-36
"""Floor of a row's largest value: float32's smallest normal number times 448, so that its scale is a normal number."""
_MOST_GROUPS: Final = 4096
"""Groups of a row that a program holds in registers for the row's scale."""


def dequantize_int4_reference(qdata: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """See `dequantize_int4`; in PyTorch, computed in the dtype of the scales."""
    rows, groups = scale.shape
    nibbles = torch.stack((qdata & 0xF, qdata >> 4), dim=-1).view(rows, groups, -1)
    weight = torch.addcmul(zero_point.unsqueeze(-1), nibbles.to(scale.dtype), scale.unsqueeze(-1))
    return weight.view(rows, -1).to(dtype)


def row_scale(scale: Tensor, zero_point: Tensor) -> Tensor:
    """[N, 1] float32: the largest absolute value that a row can stand for, over 448."""
    low, high = zero_point.float(), zero_point.float() + 15 * scale.float()
    largest = torch.maximum(low.abs(), high.abs()).amax(dim=1, keepdim=True)
    return largest.clamp(min=_LEAST) / FLOAT8_MAX


def dequantize_int4_to_float8_reference(qdata: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor) -> Tensor:
    """See `dequantize_int4_to_float8`; in PyTorch."""
    weight = dequantize_int4_reference(qdata, scale.float(), zero_point.float(), torch.float32)
    return (weight / rows).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


if HAS_TRITON:

    @triton.jit
    def _dequantize_int4_kernel(
        qdata,
        scales,
        zero_points,
        row_scales,
        weights,
        packed,
        groups,
        half_group,
        scaled: tl.constexpr,
        row_groups: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.program_id(1).to(tl.int64)
        offsets = tl.program_id(0) * block + tl.arange(0, block)
        inside = offsets < packed
        pairs = tl.load(qdata + row * packed + offsets, mask=inside, other=0)
        group = row * groups + offsets // half_group
        scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zero_points + group, mask=inside, other=0.0).to(tl.float32)
        low = (pairs & 0xF).to(tl.float32) * scale + zero
        high = (pairs >> 4).to(tl.float32) * scale + zero
        both = tl.interleave(low, high)
        places = tl.program_id(0) * block * 2 + tl.arange(0, block * 2)
        if scaled:
            # The row's scale, as `row_scale` computes it: from all its groups, by every program that has a part of the row.
            each = tl.arange(0, row_groups)
            lowest = tl.load(zero_points + row * groups + each, mask=each < groups, other=0.0).to(tl.float32)
            steps = tl.load(scales + row * groups + each, mask=each < groups, other=0.0).to(tl.float32)
            largest = tl.max(tl.maximum(tl.abs(lowest), tl.abs(lowest + 15.0 * steps)), axis=0)
            row_scale = tl.div_rn(tl.maximum(largest, 5.26631e-36), 448.0)
            tl.store(row_scales + row, row_scale)
            both = tl.clamp(both / row_scale, -448.0, 448.0)
        tl.store(weights + row * packed * 2 + places, both.to(weights.dtype.element_ty), mask=places < packed * 2)


def _launch(qdata: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor | None, weights: Tensor) -> Tensor:
    count, packed = qdata.shape
    groups = scale.shape[1]
    block = min(_BLOCK, power_of_two(packed))
    grid = (triton.cdiv(packed, block), count)
    with on_device(qdata):
        _dequantize_int4_kernel[grid](
            qdata,
            scale,
            zero_point,
            rows,
            weights,
            packed,
            groups,
            packed // groups,
            rows is not None,
            power_of_two(groups),
            block,
            num_warps=8,
        )
    return weights


def _launchable(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    contiguous = qdata.is_contiguous() and scale.is_contiguous() and zero_point.is_contiguous()
    return contiguous and 0 < qdata.shape[0] <= 65535 and runs_kernels(qdata)


def dequantize_int4(qdata: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that packed nibbles stand for: w[n, k] = q[n, k] * scale[n, k // G] + zero_point[n, k // G].

    Args:
        qdata: [N, K / 2] uint8; weight 2i in the low nibble of byte i, weight 2i + 1 in the high one.
        scale, zero_point: [N, K / G], a 16- or 32-bit float; G is even.
        dtype: dtype of the result.

    Returns:
        [N, K]; on a GPU computed in float32, in PyTorch in the dtype of the scales.
    """
    if not _launchable(qdata, scale, zero_point):
        return dequantize_int4_reference(qdata, scale, zero_point, dtype)
    weights = torch.empty((qdata.shape[0], qdata.shape[1] * 2), dtype=dtype, device=qdata.device)
    return _launch(qdata, scale, zero_point, None, weights)


def dequantize_int4_to_float8(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The same weight as float8 with one scale per row.

    Returns:
        (weight, row scale): [N, K] float8_e4m3fn and [N, 1] float32.
    """
    if not _launchable(qdata, scale, zero_point) or scale.shape[1] > _MOST_GROUPS:
        rows = row_scale(scale, zero_point)
        return dequantize_int4_to_float8_reference(qdata, scale, zero_point, rows), rows
    rows = torch.empty((qdata.shape[0], 1), dtype=torch.float32, device=qdata.device)
    weights = torch.empty((qdata.shape[0], qdata.shape[1] * 2), dtype=torch.float8_e4m3fn, device=qdata.device)
    return _launch(qdata, scale, zero_point, rows, weights), rows
