"""Quantizing in chunks of rows, on one device, into storage on another.

torchao's `from_hp` needs 8 (int8) to 15 (fp8) bytes of scratch per element for the whole weight at once, which is 0.8
GB for the largest Linear of a 6 GB transformer and 2 GiB for FLUX.2. Rows are independent under per-row scales, so a
chunk of rows gives the same bits with the scratch of a chunk.

A handler registered with :func:`register_weight_handler` serves both ways of quantizing: torchao's `quantize_` (a
module that is in memory) and a loader (a tensor that was just read, to be held on `target`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from ..hardware import current_device
from .host_pages import HUGE_PAGE, advise_huge_pages
from .staging import drain_staging, staging_for

CHUNK_ELEMENTS = {"cpu": 512 * 1024}
"""Elements quantized at a time on a kind of device. On the CPU a chunk's scratch (8 MB) stays in the cache, and glibc reuses one
hole in its heap for it; larger chunks left holes between the results, which doubled the peak of a load."""
GPU_CHUNK_ELEMENTS = 8 * 1024 * 1024
"""The same on every other device: about 100 MB of scratch at 12 bytes each, and few enough launches."""


class WeightQuantizer(Protocol):
    """Turns a weight into its quantized tensor; see :func:`quantize_weight` for the arguments."""

    def __call__(self, weight: Tensor, config: AOBaseConfig, target: torch.device, compute: torch.device) -> Tensor: ...


_QUANTIZERS: dict[type[AOBaseConfig], WeightQuantizer] = {}


def row_chunks(weight: Tensor, compute: torch.device) -> Iterator[slice]:
    """Slices of dimension 0 of `weight` ([N, ...]) of the size that suits `compute`; one slice for all on meta."""
    rows = weight.shape[0]
    elements = CHUNK_ELEMENTS.get(compute.type, GPU_CHUNK_ELEMENTS)
    step = rows if weight.is_meta else max(1, elements // max(1, math.prod(weight.shape[1:])))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(start + step, rows))


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result, not yet written; on the host in huge pages where the system has them.

    New host memory costs a fault per page at its first write: two million faults of 4 KiB for a model of 8 GB.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and tensor.numel() * tensor.element_size() >= HUGE_PAGE:
        advise_huge_pages(tensor)
    return tensor


def fetch(part: Tensor, compute: torch.device) -> Tensor:
    """A chunk of a weight on the device that quantizes it."""
    if compute.type == "cuda" and part.device.type == "cpu":
        return staging_for(compute).upload(part)
    return part.to(compute)


def store(destination: Tensor, part: Tensor) -> None:
    """Writes a quantized chunk into its place in `destination`, on whatever device that is.

    On the host it has arrived after `drain_staging`, and not before.
    """
    if part.device.type == "cuda" and destination.device.type == "cpu":
        staging_for(part.device).download(part, destination)
    else:
        destination.copy_(part)


def quantize_weight(weight: Tensor, config: AOBaseConfig, target: torch.device | str | None = None, wait: bool = True) -> Tensor:
    """Quantizes one weight as `config` says.

    Args:
        weight: the weight, [N, K] of a Linear or [C_out, C_in, ...] of a convolution, on any device.
        config: one of the configurations of this package.
        target: the device that holds the result; by default the weight's own. A weight bound for the CPU is quantized
            on the GPU where there is one, chunk by chunk, which takes a fraction of the time and one chunk of its memory.
        wait: return when all of the result is in its place. A loader says False, and calls `drain_staging` after its last weight:
            the end of one weight is then still on its way to the host while the next is read.

    Raises:
        ValueError: if the weight holds NaN or infinity.
    """
    held_on = torch.device(target) if target is not None else weight.device
    compute = current_device() if held_on.type == "cpu" else held_on
    with torch.inference_mode(False), torch.no_grad():
        quantized = _QUANTIZERS[type(config)](weight.detach(), config, held_on, compute)
        if wait:
            drain_staging()
        return quantized


def register_weight_handler(config_type: type[AOBaseConfig]) -> Callable[[WeightQuantizer], WeightQuantizer]:
    """Registers a `WeightQuantizer` for `config_type`, with torchao's `quantize_` too."""

    def decorator(quantizer: WeightQuantizer) -> WeightQuantizer:
        _QUANTIZERS[config_type] = quantizer

        @register_quantize_module_handler(config_type)
        def handler(module: nn.Module, config: AOBaseConfig, *, parameter_name: str = "weight") -> nn.Module:
            quantized = quantize_weight(getattr(module, parameter_name), config)
            with torch.inference_mode(False):
                setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
            return module

        return quantizer

    return decorator


def require_finite(scale: Tensor) -> None:
    """Raises ValueError unless every scale is finite: NaN or infinity in a weight ends up in its scale."""
    if not scale.is_meta and not bool(torch.isfinite(scale).all()):
        raise ValueError("the weight holds NaN or infinity")
