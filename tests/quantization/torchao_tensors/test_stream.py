"""Weights of every method: right against float64, finite for every input, the same bits in chunks as at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor, quantize_

from llm_dit.quantization import METHODS, VALID_METHODS
from llm_dit.quantization.torchao_tensors import stream
from llm_dit.quantization.torchao_tensors.stream import quantize_weight, row_chunks

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QUANTIZING = [method for method in VALID_METHODS if method != "none"]
# Relative error of a Gaussian weight: half a step over the range for the integers, 2^-4 of each value for e4m3.
WEIGHT_ERROR = {"int8": 0.009, "fp8-dynamic": 0.03, "fp8-weight-only": 0.03, "int4": 0.11}


def weight(rows=32, columns=256, dtype=torch.bfloat16, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0,)])
def test_an_empty_weight_has_no_rows_to_go_through(shape):
    chunks = list(row_chunks(torch.empty(shape), torch.device("cpu")))
    assert sum(chunk.stop - chunk.start for chunk in chunks) == shape[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", QUANTIZING)
def test_dequantizes_to_within_the_layouts_error(method, dtype):
    original = weight(dtype=dtype)
    quantized = quantize_weight(original, METHODS[method].make_config("per-row"))
    assert quantized.dtype == dtype
    assert quantized.shape == original.shape
    assert error(quantized.dequantize(), original) < WEIGHT_ERROR[method]


@pytest.mark.parametrize("granularity", ["per-row", "per-tensor"])
@pytest.mark.parametrize("method", QUANTIZING)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_zero_rows_and_any_magnitude_stay_finite(method, granularity, rows, scale, tokens, seed):
    original = weight(16 * ((rows + 15) // 16), seed=seed) * scale
    original[0] = 0
    linear = nn.Linear(256, original.shape[0], bias=False)
    linear.weight = nn.Parameter(quantize_weight(original, METHODS[method].make_config(granularity)), requires_grad=False)
    inputs = weight(tokens, seed=seed + 1)
    inputs[0] = 0
    output = linear(inputs)
    assert torch.isfinite(output).all()
    assert (output[0] == 0).all()


@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 3, 256), (0, 256)])
@pytest.mark.parametrize("method", QUANTIZING)
def test_linear_takes_inputs_of_any_rank(method, shape):
    original = weight()
    linear = nn.Linear(256, 32, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(quantize_weight(original, METHODS[method].make_config("per-row")), requires_grad=False)
    output = linear(torch.ones(shape, dtype=torch.bfloat16))
    assert output.shape == (*shape[:-1], 32)


@pytest.mark.parametrize("granularity", ["per-row", "per-tensor"])
@pytest.mark.parametrize("method", QUANTIZING)
def test_chunks_give_the_same_bits_as_one_pass(method, granularity, monkeypatch):
    original, config = weight(48), METHODS[method].make_config(granularity)
    whole = quantize_weight(original, config)
    monkeypatch.setitem(stream.CHUNK_ELEMENTS, "cpu", 5 * 256)
    chunked = quantize_weight(original, config)
    names, _ = whole.__tensor_flatten__()
    for name in names:
        assert torch.equal(getattr(whole, name).view(torch.uint8), getattr(chunked, name).view(torch.uint8)), name


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor()], ids=["per-row", "per-tensor"])
def test_fp8_has_the_bits_of_stock_torchao(granularity):
    original = weight(48)
    name = "per-row" if isinstance(granularity, PerRow) else "per-tensor"
    ours = quantize_weight(original, METHODS["fp8-weight-only"].make_config(name))
    stock = Float8Tensor.from_hp(original, granularity=granularity)
    assert torch.equal(ours.qdata.view(torch.uint8), stock.qdata.view(torch.uint8))
    assert torch.equal(ours.scale, stock.scale)


def test_int8_has_the_bits_of_stock_torchao():
    original = weight(48)
    ours = quantize_weight(original, METHODS["int8"].make_config("per-row"))
    stock = Int8Tensor.from_hp(original, granularity=PerRow())
    assert torch.equal(ours.qdata, stock.qdata)
    assert torch.equal(ours.scale, stock.scale)


def test_int8_in_float16_does_not_overflow():
    """torchao's one-scale path multiplies by raw int8 values: 2048 products of 100 x 100 pass float16's 65504."""
    original = torch.full((16, 2048), 0.01, dtype=torch.float16)
    inputs = torch.full((1, 2048), 100.0, dtype=torch.float16)
    linear = nn.Linear(2048, 16, bias=False, dtype=torch.float16)
    linear.weight = nn.Parameter(quantize_weight(original, METHODS["int8"].make_config("per-row")), requires_grad=False)
    assert error(linear(inputs), torch.full((1, 16), 2048.0)) < 0.01


def test_per_tensor_fp8_dynamic_runs_on_a_128_square():
    """torchao takes a [1, 1] scale over 128 x 128 for the blockwise layout and fails in the multiplication."""
    original = weight(128, 128)
    linear = nn.Linear(128, 128, bias=False)
    quantized = quantize_weight(original, METHODS["fp8-dynamic"].make_config("per-tensor"))
    linear.weight = nn.Parameter(quantized, requires_grad=False)
    inputs = weight(5, 128, seed=1)
    assert error(linear(inputs), nn.functional.linear(inputs, original)) < 0.06


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", QUANTIZING)
def test_refuses_weights_that_are_not_finite(method, bad):
    original = weight()
    original[3, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(original, METHODS[method].make_config("per-row"))


@pytest.mark.parametrize("method", QUANTIZING)
def test_quantizes_on_meta_for_estimates(method):
    on_meta = quantize_weight(weight().to("meta"), METHODS[method].make_config("per-row"))
    real = quantize_weight(weight(), METHODS[method].make_config("per-row"))
    assert on_meta.is_meta
    for name in real.__tensor_flatten__()[0]:
        assert getattr(on_meta, name).shape == getattr(real, name).shape
        assert getattr(on_meta, name).dtype == getattr(real, name).dtype


@pytest.mark.parametrize("method", QUANTIZING)
def test_torchaos_quantize_takes_our_configurations(method):
    model = nn.Sequential(nn.Linear(256, 32, dtype=torch.bfloat16), nn.Linear(256, 32, dtype=torch.bfloat16))
    quantize_(model, METHODS[method].make_config("per-row"), filter_fn=lambda module, name: name == "0")
    assert type(model[0].weight.data) is type(quantize_weight(weight(), METHODS[method].make_config("per-row")))
    assert type(model[1].weight) is nn.Parameter


@pytest.mark.gpu
@pytest.mark.parametrize("method", QUANTIZING)
def test_parked_on_the_host_has_the_bits_of_the_gpu(method):
    original, config = weight(256, 512), METHODS[method].make_config("per-row")
    parked = quantize_weight(original, config, "cpu")
    on_gpu = quantize_weight(original.cuda(), config)
    for name in parked.__tensor_flatten__()[0]:
        assert getattr(parked, name).device.type == "cpu"
        assert torch.equal(getattr(parked, name).view(torch.uint8), getattr(on_gpu, name).cpu().view(torch.uint8)), name


@pytest.mark.gpu
@pytest.mark.parametrize("method", QUANTIZING)
def test_linear_on_the_gpu(method):
    original = weight(256, 512)
    linear = nn.Linear(512, 256, bias=True, dtype=torch.bfloat16, device="cuda")
    config = METHODS[method].make_config("per-row")
    linear.weight = nn.Parameter(quantize_weight(original, config, "cuda"), requires_grad=False)
    inputs = weight(64, 512, seed=1).cuda()
    inputs[0] = 0
    expected = nn.functional.linear(inputs, original.cuda(), linear.bias)
    assert torch.isfinite(linear(inputs)).all()
    assert error(linear(inputs), expected) < {"int8": 0.02, "int4": 0.13}.get(method, 0.05)
