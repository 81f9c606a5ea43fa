"""What the speed benchmark compares: for every implementation, what each of its methods does to a bf16 transformer.

To add a variant (int4 storage with fp8 compute, say), add a row to `PREPARE`, and its name to `FP8_MATMUL` if its
Linears multiply in fp8.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, quantize_

from ..compiling import compile_component
from ..quantization import METHODS, get_method, quantize_component, set_int4_compute
from ..quantization.filters import decide_layers
from ..quantization.torchao_tensors.int4 import GROUP_SIZE

Prepare = Callable[[nn.Module], nn.Module]
COMPILE_MODES: Final[Mapping[str, str]] = {"compile": "default", "graph": "cuda-graph", "eager-graph": "cuda-graph-eager"}
"""The mode of `compile_component` behind a mode of the benchmark; "eager" has none."""
MODES: Final = ("eager", *COMPILE_MODES)
FP8_MATMUL: Final = frozenset({"fp8-dynamic", "int4-fp8"})
"""Methods whose Linears multiply in fp8, for the floor."""


def _ours(method: str, model: nn.Module) -> nn.Module:
    return quantize_component(model, method, "transformer")[0]


def _int4_in_fp8(model: nn.Module) -> nn.Module:
    """int4 weights multiplied in fp8."""
    model = _ours("int4", model)
    set_int4_compute(model, "fp8")
    return model


def _stock_torchao(method: str, model: nn.Module) -> nn.Module:
    """Stock torchao on exactly the layers that llm-dit quantizes."""
    row = get_method(method)
    chosen = {id(layer.module) for layer in decide_layers(model, row, "transformer", "per-row") if layer.config is not None}
    if row.make_stock_config is not None:
        config: Any = row.make_stock_config("per-row")
    else:
        config = Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: id(module) in chosen)
    return model


def _layerwise(model: nn.Module) -> nn.Module:
    """Layerwise casting with the filter of diffusers itself."""
    cast: Any = model
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model


def _sdnq(model: nn.Module, **options: Any) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(model, torch_dtype=torch.bfloat16, **options)


_QUANTIZED: Final = tuple(method for method in METHODS if method != "none")

PREPARE: Final[Mapping[str, Mapping[str, Prepare]]] = {
    "llm-dit": {**{method: partial(_ours, method) for method in METHODS}, "int4-fp8": _int4_in_fp8},
    "torchao": {method: partial(_stock_torchao, method) for method in _QUANTIZED},
    "diffusers": {"layerwise": _layerwise},
    "sdnq": {
        "fp8-dynamic": partial(_sdnq, weights_dtype="float8_e4m3fn", use_quantized_matmul=True),
        "fp8-weight-only": partial(_sdnq, weights_dtype="float8_e4m3fn"),
        "int8-dynamic": partial(_sdnq, weights_dtype="int8", use_quantized_matmul=True),
        "int8": partial(_sdnq, weights_dtype="int8"),
        "int4": partial(_sdnq, weights_dtype="uint4", group_size=GROUP_SIZE),
    },
}
"""Implementation -> method -> what quantizes a bf16 transformer in place and returns it.

SDNQ comes last, because its import registers it with diffusers and transformers for the rest of the process.
"""

_MODES_OF: Final[Mapping[str, tuple[str, ...]]] = {"llm-dit": MODES, "torchao": ("eager", "compile")}
"""diffusers' casting hooks do not compile, and SDNQ compiles functions of its own: both are measured as they come."""


def exists(implementation: str, method: str, mode: str) -> bool:
    """Whether an implementation has the method and is measured in the mode."""
    return method in PREPARE[implementation] and mode in _MODES_OF.get(implementation, ("eager",))


def available_implementations() -> tuple[str, ...]:
    """All implementations that are installed."""
    return tuple(name for name in PREPARE if name != "sdnq" or importlib.util.find_spec("sdnq"))


def method_names() -> tuple[str, ...]:
    """Every method that some implementation has."""
    return tuple(dict.fromkeys(method for methods in PREPARE.values() for method in methods))


def activate(model: nn.Module, mode: str) -> None:
    """Puts a prepared model into a mode; compiling and capturing happen in its first call."""
    if mode in COMPILE_MODES:
        compile_component(model, COMPILE_MODES[mode])
