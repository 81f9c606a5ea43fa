"""The fused kernels against float64: in Triton's interpreter on the CPU, compiled for cards that are not here, and on a GPU."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dit.quantization.kernels.dequantize_int4 import (
    dequantize_int4,
    dequantize_int4_reference,
    dequantize_int4_to_float8,
)
from llm_dit.quantization.kernels.dequantize_rows import dequantize_rows, dequantize_rows_reference
from llm_dit.quantization.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from llm_dit.quantization.torchao_tensors.float8 import Float8StreamConfig
from llm_dit.quantization.torchao_tensors.int4 import Int4GroupConfig
from llm_dit.quantization.torchao_tensors.int8 import Int8StreamConfig
from llm_dit.quantization.torchao_tensors.stream import quantize_weight

BOUND = 1e-12
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
FP8_ERROR = 0.033
"""Three mantissa bits round by 0.026 on average; a row of 100 values strays from it."""


def error(value, reference):
    value, reference = value.double().cpu(), reference.double().cpu()
    norm = reference.norm()
    return float((value - reference).norm() / norm) if norm else float(value.norm())


def special_rows(columns, device="cpu", dtype=torch.bfloat16):
    """Noise, a row of zeros, a row with one value, huge and tiny rows."""
    rows = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns)).to(device)
    rows[1] = 0
    rows[2] = 0
    rows[2, columns // 2] = 3
    rows[3] *= 1e30
    rows[4] *= 1e-20
    return rows.to(dtype)


def check_quantized(rows, quantized, scale, bound):
    assert quantized.dtype == torch.float8_e4m3fn
    assert quantized.is_contiguous()
    assert scale.shape == (rows.shape[0], 1)
    assert torch.isfinite(scale).all()
    back = quantized.double() * scale.double()
    for row, found in zip(rows.double(), back, strict=True):
        assert error(found, row) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(count=st.integers(0, 5), columns=st.integers(1, 300), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_quantize_rows_reference(dtype, count, columns, seed):
    rows = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    quantized, scale = quantize_rows(rows, BOUND)
    assert quantized.shape == rows.shape
    back = quantized.double() * scale.double()
    # Half a unit in the last place of e4m3 (3 mantissa bits), and of its subnormals, and what float32 rounds.
    assert ((back - rows.double()).abs() <= rows.double().abs() / 16 * (1 + 2**-20) + scale.double() * 2**-10).all()


@pytest.mark.parametrize("make", [lambda: torch.zeros(4, 256), lambda: torch.full((4, 256), 2.5), lambda: torch.randn(4, 256)])
def test_int4_in_fp8_is_the_int4_weight(make):
    weight = quantize_weight(make().to(torch.bfloat16), Int4GroupConfig())
    exact = dequantize_int4(weight.qdata, weight.scale.double(), weight.zero_point.double(), torch.float64)
    found, scale = dequantize_int4_to_float8(weight.qdata, weight.scale, weight.zero_point)
    assert torch.isfinite(scale).all()
    assert error(found.double() * scale.double(), exact) < FP8_ERROR


@needs_triton
def test_the_kernels_agree_with_the_references_in_tritons_interpreter():
    """In a process of its own: Triton reads the variable when kernels are made."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("interpreted.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


SIGNATURES = {
    "quantize_rows": (
        {"rows": "*bf16", "quantized": "*fp8e4nv", "scales": "*fp32", "row_stride": "i32", "columns": "i32", "bound": "fp32"},
        {"block": 4096},
    ),
    "dequantize_rows": (
        {"quantized": "*i8", "scales": "*fp32", "weights": "*bf16", "columns": "i32", "scale_stride": "i32"},
        {"block": 4096},
    ),
    "dequantize_int4": (
        {
            **dict.fromkeys(("packed", "groups", "half_group"), "i32"),
            "qdata": "*u8",
            "scales": "*bf16",
            "zero_points": "*bf16",
            "row_scales": "*fp32",
            "weights": "*bf16",
        },
        {"scaled": True, "row_groups": 32, "block": 2048},
    ),
}


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_for_cards_that_are_not_here(name, capability):
    if name == "quantize_rows" and capability < 89:
        pytest.skip("fp8 needs capability 8.9")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"llm_dit.quantization.kernels.{name}"), f"_{name}_kernel")
    arguments, constants = SIGNATURES[name]
    signature = {argument: {**arguments, **dict.fromkeys(constants, "constexpr")}[argument] for argument in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared <= 48 * 1024
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [1, 16, 100, 1000, 4096, 12288, 65536])
def test_quantize_rows_on_the_gpu(columns, dtype):
    rows = special_rows(columns, "cuda", dtype if dtype != torch.float16 else torch.float32)
    rows = rows.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else rows
    bound = 2.0**-14 if dtype == torch.float16 else BOUND
    quantized, scale = quantize_rows(rows, bound)
    reference, expected = quantize_rows_reference(rows, bound)
    # PyTorch multiplies by the reciprocal of 448 on a GPU: the scales differ by a unit in the last place, and so do values near
    # the middle between two float8 numbers (in bfloat16 rows many values are exactly there: up to half a percent of a row).
    torch.testing.assert_close(scale, expected, rtol=2.0**-22, atol=0)
    steps = (quantized.view(torch.uint8).int() - reference.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-2 or columns < 1000
    if dtype != torch.float16:
        seen = rows.abs().amax(dim=1) > bound  # smaller rows become zeros
        check_quantized(rows[seen], quantized[seen], scale[seen], 0.07 if columns == 1 else FP8_ERROR)


LINEARS = [Float8StreamConfig(dynamic=True), Float8StreamConfig(), Int8StreamConfig(), Int4GroupConfig()]
LARGEST = {"dynamic": 0.06, "Float8StreamConfig": 0.035, "Int8StreamConfig": 0.012, "Int4GroupConfig": 0.13}


def quantized_linear(config, features=(256, 384), bias=True, device="cuda"):
    layer = torch.nn.Linear(*features, bias=bias, device=device, dtype=torch.bfloat16)
    reference = layer.weight.detach().double()
    layer.weight = torch.nn.Parameter(quantize_weight(layer.weight.detach(), config), requires_grad=False)
    return layer.requires_grad_(False), reference


def bound_of(config):
    return LARGEST["dynamic" if getattr(config, "dynamic", False) else type(config).__name__]


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", LINEARS, ids=repr)
@pytest.mark.parametrize("shape", [(256,), (7, 256), (2, 5, 256), (2, 3, 4, 256), (0, 256), (4096, 256)])
def test_linears_of_any_rank(config, shape, bias):
    layer, weight = quantized_linear(config, bias=bias)
    inputs = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    output = layer(inputs)
    assert output.shape == (*shape[:-1], 384)
    expected = F.linear(inputs.double(), weight, layer.bias.double() if bias else None)
    assert error(output, expected) <= bound_of(config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", LINEARS, ids=repr)
def test_inputs_that_are_not_contiguous_or_zero(config):
    layer, weight = quantized_linear(config)
    for inputs in (
        torch.randn(256, 33, device="cuda", dtype=torch.bfloat16).t(),
        torch.randn(4, 16, 512, device="cuda", dtype=torch.bfloat16)[:, ::2, ::2],
        torch.randn(2, 256, 9, device="cuda", dtype=torch.bfloat16).transpose(1, 2),
    ):
        expected = F.linear(inputs.double(), weight, layer.bias.double())
        assert error(layer(inputs), expected) <= bound_of(config)
    zeros = torch.zeros(3, 256, device="cuda", dtype=torch.bfloat16)
    assert error(layer(zeros), layer.bias.expand(3, -1)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("config", LINEARS, ids=repr)
def test_linears_compile_without_a_graph_break(config):
    layer, weight = quantized_linear(config)
    compiled = torch.compile(layer, fullgraph=True)
    for count in (8, 64):
        inputs = torch.randn(count, 256, device="cuda", dtype=torch.bfloat16)
        assert error(compiled(inputs), F.linear(inputs.double(), weight, layer.bias.double())) <= bound_of(config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*LINEARS[:2], Int8StreamConfig(), Int4GroupConfig()], ids=repr)
def test_dequantizing_on_the_gpu_rounds_once(config):
    weight = quantize_weight(torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16), config)
    if isinstance(config, Int4GroupConfig):
        exact = dequantize_int4_reference(weight.qdata, weight.scale.double(), weight.zero_point.double(), torch.float64)
        found = dequantize_int4(weight.qdata, weight.scale, weight.zero_point, torch.bfloat16)
    else:
        exact = weight.qdata.double() * weight.scale.double()
        found = dequantize_rows(weight.qdata, weight.scale, torch.bfloat16)
        assert torch.equal(found, dequantize_rows_reference(weight.qdata, weight.scale, torch.bfloat16))
    assert error(found, exact) < 3e-3


def test_a_compiler_gets_the_reference():
    """Fake tensors of a GPU take the PyTorch path, whatever the machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    from llm_dit.quantization.torchao_tensors.fused import FusedFloat8Tensor, as_fused

    with FakeTensorMode():
        data = torch.empty(64, 32, device="cuda", dtype=torch.float8_e4m3fn)
        scale = torch.empty(64, 1, device="cuda")
        stock = Float8Tensor(data, scale, [1, 32], act_quant_kwargs=QuantizeTensorToFloat8Kwargs(), dtype=torch.bfloat16)
        weight = as_fused(stock)
        assert type(weight) is FusedFloat8Tensor
        output = F.linear(torch.empty(2, 3, 32, device="cuda", dtype=torch.bfloat16), weight)
    assert output.shape == (2, 3, 64)
