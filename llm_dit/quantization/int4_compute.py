"""int4 storage multiplied in float8: the compression of int4 at more than the speed of bf16, on cards with fp8 tensor cores."""

from __future__ import annotations

import torch
from torch import nn

from ..names import check_name
from .hardware import cpu_multiplies_row_scaled_fp8, detect_hardware
from .torchao_tensors.int4 import Int4GroupTensor

COMPUTES = ("16-bit", "fp8")


def set_int4_compute(model: nn.Module, compute: str) -> int:
    """Chooses how the int4 weights of `model` are multiplied, in place and at any time; a saved model keeps the choice.

    Args:
        compute: "16-bit" (every int4 weight's default), or "fp8": weights are dequantized to float8 and multiplied on the tensor
            cores with activations quantized row by row, which adds the error of fp8.

    Returns:
        How many weights it was set for; those with a dimension that is not divisible by 16 stay at 16 bits.

    Raises:
        ValueError: for another name, a model without int4 weights that fit or that does not compute in bfloat16, or fp8 on a
            device that cannot multiply it.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 64, dtype=torch.bfloat16))
        >>> model, _ = quantize_component(model, "int4", "transformer")
        >>> set_int4_compute(model, "fp8")
        1
    """
    check_name(compute, COMPUTES, "int4 compute")
    hardware = detect_hardware()
    if compute == "fp8" and not (hardware.has_fp8 or (hardware.capability is None and cpu_multiplies_row_scaled_fp8())):
        raise ValueError(f"int4 with fp8 compute needs fp8 matrix multiplication, and {hardware.name} has none: use '16-bit'")
    weights = [weight for weight in model.parameters() if isinstance(weight, Int4GroupTensor)]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no int4 weights: quantize it with 'int4' first")
    others = {weight.dtype for weight in weights} - {torch.bfloat16}
    if compute == "fp8" and others:
        raise ValueError(
            f"int4 with fp8 compute gives bfloat16, and {type(model).__name__} computes in {others.pop()}: load it in bfloat16"
        )
    fitting = [weight for weight in weights if all(size % 16 == 0 for size in weight.shape)]
    if compute == "fp8" and not fitting:
        raise ValueError(
            f"none of the {len(weights)} int4 weights of {type(model).__name__} can be set: fp8 takes multiples of 16"
        )
    for weight in fitting:
        weight.fp8_compute = compute == "fp8"
    return len(fitting)
