"""Stock torchao weights that multiply through our kernels while they are in memory.

`FusedFloat8Tensor` and `FusedInt8Tensor` hold exactly what torchao's classes hold and are those classes in every other respect;
only their Linear differs. On disk they are torchao's (`as_stock`), so that plain diffusers loads them, and what was loaded as
torchao's becomes ours (`as_fused`), without a copy either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor

from ..kernels import dequantize_rows
from .base import aten, complete
from .shared_rows import quantize_shared_rows

ZERO_ROW_BOUND: Final = 1e-12
"""Floor of the absolute maximum behind a scale. torchao's own users settled on it; 1e-12 / 448 is a normal float32."""


_HALF_BOUND: Final = 2.0**-14
"""The same floor in float16: its smallest normal number, because torchao clamps in the dtype of the input."""


_INT8PACK_MULTIPLE: Final = 16


def zero_row_bound(dtype: torch.dtype) -> float:
    """The floor for activations of that dtype."""
    return _HALF_BOUND if dtype == torch.float16 else ZERO_ROW_BOUND


@complete
class FusedFloat8Tensor(Float8Tensor):
    """A float8 weight [N, K] with one scale per row; attributes as in `Float8Tensor`.

    With `act_quant_kwargs` the activations are quantized row by row in one kernel and multiplied on the tensor cores, the bias
    added by the multiplication; without, the weight is dequantized in one kernel.
    """


@complete
class FusedInt8Tensor(Int8Tensor):
    """An int8 weight [N, K] with one scale per row; attributes as in `Int8Tensor`. It is dequantized in one kernel."""


def as_fused(weight: Any) -> Any:
    """`weight` as one of the classes above if our kernels can multiply it, else `weight` itself; the data are shared."""
    if type(weight) is Float8Tensor and _one_scale_per_row(weight):
        return FusedFloat8Tensor(*_attributes(weight))
    if type(weight) is Int8Tensor and _one_scale_per_row(weight) and weight.act_quant_kwargs is None:
        return FusedInt8Tensor(*_attributes(weight))
    return weight


def as_stock(weight: Any) -> Any:
    """The torchao tensor behind one of the classes above, sharing its data; any other tensor unchanged."""
    stock = _STOCK.get(type(weight))
    return stock(*_attributes(weight)) if stock is not None else weight


def fuse_weights(model: nn.Module) -> None:
    """Makes the stock weights of a model that was just loaded multiply through our kernels, in place."""
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Linear) and isinstance(weight, TorchAOBaseTensor):
                fused = as_fused(weight)
                if fused is not weight:
                    module._parameters["weight"] = nn.Parameter(fused, requires_grad=False)


_STOCK: Final[Mapping[type, type]] = {FusedFloat8Tensor: Float8Tensor, FusedInt8Tensor: Int8Tensor}


def _one_scale_per_row(weight: Any) -> bool:
    return weight.ndim == 2 and list(weight.block_size) == [1, weight.shape[1]] and weight.scale.shape[1] == 1


def _attributes(weight: Any) -> tuple[Any, ...]:
    if isinstance(weight, Float8Tensor):
        return (
            weight.qdata,
            weight.scale,
            weight.block_size,
            weight.mm_config,
            weight.act_quant_kwargs,
            weight.kernel_preference,
            weight.dtype,
        )
    return (weight.qdata, weight.scale, weight.block_size, weight.dtype, weight.zero_point)


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> tuple[Tensor, Any, Tensor | None]:
    """(input, weight, bias) of a call of `linear`."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
    return given["input"], given["weight"], given.get("bias")


@FusedFloat8Tensor.implements(aten.linear.default)
@FusedFloat8Tensor.implements_torch_function(F.linear)
def _(func: Callable[..., Tensor], types: Any, args: Any, kwargs: Any) -> Tensor:
    activation, weight, bias = operands(args, kwargs)
    trained = wants_gradient(activation)
    if not activation.is_cuda and not trained:
        return F.linear(activation, as_stock(weight), bias)
    if weight.act_quant_kwargs is None or trained:
        return F.linear(activation, dequantize_rows(weight.qdata, weight.scale, activation.dtype), bias)
    if activation.numel() == 0:
        return activation.new_zeros((*activation.shape[:-1], weight.shape[0]))
    rows, scale = quantize_shared_rows(activation, ZERO_ROW_BOUND)
    product = multiply_float8(rows, scale, weight.qdata, weight.scale, bias, activation.dtype)
    return product.view(*activation.shape[:-1], weight.qdata.shape[0])


def wants_gradient(activation: Tensor) -> bool:
    """True where a product has to be differentiable, as in training a LoRA: products of float8 are not, and in CUDA's kernels for
    activations the gradient would be lost without a word. Such products are those of dequantized weights, in 16 bits.
    """
    return torch.is_grad_enabled() and activation.requires_grad


def multiply_float8(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """rows @ weight.T + bias on the tensor cores.

    Args:
        rows, row_scale: [M, K] float8 and [M, 1] float32.
        weight, weight_scale: [N, K] float8 and [N, 1] float32; N and K are divisible by 16.
        dtype: dtype of the result and the bias; row scales want bfloat16.
    """
    return torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=row_scale,
        scale_b=weight_scale.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


@FusedInt8Tensor.implements(aten.linear.default)
@FusedInt8Tensor.implements_torch_function(F.linear)
def _(func: Callable[..., Tensor], types: Any, args: Any, kwargs: Any) -> Tensor:
    activation, weight, bias = operands(args, kwargs)
    # Compiled for the CPU, torchao's product of raw int8 becomes `_weight_int8pack_mm`, which reads beyond rows that are not a
    # multiple of 16 long (torch 2.13: a segmentation fault; a check in that operator would remove this).
    overruns = weight.shape[1] % _INT8PACK_MULTIPLE != 0 and torch.compiler.is_compiling()
    if not activation.is_cuda and not overruns:
        return F.linear(activation, as_stock(weight), bias)
    return F.linear(activation, dequantize_rows(weight.qdata, weight.scale, activation.dtype), bias)
