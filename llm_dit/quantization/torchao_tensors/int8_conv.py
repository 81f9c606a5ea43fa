"""int8 convolution weights, one scale per output channel, rounded for inputs whose neighbours are alike.

torchao has no convolution that runs everywhere: its int8 tensors lack `aten.convolution`, its fp8 ones need a package
and sm100. A tensor subclass, and not a module, holds the weight, because the causal convolutions of the video VAEs
subclass `nn.Conv3d` with forwards of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.core.config import AOBaseConfig

from .base import DequantizedWeight, aten, run_dequantized, serializable
from .stream import register_weight_handler, require_finite, row_chunks

_MAX = 127
_ALIKE, _SHARED = 0.8, 0.9
"""Inputs of a convolution that lie d apart are taken to correlate by `_SHARED` * `_ALIKE` ** d, in each direction: 0.72, 0.58.
In the decoders of the tiny VAEs, on photographs, the median over the convolutions is 0.7 to 0.9, then 0.6 to 0.8 (the script is
not kept). The share that is an input's own bounds what is lost where they are not alike."""


@dataclass
class Int8ConvConfig(AOBaseConfig):
    """int8 convolution weights, symmetric.

    Attributes:
        transposed: the weight is [C_in, C_out / groups, ...], as of `nn.ConvTranspose*`; else [C_out, C_in / groups,
            ...].
        groups: of the convolution; a transposed one has the channels of its groups one after the other in C_in.
    """

    transposed: bool = False
    groups: int = 1


@serializable
class Int8ConvTensor(DequantizedWeight):
    """An int8 convolution weight: w = qdata * scale.

    Tensor attributes:
        qdata: int8, the shape of the weight.
        scale: float32, one for every output channel: [C_out, 1, ...] or, transposed, [1, C_out, 1, ...] and, in groups,
            [C_in, C_out / groups, 1, ...], where the rows of a group are the same.

    Non-tensor attributes:
        dtype: dtype of the weight that was quantized.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["dtype"]

    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8ConvTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, strides=qdata.stride(), device=qdata.device, dtype=dtype, requires_grad=False
        )

    def __init__(self, qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`; the product is rounded once, from float32."""
        return (self.qdata * self.scale).to(dtype or self.dtype)


def round_together(steps: Tensor) -> Tensor:
    """Rounds the taps of each kernel so that their errors cancel where neighbouring inputs are alike, as in pictures.

    This is GPTQ (arXiv:2210.17323, algorithm 1) without calibration: a correlation by distance stands in the place of measured
    inputs. Each tap is rounded, and those that are left make up for its error. Photographs come 2 to 7 dB nearer through the int8
    VAEs of the tiny models than with every tap rounded for itself; inputs without any correlation would lose 1.7 dB.

    Args:
        steps: [C_out, C_in, *kernel] float32, weights in units of their channel's step.

    Returns:
        As `steps`, in -127..127, int8.
    """
    carried = _carried(tuple(steps.shape[2:])).to(steps)
    rounded = torch.empty(steps.shape, dtype=torch.int8, device=steps.device)
    if steps.is_meta:  # 27 taps in a thousand small operators, of which none would do anything
        return rounded
    for part in row_chunks(steps, steps.device):
        # A tap's values lie beside each other, for they are rounded at once.
        taps = steps[part].flatten(2).flatten(0, 1).T.clone(memory_format=torch.contiguous_format)
        for index, tap in enumerate(taps):
            whole = tap.round().clamp_(-_MAX, _MAX)
            taps[index + 1 :].addr_(carried[index, index + 1 :], tap - whole, alpha=-1)
            tap.copy_(whole)
        rounded[part] = taps.T.reshape(steps[part].shape)
    return rounded


@functools.cache
def _carried(kernel: tuple[int, ...]) -> Tensor:
    """[T, T] of T taps: what of a tap's error each later one takes off; kept, and so not where a context would put it."""
    correlation = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for size in kernel:
        places = torch.arange(size, device="cpu")
        correlation = torch.kron(correlation, _ALIKE ** (places[:, None] - places).abs().double())
    correlation = (_SHARED * correlation).fill_diagonal_(1)
    factor = torch.linalg.cholesky(torch.linalg.inv(correlation), upper=True)
    return factor / factor.diagonal()[:, None]


@register_weight_handler(Int8ConvConfig)
def quantize_int8_conv(weight: Tensor, config: AOBaseConfig, target: torch.device, compute: torch.device) -> Tensor:
    """A convolution weight -> `Int8ConvTensor`; the largest of the video VAEs has 28 M weights, so it goes as a whole."""
    assert isinstance(config, Int8ConvConfig)
    values = weight.to(compute).float()
    groups = config.groups if config.transposed else 1
    channel = 2 if config.transposed else 1
    others = [dim for dim in range(1, values.ndim + 1) if dim != channel]
    largest = values.abs().unflatten(0, (groups, -1)).amax(dim=others, keepdim=True)
    if groups > 1:
        largest = largest.repeat_interleave(values.shape[0] // groups, dim=1)
    scale = largest.flatten(0, 1).clamp(min=torch.finfo(torch.float32).eps) / _MAX
    steps = values / scale
    # Of sound's samples neighbours may be opposite, and in a transposed convolution two taps seldom meet neighbours.
    of_pictures = steps.ndim > 3 and not config.transposed
    qdata = round_together(steps) if of_pictures else steps.round_().clamp_(-_MAX, _MAX).to(torch.int8)
    scale = scale.to(target)
    require_finite(scale)
    return Int8ConvTensor(qdata.to(target), scale, weight.dtype)


_FUNCTIONS = [F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]


@Int8ConvTensor.implements([aten.convolution.default])
@Int8ConvTensor.implements_torch_function(_FUNCTIONS)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return run_dequantized(func, args, kwargs)
