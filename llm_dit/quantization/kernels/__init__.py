"""Fused kernels for quantized Linears: for every kernel one file, with a Triton version and the PyTorch reference beside it.

Eager PyTorch reads and writes memory once for each element-wise step of a quantization, three to five times in all, which is
why quantized Linears are slower than bf16 without a compiler. Each kernel here does it in one pass. The reference is what runs
on the CPU, without Triton, on AMD, and under `torch.compile`, whose own fusion takes it into the neighbouring operations.
"""

from .dequantize_int4 import dequantize_int4, dequantize_int4_to_float8
from .dequantize_rows import dequantize_rows
from .quantize_rows import quantize_rows

__all__ = ["dequantize_int4", "dequantize_int4_to_float8", "dequantize_rows", "quantize_rows"]
