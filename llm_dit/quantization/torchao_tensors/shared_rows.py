"""Activations that several Linears read are quantized once.

An attention's q, k and v (and LTX-2's gate) get the same tensor one after the other. The last one that was quantized is kept for
as long as it lives, and taken again if it is the same object, unchanged, on the same stream; unchanged as torch counts it, which
writes through `.data`, another library's view of the memory or a raw kernel escape. Under `torch.inference_mode`, where
tensors do not count their changes, nothing is kept, and neither is it under a compiler, which shares such work itself.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from ..kernels import quantize_rows

Quantized = tuple[Tensor, Tensor]


class _Last(threading.local):
    """The tensor that this thread quantized last, what identifies its values, and the result."""

    source: weakref.ref[Tensor] | None = None
    state: tuple[object, ...] = ()
    result: Quantized | None = None

    def forget(self, source: weakref.ref[Tensor]) -> None:
        if self.source is source:
            self.source = self.result = None


_last = _Last()


def quantize_shared_rows(activation: Tensor, bound: float) -> Quantized:
    """`quantize_rows` of an activation of any rank, [..., K], as [M, K] and [M, 1]; see there."""
    if torch.compiler.is_compiling() or type(activation) is not Tensor or activation.is_inference():
        return quantize_rows(activation.reshape(-1, activation.shape[-1]), bound)
    state = (activation._version, bound, *_stream(activation))
    if _last.source is not None and _last.source() is activation and _last.state == state and _last.result is not None:
        return _last.result
    result = quantize_rows(activation.reshape(-1, activation.shape[-1]), bound)
    _last.source, _last.state, _last.result = weakref.ref(activation, _last.forget), state, result
    return result


def _stream(activation: Tensor) -> tuple[object, ...]:
    """What orders work on the tensor's device; a capture must not read what was made, and will be freed, outside of it."""
    if not activation.is_cuda:
        return ()
    # The number alone, as Triton asks for it: `torch.cuda.current_stream` takes seven times as long to make an object of it.
    return torch._C._cuda_getCurrentRawStream(activation.device.index), torch.cuda.is_current_stream_capturing()
