"""Where the Triton kernels run, asked in one place."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = tl = None

HAS_TRITON: Final = triton is not None
INTERPRETED: Final = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on the CPU, for tests; read when the kernels are made, as Triton does."""
KERNEL_CAPABILITY: Final = (8, 0)
"""Triton has no bfloat16 arithmetic below Ampere."""


@cache
def _device_runs_kernels(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= KERNEL_CAPABILITY


def runs_kernels(tensor: Tensor) -> bool:
    """True if kernels are launched for `tensor`: on a CUDA device of capability 8.0 or newer, outside of compilation.

    A compiler traces with fake tensors, which are subclasses; it gets the reference, and fuses it with what is around it.
    """
    if not HAS_TRITON or type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    if tensor.is_cuda:
        return _device_runs_kernels(tensor.device.index or 0)
    return INTERPRETED


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, and a tensor may be on another."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`; Triton's block sizes are such."""
    return 1 << (count - 1).bit_length()


__all__ = ["HAS_TRITON", "INTERPRETED", "on_device", "power_of_two", "runs_kernels", "tl", "triton"]
