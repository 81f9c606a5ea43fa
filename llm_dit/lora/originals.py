"""The weight of a layer before a LoRA was fused into it, and how to have it back bit for bit.

Fusing rounds: a quantized weight is dequantized, added to and quantized again, which costs about 3 dB, and undoing it by
subtraction costs as much again. So the sum starts from the weight in 16 bits, read again from the file that it was quantized
from, and unfusing quantizes that. Where there is no such file (the model was saved quantized, or read from an fp8 file) the
quantized weight is kept on the host, and put back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from ..checkpoints.again import Reader
from ..quantization.detect import FP8_DTYPES
from ..quantization.kernels import dequantize_rows
from ..quantization.sizes import plain_parts
from ..quantization.torchao_tensors.fused import FusedFloat8Tensor, FusedInt8Tensor
from ..quantization.torchao_tensors.requantize import requantize_

logger = logging.getLogger(__name__)


class Original(Protocol):
    """A weight as it was before anything was fused."""

    exact: ClassVar[bool]
    """True if `values` are those that were quantized, and not dequantized ones."""

    def values(self, weight: Tensor) -> Tensor:
        """[N, K] in the dtype that `weight` stands for, on the host or the device of `weight`."""

    def restore(self, weight: Tensor) -> None:
        """Puts the original back into the memory of `weight`."""


@dataclass
class FileOriginal:
    """Read again from a file, each time it is asked for."""

    read: Reader
    exact: ClassVar[bool] = True

    def values(self, weight: Tensor) -> Tensor:
        return self.read().to(stands_for(weight))

    def restore(self, weight: Tensor) -> None:
        requantize_(weight, self.values(weight))


class KeptOriginal:
    """The quantized weight, kept on the host."""

    exact: ClassVar[bool] = False

    def __init__(self, weight: Tensor) -> None:
        self._weight = _copied(weight, torch.device("cpu"))

    def values(self, weight: Tensor) -> Tensor:
        return dequantized(_copied(self._weight, weight.device))

    def restore(self, weight: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for ours, kept in zip(plain_parts(weight), plain_parts(self._weight), strict=True):
                ours.copy_(kept)


def original_of(weight: Tensor, readers: Iterable[Reader]) -> Original:
    """The original of `weight`, into which nothing is fused yet.

    A file counts only if quantizing what it holds gives the bits of `weight`: it may have been written anew since.
    """
    return next(_from_files(weight, readers), None) or KeptOriginal(weight)


def _from_files(weight: Tensor, readers: Iterable[Reader]) -> Iterator[Original]:
    for read in readers:
        original, again = FileOriginal(read), _copied(weight, weight.device)
        try:
            original.restore(again)
        except (OSError, ValueError, RuntimeError) as error:
            logger.debug("a weight cannot be read again: %s", error)
            continue
        if all(map(_same_bits, plain_parts(again), plain_parts(weight))):
            yield original


def dequantized(weight: Any) -> Tensor:
    """[N, K], of a quantized weight or one in raw float8."""
    if isinstance(weight, FusedFloat8Tensor | FusedInt8Tensor):  # torchao's own way passes through float32
        return dequantize_rows(weight.qdata, weight.scale, weight.dtype)
    values = weight.dequantize() if isinstance(weight, TorchAOBaseTensor) else weight
    return values.to(stands_for(weight))


def stands_for(weight: Any) -> torch.dtype:
    """The dtype that a weight was made from; raw float8 does not say, and is taken for bfloat16."""
    return torch.bfloat16 if weight.dtype in FP8_DTYPES else weight.dtype


def _copied(weight: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return weight.detach().clone() if weight.device == device else weight.detach().to(device)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
