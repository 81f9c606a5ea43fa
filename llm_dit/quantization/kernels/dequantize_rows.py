"""float8 and int8 weights with one scale per row, back to 16 bits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .support import HAS_TRITON, on_device, runs_kernels, tl, triton

_BLOCK: Final = 4096
"""Elements of a row that one program converts: 16 bytes a load and thread with 8 warps."""


def dequantize_rows_reference(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `dequantize_rows`; in PyTorch."""
    return (quantized.float() * scale).to(dtype)


if HAS_TRITON:

    @triton.jit
    def _dequantize_rows_kernel(quantized, scales, weights, columns, scale_stride, block: tl.constexpr):
        row = tl.program_id(1).to(tl.int64)
        offsets = tl.program_id(0) * block + tl.arange(0, block)
        inside = offsets < columns
        values = tl.load(quantized + row * columns + offsets, mask=inside).to(tl.float32)
        scale = tl.load(scales + row * scale_stride)
        tl.store(weights + row * columns + offsets, values * scale, mask=inside)


def dequantize_rows(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `quantized` and `scale` stand for.

    Args:
        quantized: [N, K] float8_e4m3fn or int8.
        scale: [N, 1], or [1, 1] for all rows, float32.
        dtype: dtype of the result.

    Returns:
        [N, K], each element rounded once, from float32.
    """
    count, columns = quantized.shape
    grid_limit = 65535  # rows lie along the grid's second dimension, whose size CUDA limits
    if not (0 < count <= grid_limit and columns > 0 and quantized.is_contiguous() and runs_kernels(quantized)):
        return dequantize_rows_reference(quantized, scale, dtype)
    weights = torch.empty((count, columns), dtype=dtype, device=quantized.device)
    stride = scale.stride(0) if scale.shape[0] > 1 else 0
    grid = (triton.cdiv(columns, _BLOCK), count)
    with on_device(quantized):
        _dequantize_rows_kernel[grid](quantized, scale, weights, columns, stride, _BLOCK, num_warps=8)
    return weights
