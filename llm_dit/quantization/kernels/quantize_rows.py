"""Activations to float8 with one scale per row, as `torch._scaled_mm` multiplies them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .support import HAS_TRITON, on_device, power_of_two, runs_kernels, tl, triton

FLOAT8_MAX: Final = torch.finfo(torch.float8_e4m3fn).max
LARGEST_ROW: Final = 65536
"""A row is held in the registers of one program; longer rows would spill, and take the reference."""


def quantize_rows_reference(rows: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """See `quantize_rows`; in PyTorch."""
    values = rows.float()
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=bound) / FLOAT8_MAX
    # One division a row and not one a value, and nothing to clamp: rounding takes no product beyond 448 (1 + 2^-22), which is 448
    # in float8. What a value costs here decides the time of a compiled GELU or norm, with which inductor fuses it.
    quantized = (values * (1.0 / scale)).to(torch.float8_e4m3fn)
    return quantized.contiguous(), scale.contiguous()


if HAS_TRITON:

    @triton.jit
    def _quantize_rows_kernel(
        rows,
        quantized,
        scales,
        row_stride,
        columns,
        bound,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        offsets = tl.arange(0, block)
        inside = offsets < columns
        values = tl.load(rows + row * row_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(values), axis=0), bound)
        # Divisions that round as PyTorch's do: the bits are the reference's.
        scale = tl.div_rn(largest, 448.0)
        scaled = values * tl.div_rn(1.0, scale)
        tl.store(quantized + row * columns + offsets, scaled.to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)


def quantize_rows(rows: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Quantizes each row by its largest absolute value.

    Args:
        rows: [M, K], bfloat16, float16 or float32; the elements of a row must lie side by side on a GPU.
        bound: floor of the largest absolute value, so that rows of zeros stay zeros.

    Returns:
        (quantized, scale): [M, K] float8_e4m3fn, and [M, 1] float32 with rows == quantized * scale within rounding.
    """
    count, columns = rows.shape
    if count == 0 or not 0 < columns <= LARGEST_ROW or rows.stride(1) != 1 or not runs_kernels(rows):
        return quantize_rows_reference(rows, bound)
    quantized = torch.empty((count, columns), dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty((count, 1), dtype=torch.float32, device=rows.device)
    block = power_of_two(columns)
    warps = min(16, max(1, block // 1024))
    with on_device(rows):
        _quantize_rows_kernel[(count,)](rows, quantized, scales, rows.stride(0), columns, bound, block, num_warps=warps)
    return quantized, scales
