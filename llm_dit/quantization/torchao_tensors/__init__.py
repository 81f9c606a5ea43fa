"""Weight tensors: for every layout one file with its torchao configuration, handler and, where torchao has none, tensor class.

The folder's name is not only for people: accelerate (1.15, `set_module_tensor_to_device`) moves a parameter as torchao's, and
not through a constructor that it takes for `nn.Parameter`'s, if the module that defines its class has "torchao" in its name.
Sequential offloading depends on it.
"""

from .float8 import Float8StreamConfig
from .fused import FusedFloat8Tensor, FusedInt8Tensor
from .int4 import Int4GroupConfig, Int4GroupTensor
from .int8 import Int8StreamConfig
from .int8_conv import Int8ConvConfig, Int8ConvTensor
from .static import StaticFloat8Tensor

__all__ = [
    "Float8StreamConfig",
    "FusedFloat8Tensor",
    "FusedInt8Tensor",
    "Int4GroupConfig",
    "Int4GroupTensor",
    "Int8ConvConfig",
    "Int8ConvTensor",
    "Int8StreamConfig",
    "StaticFloat8Tensor",
]
