"""The quantization methods: one row each, and nothing about a method stands anywhere else but its name (`llm_dit.names`).

A method says which torchao configuration quantizes a layer (ours, which works in chunks of rows and cannot produce
NaN), which stock configuration describes the result to plain diffusers and transformers, and which layers it cannot
take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
)

from ..names import method_name
from .torchao_tensors.float8 import Float8StreamConfig
from .torchao_tensors.fused import ZERO_ROW_BOUND
from .torchao_tensors.int4 import SMALLEST_GROUP, Int4GroupConfig, Int4GroupTensor
from .torchao_tensors.int8 import Int8StreamConfig
from .torchao_tensors.int8_conv import Int8ConvTensor

_TORCHAO_GRANULARITY: Final = {"per-row": PerRow, "per-tensor": PerTensor}


@dataclass(frozen=True)
class Method:
    """One quantization method.

    Attributes:
        name: the string users write.
        bytes_per_weight: storage of one quantized weight, scales excluded.
        make_config: from a granularity, the torchao configuration that our handlers take; None leaves the model as it
            is.
        make_stock_config: from a granularity, the stock torchao configuration that a saved folder records, or None
            where torchao has no stock tensor for the layout.
        holds: whether a quantized weight is one of this method's.
        fp8: True where the weights are float8, which wants compute capability 8.9 on CUDA.
        quantizes_activations: True where activations are quantized as well, and multiplied so.
        dims_multiple_of: both dimensions of a Linear must be divisible by this.
        in_features_multiple_of: in_features of a Linear must be divisible by this.
        compile_note: what `torch.compile` users should know, or "".
    """

    name: str
    bytes_per_weight: float
    make_config: Callable[[str], AOBaseConfig] | None = None
    make_stock_config: Callable[[str], AOBaseConfig] | None = None
    holds: Callable[[Tensor], bool] = lambda weight: False
    fp8: bool = False
    quantizes_activations: bool = False
    dims_multiple_of: int = 1
    in_features_multiple_of: int = 1
    compile_note: str = ""

    def __reduce__(self) -> tuple[Callable[[str], Method], tuple[str]]:
        """Pickled and copied by name: there is one of each."""
        return get_method, (self.name,)


_ROWS: Final = (
    Method("none", 2),
    Method(
        "fp8-dynamic",
        1,
        make_config=lambda granularity: Float8StreamConfig(granularity=granularity, dynamic=True),
        make_stock_config=lambda granularity: Float8DynamicActivationFloat8WeightConfig(
            granularity=_TORCHAO_GRANULARITY[granularity](),
            activation_value_lb=ZERO_ROW_BOUND,
            set_inductor_config=False,
        ),
        holds=lambda weight: isinstance(weight, Float8Tensor) and weight.act_quant_kwargs is not None,
        fp8=True,
        quantizes_activations=True,
        dims_multiple_of=16,
        compile_note="fp8-dynamic uses autotune, which is incompatible with reduce-overhead",
    ),
    Method(
        "fp8-weight-only",
        1,
        make_config=lambda granularity: Float8StreamConfig(granularity=granularity, dynamic=False),
        make_stock_config=lambda granularity: Float8WeightOnlyConfig(
            granularity=_TORCHAO_GRANULARITY[granularity](), set_inductor_config=False
        ),
        holds=lambda weight: isinstance(weight, Float8Tensor) and weight.act_quant_kwargs is None,
        fp8=True,
        dims_multiple_of=16,
    ),
    Method(
        "int8",
        1,
        make_config=lambda granularity: Int8StreamConfig(),
        make_stock_config=lambda granularity: Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False),
        holds=lambda weight: (
            isinstance(weight, Int8Tensor | Int8ConvTensor) and getattr(weight, "act_quant_kwargs", None) is None
        ),
    ),
    Method(
        "int4",
        0.5,
        make_config=lambda granularity: Int4GroupConfig(),
        holds=lambda weight: isinstance(weight, Int4GroupTensor),
        in_features_multiple_of=SMALLEST_GROUP,
    ),
)

METHODS: Final[Mapping[str, Method]] = {row.name: row for row in _ROWS}


def recorded_method(quantization: Mapping[str, Any]) -> str | None:
    """The method that a saved component's quantization_config names, by itself or by torchao's configuration, or None."""
    if quantization.get("method") in METHODS:
        return str(quantization["method"])
    recorded = json.dumps(quantization, default=str)  # of a loaded model, another library's may hold objects
    stock = {row.name: type(row.make_stock_config("per-row")).__name__ for row in _ROWS if row.make_stock_config}
    return next((name for name, kind in stock.items() if f'"{kind}"' in recorded), None)


def weights_method(model: nn.Module) -> str | None:
    """The method of the first quantized weight of `model`, or None where there is none of a method's."""
    found = (method.name for weight in model.parameters() for method in _ROWS if method.holds(weight))
    return next(found, None)


def get_method(name: str, where: str = "quantization method") -> Method:
    """The row of `name`, aliases resolved.

    Args:
        name: one of `VALID_METHODS`, or an alias.
        where: what the error names as the place of a wrong value.

    Raises:
        ValueError: for a removed name, with its replacement, or an unknown one, with the nearest valid one.
    """
    return METHODS[method_name(name, where)]
