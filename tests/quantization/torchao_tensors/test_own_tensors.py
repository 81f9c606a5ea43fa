"""Our tensor classes as torch, torchao and safetensors see them: moving, copying, pickling, compiling, flattening."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from llm_dit.quantization.torchao_tensors import Int4GroupConfig, Int4GroupTensor, Int8ConvConfig, Int8ConvTensor
from llm_dit.quantization.torchao_tensors.stream import quantize_weight

CONVS = {
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 10)),
    "conv2d": (nn.Conv2d(6, 8, 3, stride=2, groups=2), (2, 6, 9, 9)),
    "conv2d-reflect": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    "conv3d": (nn.Conv3d(6, 8, (1, 3, 3), padding="same"), (1, 6, 3, 8, 8)),
    "transposed1d": (nn.ConvTranspose1d(6, 8, 4, stride=2), (2, 6, 9)),
    "transposed2d": (nn.ConvTranspose2d(6, 8, 4, stride=2, groups=2), (2, 6, 5, 5)),
    "transposed2d-depthwise": (nn.ConvTranspose2d(8, 8, 4, stride=2, groups=8), (2, 8, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(6, 8, 3), (1, 6, 3, 4, 4)),
}


class CausalConv3d(nn.Conv3d):
    """A subclass with a forward of its own, as in the video VAEs."""

    def forward(self, inputs):
        return super().forward(F.pad(inputs, (0, 0, 0, 0, 2, 0)))


def quantized_conv(conv, dtype=torch.float32):
    conv = copy.deepcopy(conv).to(dtype)
    config = Int8ConvConfig("Transpose" in type(conv).__name__, conv.groups)
    conv.weight = nn.Parameter(quantize_weight(conv.weight, config), requires_grad=False)
    return conv


def int4(rows=8, columns=256):
    generator = torch.Generator().manual_seed(0)
    return quantize_weight(torch.randn(rows, columns, generator=generator).to(torch.bfloat16), Int4GroupConfig())


def error(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_of_every_kind(name, dtype):
    conv, shape = CONVS[name]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = copy.deepcopy(conv).to(dtype)(inputs)
    assert error(quantized_conv(conv, dtype)(inputs), expected) < (0.012 if dtype == torch.float32 else 0.02)


def test_a_subclass_with_its_own_forward():
    conv = CausalConv3d(4, 8, (3, 1, 1))
    inputs = torch.randn(1, 4, 5, 6, 6)
    assert error(quantized_conv(conv)(inputs), conv(inputs)) < 0.012


@pytest.mark.parametrize("name", CONVS)
def test_one_scale_per_output_channel(name):
    """However much channels differ, each is as near as if it were alone."""
    conv, shape = copy.deepcopy(CONVS[name])
    sizes, channels = torch.logspace(-3, 0, conv.out_channels), conv.out_channels // conv.groups
    with torch.no_grad():
        if "Transpose" in type(conv).__name__:  # [C_in, C_out / groups, ...]
            factors = sizes.view(conv.groups, 1, channels).expand(-1, conv.in_channels // conv.groups, -1).flatten(0, 1)
        else:
            factors = sizes.view(-1, 1)
        conv.weight.mul_(factors[(..., *[None] * (conv.weight.ndim - 2))])
        conv.bias.zero_()
    quantized = quantized_conv(conv)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for one, expected in zip(quantized(inputs).unbind(1), conv(inputs).unbind(1), strict=True):
        assert error(one, expected) < 0.02
    assert len(quantized.weight.scale.unique()) == conv.out_channels
    assert quantized.weight.scale.dtype == torch.float32
    assert quantized.weight.qdata.dtype == torch.int8
    assert quantized.weight.qdata.is_contiguous()


def rounded_alone(weight):
    scale = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1)) / 127
    return (weight / scale).round() * scale


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(3, 3), (5, 5), (1, 3, 3), (3, 3, 3)]), st.integers(0, 1000))
def test_kernels_are_rounded_for_inputs_like_pictures(kernel, seed):
    """Where neighbours are alike, errors of the taps cancel; where they are not, little is lost."""
    torch.manual_seed(seed)
    conv = (nn.Conv2d if len(kernel) == 2 else nn.Conv3d)(16, 16, kernel, bias=False)
    quantized, alone = quantized_conv(conv), copy.deepcopy(conv)
    alone.weight = nn.Parameter(rounded_alone(conv.weight))
    small = torch.randn(2, 16, *[4] * len(kernel))
    smooth = nn.functional.interpolate(small, scale_factor=4, mode="bilinear" if len(kernel) == 2 else "trilinear")
    uncorrelated = torch.randn_like(smooth)
    assert error(quantized(smooth), conv(smooth)) < 0.6 * error(alone(smooth), conv(smooth))
    assert error(quantized(uncorrelated), conv(uncorrelated)) < 1.35 * error(alone(uncorrelated), conv(uncorrelated))


@pytest.mark.parametrize("conv", [nn.Conv1d(6, 8, 7), nn.Conv2d(6, 8, 1), nn.ConvTranspose2d(8, 8, 4, groups=8)], ids=repr)
def test_kernels_of_one_tap_of_one_dimension_or_transposed_are_rounded_one_by_one(conv):
    assert torch.equal(quantized_conv(conv).weight.dequantize(), rounded_alone(conv.weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_convolution_that_is_not_finite_is_refused(value):
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.data[1, 2, 0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantized_conv(conv)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([nn.Conv1d, nn.Conv2d]), st.integers(1, 9), st.integers(1, 6), st.sampled_from([0.0, 1e-20, 1.0, 1e5]))
def test_convolutions_stay_finite(kind, out_channels, kernel, scale):
    conv = kind(3, out_channels, kernel)
    with torch.no_grad():
        conv.weight.mul_(scale)
        conv.weight[0] = 0
    inputs = torch.randn(1, 3, *[12] * (conv.weight.ndim - 2))
    assert torch.isfinite(quantized_conv(conv)(inputs)).all()


def test_int4_packs_two_weights_a_byte_and_counts_its_scales():
    weight = int4(8, 256)
    assert weight.qdata.shape == (8, 128)
    assert weight.qdata.dtype == torch.uint8
    assert weight.scale.shape == weight.zero_point.shape == (8, 2)


def test_int4_equals_its_formula():
    weight = int4(4, 256)
    values = torch.stack((weight.qdata & 15, weight.qdata >> 4), -1).view(4, 2, 128).double()
    expected = values * weight.scale.double().unsqueeze(-1) + weight.zero_point.double().unsqueeze(-1)
    assert error(weight.dequantize(), expected.view(4, 256)) < 0.004


def test_int4_keeps_groups_of_equal_weights_exactly():
    original = torch.full((2, 256), 0.125, dtype=torch.bfloat16)
    assert torch.equal(quantize_weight(original, Int4GroupConfig()).dequantize(), original)


@pytest.mark.parametrize("size", [1e-4, 3e-5, 1e-5, 1.0])
def test_int4_of_small_float16_weights(size):
    """Their steps are subnormal."""
    weight = (size * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))).half()
    assert error(quantize_weight(weight, Int4GroupConfig()).dequantize(), weight) < 0.11


@pytest.mark.parametrize("make", [int4, lambda: quantized_conv(CONVS["conv2d"][0]).weight.data], ids=["int4", "conv"])
def test_lives_like_a_tensor(make):
    weight = make()
    names, _ = weight.__tensor_flatten__()
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    state, metadata = flatten_tensor_state_dict({"layer.weight": weight})
    unflattened, rest = unflatten_tensor_state_dict(state, metadata)
    assert not rest
    for other in (
        copy.deepcopy(weight),
        weight.clone(),
        weight.detach(),
        weight.to("cpu"),
        weight.to(torch.float32),
        nn.Parameter(weight, requires_grad=False).data,
        torch.load(buffer, weights_only=True),
        unflattened["layer.weight"],
    ):
        assert type(other) is type(weight)
        for name in names:
            assert torch.equal(getattr(other, name), getattr(weight, name))


def test_moves_with_its_module_and_keeps_its_scales():
    conv = quantized_conv(CONVS["conv2d"][0])
    scale = conv.weight.scale.clone()
    conv.to(torch.bfloat16)
    assert isinstance(conv.weight, Int8ConvTensor)
    assert torch.equal(conv.weight.scale, scale)
    assert conv.to("meta").weight.is_meta


@pytest.mark.parametrize("kind", ["int4", "conv"])
def test_compiles_without_graph_breaks(kind):
    if kind == "int4":
        module, inputs = nn.Linear(256, 8, bias=False), torch.randn(3, 256, dtype=torch.bfloat16)
        module.weight = nn.Parameter(int4(), requires_grad=False)
    else:
        conv, shape = CONVS["conv2d"]
        module, inputs = quantized_conv(conv), torch.randn(shape)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert error(compiled(inputs), module(inputs)) < 1e-3


def test_int4_runs_in_the_dtype_of_its_input():
    weight = int4()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert F.linear(torch.ones(1, 256, dtype=dtype), weight).dtype == dtype
    assert isinstance(weight, Int4GroupTensor)


def test_int4_multiplied_in_fp8():
    from llm_dit.quantization import quantize_component, set_int4_compute

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(128, 24)).to(torch.bfloat16).requires_grad_(False)
    dense = copy.deepcopy(model[0])
    inputs = torch.randn(2, 5, 256, dtype=torch.bfloat16)
    quantize_component(model, "int4", "transformer")
    exact = model[0](inputs)
    assert set_int4_compute(model, "fp8") == 1  # 24 is not divisible by 16
    approximate = model[0](inputs)
    assert approximate.shape == exact.shape
    assert 0.005 < error(approximate, exact) < 0.06
    # The bound: a quarter more error than with 16 bits.
    assert error(approximate, dense(inputs)) < 1.25 * error(exact, dense(inputs))
    flat, metadata = flatten_tensor_state_dict(model.state_dict())
    back, _ = unflatten_tensor_state_dict(flat, metadata)
    assert back["0.weight"].fp8_compute
    assert set_int4_compute(model, "16-bit") == 1
    odd, _ = quantize_component(nn.Sequential(nn.Linear(128, 24, dtype=torch.bfloat16)), "int4", "transformer")
    with pytest.raises(ValueError, match="none of the 1 int4 weights of Sequential can be set"):
        set_int4_compute(odd, "fp8")
    assert torch.equal(model[0](inputs), exact)


def test_int4_compute_wants_int4():
    from llm_dit.quantization import set_int4_compute

    with pytest.raises(ValueError, match="has no int4 weights"):
        set_int4_compute(nn.Linear(16, 16), "fp8")
    with pytest.raises(ValueError, match="unknown int4 compute 'fp4'"):
        set_int4_compute(nn.Linear(16, 16), "fp4")


@pytest.mark.parametrize(("columns", "size"), [(384, 128), (192, 64), (96, 32)])
def test_rows_that_no_group_of_128_divides_take_smaller_ones(columns, size):
    weight = int4(16, columns)
    assert weight.group_size == size
    assert weight.scale.shape == (16, columns // size)


def test_rows_that_no_group_divides_stay():
    with pytest.raises(ValueError, match="do not divide into groups of 128"):
        int4(16, 120)
