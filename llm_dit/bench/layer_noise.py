"""Where quantization hurts: per layer, the signal to noise ratio of its weight, and of its output on what really comes in.

The original weights are read again from the checkpoint, one at a time, while the quantized model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log10
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torchao.utils import TorchAOBaseTensor

from ..checkpoints.again import weights_of
from ..quantization.detect import FP8_DTYPES
from .picture_metrics import MOST_DB


@dataclass(frozen=True)
class LayerNoise:
    """One quantized Linear.

    Attributes:
        weight_db: 10 log10 of the energy of its weight over that of the weight's error.
        output_db: the same of its output, at its first call.
    """

    name: str
    weight_db: float
    output_db: float


@contextmanager
def layer_noise(model: nn.Module) -> Iterator[Callable[[], list[LayerNoise]]]:
    """While it lasts, the first call of every quantized Linear of `model` is compared; yields what reads the results off.

    A layer whose original cannot be read again is left out.
    """
    weights = weights_of(model)
    found: dict[str, LayerNoise] = {}
    handles = []
    for name, module in model.named_modules():
        reader = next(weights(f"{name}.weight"), None) if isinstance(module, nn.Linear) and _is_quantized(module) else None
        if reader is not None:
            handles.append(module.register_forward_hook(_comparer(name, reader, found)))
    try:
        yield lambda: sorted(found.values(), key=lambda layer: layer.output_db)
    finally:
        for handle in handles:
            handle.remove()


def _is_quantized(module: Any) -> bool:
    return isinstance(module.weight, TorchAOBaseTensor) or module.weight.dtype in FP8_DTYPES


def _comparer(name: str, read: Callable[[], Tensor], found: dict[str, LayerNoise]) -> Any:
    def compare(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if name in found:
            return
        original = read().to(output.device)
        held = module.weight.dequantize() if isinstance(module.weight, TorchAOBaseTensor) else module.weight
        expected = linear(inputs[0], original.to(inputs[0].dtype), module.bias)
        found[name] = LayerNoise(name, signal_to_noise(original, held), signal_to_noise(expected, output))

    return compare


def signal_to_noise(signal: Tensor, noisy: Tensor) -> float:
    """10 log10(|signal|^2 / |noisy - signal|^2), `MOST_DB` at the most."""
    signal, noisy = signal.detach().float(), noisy.detach().float()
    noise = float((noisy - signal).square().sum(dtype=torch.float64))
    energy = float(signal.square().sum(dtype=torch.float64))
    return MOST_DB if noise == 0 else min(10 * log10(max(energy, 1e-300) / noise), MOST_DB)
