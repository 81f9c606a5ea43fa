"""Weight tensors: for every layout one file with its torchao configuration, handler and, where torchao has none, tensor class."""

from .float8 import Float8StreamConfig
from .int4 import Int4GroupConfig, Int4GroupTensor
from .int8 import Int8StreamConfig
from .int8_conv import Int8ConvConfig, Int8ConvTensor

__all__ = [
    "Float8StreamConfig",
    "Int4GroupConfig",
    "Int4GroupTensor",
    "Int8ConvConfig",
    "Int8ConvTensor",
    "Int8StreamConfig",
]
