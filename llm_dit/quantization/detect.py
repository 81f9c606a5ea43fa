"""Recognizing models that arrive quantized, by us or by any other library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

FP8_DTYPES: Final = (torch.float8_e4m3fn, torch.float8_e5m2)

_FOREIGN_PACKAGES: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes",
    "optimum.quanto": "quanto",
    "sdnq": "SDNQ",
    "diffusers.quantizers.gguf": "GGUF",
    "diffusers.quantizers.bfl": "BFL fp8",
    "nunchaku": "nunchaku",
    "modelopt": "modelopt",
    "gguf": "GGUF",
}


def quantized_by(model: nn.Module) -> str | None:
    """Which library or format quantized `model`, or None.

    Recognizes torchao tensor subclasses (ours included), raw float8 parameters, and the parameters or modules of
    bitsandbytes, quanto, SDNQ, GGUF and others by the package that defines them.
    """
    kinds = dict.fromkeys(type(module) for module in model.modules())
    tensors = dict.fromkeys((type(tensor), tensor.dtype) for tensor in model.parameters())
    found = (*(_foreign(kind) for kind in kinds), *(_quantized_tensor(*tensor) for tensor in tensors))
    return next((library for library in found if library is not None), None)


def _quantized_tensor(kind: type[Tensor], dtype: torch.dtype) -> str | None:
    if issubclass(kind, TorchAOBaseTensor):
        return "torchao"
    if dtype in FP8_DTYPES:
        return "raw float8"
    # Older torchao tensors (NF4Tensor) are no TorchAOBaseTensor.
    if kind.__module__.startswith("torchao."):
        return "torchao"
    return _foreign(kind)


def _foreign(kind: type) -> str | None:
    for base in kind.__mro__:
        for package, library in _FOREIGN_PACKAGES.items():
            if base.__module__ == package or base.__module__.startswith(package + "."):
                return library
    return None
