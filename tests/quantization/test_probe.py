"""The probe after a load."""

import pytest
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from llm_dit.quantization import quantize_component
from llm_dit.quantization.probe import probe_finite


def model_with_a_zero_row():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    with torch.no_grad():
        model[1].weight[0] = 0
    return model


@pytest.mark.parametrize("method", ["fp8-dynamic", "fp8-weight-only", "int8"])
def test_passes_what_we_quantize(method):
    model, _ = quantize_component(model_with_a_zero_row(), method, "transformer")
    probe_finite(model)
    assert torch.isfinite(model(torch.zeros(2, 64))).all()


def test_finds_the_nan_of_stock_torchao_by_name():
    model = model_with_a_zero_row()
    quantize_(model, Float8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(RuntimeError, match=r"NaN or infinity: 1\."):
        probe_finite(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_finds_nan_in_raw_fp8(dtype):
    model = nn.Sequential(nn.Linear(16, 16))
    weight = torch.full((16, 16), 1.0)
    model[0].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    probe_finite(model)
    weight[2, 3] = float("nan")
    model[0].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        probe_finite(model)
