"""Run by test_kernels.py with TRITON_INTERPRET=1: the kernels' own code, on the CPU."""

import pytest
import torch

from llm_dit.quantization.kernels.dequantize_int4 import (
    dequantize_int4,
    dequantize_int4_reference,
    dequantize_int4_to_float8,
)
from llm_dit.quantization.kernels.dequantize_rows import dequantize_rows
from llm_dit.quantization.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from llm_dit.quantization.kernels.support import INTERPRETED
from llm_dit.quantization.torchao_tensors.float8 import Float8StreamConfig
from llm_dit.quantization.torchao_tensors.int4 import Int4GroupConfig
from llm_dit.quantization.torchao_tensors.int8 import Int8StreamConfig
from llm_dit.quantization.torchao_tensors.stream import quantize_weight

FP8_ERROR = 0.125
"""A unit in the last place of e4m3: the interpreter's cast truncates where the hardware rounds."""


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def error(value, reference):
    norm = reference.double().norm()
    return float((value.double() - reference.double()).norm() / norm) if norm else float(value.double().norm())


def test_it_is_the_interpreter():
    assert INTERPRETED


@pytest.mark.parametrize("columns", [16, 100, 128, 1000])
def test_quantize_rows(columns):
    rows = torch.randn(5, columns)
    rows[1] = 0
    rows[2] = 0
    rows[2, columns // 2] = 3
    rows[3] *= 1e30
    rows = rows.to(torch.bfloat16)
    quantized, scale = quantize_rows(rows, 1e-12)
    assert torch.equal(scale, quantize_rows_reference(rows, 1e-12)[1])
    for row, found in zip(rows, quantized.double() * scale.double(), strict=True):
        assert error(found, row) < FP8_ERROR


@pytest.mark.parametrize("config", [Int8StreamConfig(), Float8StreamConfig()])
@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (5, 4100)])
def test_dequantize_rows(config, shape):
    weight = quantize_weight(torch.randn(shape, dtype=torch.bfloat16), config)
    found = dequantize_rows(weight.qdata, weight.scale, torch.bfloat16)
    # The interpreter's cast to bfloat16 truncates too.
    assert error(found, weight.qdata.double() * weight.scale.double()) < 2**-7


@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (2, 4352)])
def test_dequantize_int4(shape):
    weight = quantize_weight(torch.randn(shape, dtype=torch.bfloat16), Int4GroupConfig())
    exact = dequantize_int4_reference(weight.qdata, weight.scale.double(), weight.zero_point.double(), torch.float64)
    assert error(dequantize_int4(weight.qdata, weight.scale, weight.zero_point, torch.bfloat16), exact) < 2**-7
    found, scale = dequantize_int4_to_float8(weight.qdata, weight.scale, weight.zero_point)
    assert error(found.double() * scale.double(), exact) < FP8_ERROR
