"""torchao's weights under our kernels: the same data, and torchao's own classes again on disk."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor

from llm_dit.quantization.torchao_tensors import (
    Float8StreamConfig,
    FusedFloat8Tensor,
    FusedInt8Tensor,
    Int4GroupConfig,
    Int8ConvConfig,
    Int8StreamConfig,
    StaticFloat8Tensor,
)
from llm_dit.quantization.torchao_tensors.fused import as_fused, as_stock, fuse_weights
from llm_dit.quantization.torchao_tensors.stream import quantize_weight

CONFIGS = {
    "fp8-dynamic": Float8StreamConfig(dynamic=True),
    "fp8-weight-only": Float8StreamConfig(),
    "int8": Int8StreamConfig(),
    "int4": Int4GroupConfig(),
}


def weight(config, rows=64, columns=128):
    generator = torch.Generator().manual_seed(0)
    return quantize_weight(torch.randn(rows, columns, generator=generator).to(torch.bfloat16), config)


@pytest.mark.parametrize(
    ("name", "fused", "stock"), [("fp8-dynamic", FusedFloat8Tensor, Float8Tensor), ("int8", FusedInt8Tensor, Int8Tensor)]
)
def test_both_ways_without_a_copy(name, fused, stock):
    ours = weight(CONFIGS[name])
    assert type(ours) is fused
    theirs = as_stock(ours)
    assert type(theirs) is stock
    assert theirs.qdata.data_ptr() == ours.qdata.data_ptr()
    again = as_fused(theirs)
    assert type(again) is fused
    assert again.qdata.data_ptr() == ours.qdata.data_ptr()
    inputs = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(F.linear(inputs, ours), F.linear(inputs, theirs))


def static(values):
    ours = quantize_weight(values, Float8StreamConfig(dynamic=True))
    return StaticFloat8Tensor(ours.qdata, ours.scale, torch.full((1, 1), 0.01), torch.bfloat16)


def int4_in_fp8(values):
    ours = quantize_weight(values, Int4GroupConfig())
    ours.fp8_compute = True
    return ours


@pytest.mark.parametrize(
    "make", [*(lambda values, c=config: quantize_weight(values, c) for config in CONFIGS.values()), static, int4_in_fp8]
)
def test_gradients_pass_to_the_inputs(make):
    """As training a LoRA wants them, through products that are not differentiable too: those of the dequantized weight."""
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ours, outer = make(values), torch.randn(3, 64, dtype=torch.bfloat16)
    inputs = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    F.linear(inputs, ours).backward(outer)
    expected = outer.float() @ values.float()
    assert (inputs.grad.float() - expected).norm() < 0.15 * expected.norm()


def test_what_the_kernels_cannot_multiply_stays_torchaos():
    per_tensor = quantize_weight(
        torch.randn(64, 256, dtype=torch.bfloat16), Float8StreamConfig(granularity="per-tensor", dynamic=True)
    )
    assert type(per_tensor) is Float8Tensor
    grouped = quantize_weight(torch.randn(64, 256, dtype=torch.float16), Int8StreamConfig())
    assert type(grouped) is Int8Tensor


def test_a_loaded_model_is_fused_in_place():
    model = nn.Sequential(nn.Linear(128, 64), nn.Embedding(4, 4), nn.Linear(128, 64))
    model[0].weight = nn.Parameter(as_stock(weight(CONFIGS["int8"])), requires_grad=False)
    fuse_weights(model)
    assert type(model[0].weight.data) is FusedInt8Tensor
    assert type(model[2].weight.data) is torch.Tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_survives_what_is_done_to_a_weight(name):
    layer = nn.Linear(128, 64)
    layer.weight = nn.Parameter(weight(CONFIGS[name]), requires_grad=False)
    kind = type(layer.weight.data)
    for changed in (copy.deepcopy(layer), layer.to("cpu"), layer.eval()):
        assert type(changed.weight.data) is kind
    assert type(layer.state_dict()["weight"]) is kind
    assert type(layer.weight.detach().clone()) is kind


def static(device="cpu"):
    data = torch.zeros(64, 128).to(torch.float8_e4m3fn)
    return StaticFloat8Tensor(data, torch.ones(64, 1), torch.ones(1, 1), torch.bfloat16)


@pytest.mark.parametrize("make", [*(lambda c=c: weight(c) for c in CONFIGS.values()), static], ids=[*CONFIGS, "static"])
def test_accelerate_moves_it_as_sequential_offloading_does(make):
    layer = nn.Linear(128, 64, bias=False)
    layer.weight = nn.Parameter(make(), requires_grad=False)
    kept = copy.deepcopy(layer.weight.data)
    set_module_tensor_to_device(layer, "weight", "meta")
    assert layer.weight.is_meta
    set_module_tensor_to_device(layer, "weight", "cpu", value=kept)
    assert type(layer.weight.data) is type(kept)
    assert torch.equal(layer.weight.dequantize(), kept.dequantize())


def test_accelerate_moves_convolutions_too():
    conv = nn.Conv2d(4, 4, 3, bias=False)
    conv.weight = nn.Parameter(quantize_weight(conv.weight, Int8ConvConfig()), requires_grad=False)
    kept = copy.deepcopy(conv.weight.data)
    set_module_tensor_to_device(conv, "weight", "meta")
    set_module_tensor_to_device(conv, "weight", "cpu", value=kept)
    assert torch.equal(conv.weight.dequantize(), kept.dequantize())


@pytest.mark.parametrize("columns", [128, 144, 176, 200, 24])
def test_int8_compiles_for_the_cpu_with_rows_of_any_length(columns):
    """torch 2.13's own operator for it ends the process where a row is not a multiple of 16 long."""
    torch.compiler.reset()
    layer = nn.Linear(columns, 64, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight = nn.Parameter(quantize_weight(layer.weight, Int8StreamConfig()), requires_grad=False)
    rows = torch.randn(3, 5, columns, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(rows)
        compiled = torch.compile(layer, fullgraph=True)(rows)
    assert float((compiled - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_the_compilers_caches_tell_weights_apart(name):
    """A weight of ours must not be given what was compiled for another class, or another layout."""
    ours = weight(CONFIGS[name])
    key = ours._stable_hash_for_caching()
    assert key == weight(CONFIGS[name])._stable_hash_for_caching()
    others = {weight(config)._stable_hash_for_caching() for other, config in CONFIGS.items() if other != name}
    assert key not in others | {quantize_weight(torch.randn(64, 256), CONFIGS[name])._stable_hash_for_caching()}
