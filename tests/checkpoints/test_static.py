"""activation_scale="static": activations in fp8 by the scales that the file was calibrated with, and never unasked."""

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, FAMILIES, checkpoint, converted, folder, forward, load, official, reference, transformer
from conftest import generate, relative_error
from torch import nn
from torchao.quantization import Float8Tensor
from writer import FP8_MAX, LAYOUTS, with_tensor, write

from llm_dit import load_pipeline

STATIC = {"quantization_transformer": "fp8-dynamic", "activation_scale": "static"}


def calibrated(source, name):
    """The scale of the input of every Linear in one forward, by the official name of the layer that it was."""
    model = transformer(source)
    largest = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, layer=layer: largest.__setitem__(layer, max(largest.get(layer, 0), args[0].abs().max().item()))
        )
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    forward(model, source, name)
    for hook in hooks:
        hook.remove()
    keys = list(official(source, name))
    numbers = {key: torch.full(tensor.shape, index) for index, (key, tensor) in enumerate(official(source, name).items())}
    origin = {key: keys[int(number.flatten()[0])] for key, number in converted(model, numbers).items()}
    return {origin[f"{layer}.weight"].removesuffix(".weight"): value / FP8_MAX for layer, value in largest.items()}


@pytest.fixture
def file(tiny, tmp_path):
    """`file(name, times)`: a calibrated file of a model, its input scales `times` as large as they should be."""

    def make(name, times=1.0, layout="scaled"):
        source = folder(tiny, name)
        path = tmp_path / f"{name}-{times}.safetensors"
        scales = {layer: times * scale for layer, scale in calibrated(source, name).items()}
        write(path, official(source, name), LAYOUTS[layout], input_scales=scales)
        return source, path

    return make


def error(source, name, path, **keywords):
    model = load(source, path, **keywords).transformer
    return relative_error(forward(model, source, name), reference(source, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_calibrated_file_is_as_good_as_dynamic(name, file):
    source, path = file(name)
    dynamic = error(source, name, path, quantization_transformer="fp8-dynamic")
    static = error(source, name, path, **STATIC)
    assert static < 1.5 * dynamic
    assert static != dynamic


@pytest.mark.parametrize("name", ["flux2-dev", "qwen-image"])
def test_what_is_too_large_for_a_scale_is_clamped(name, file):
    """A scale a quarter of the right one clips a little, and nothing becomes NaN; one four times as large costs little."""
    source, path = file(name)
    right = error(source, name, path, **STATIC)
    assert error(source, name, file(name, 4.0)[1], **STATIC) < 1.5 * right
    assert right < error(source, name, file(name, 0.1)[1], **STATIC) < 1
    assert error(source, name, file(name, 0.001)[1], **STATIC) < 2


def test_it_is_what_the_scales_say(file):
    """x = clamp(x / input_scale) in e4m3, y = x * input_scale @ w: for inputs of two, three and four dimensions."""
    source, path = file("flux2-dev")
    linear = load(source, path, **STATIC).transformer.transformer_blocks[0].ff.linear_in
    scale = calibrated(source, "flux2-dev")["double_blocks.0.img_mlp.0"]
    weight = linear.weight.dequantize(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 128), (2, 3, 128), (2, 3, 4, 128), (128,), (1, 128), (0, 128), (2, 0, 128)):
        x = (20 * torch.randn(shape, generator=generator)).to(BF16)
        rounded = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
        expected = F.linear(rounded, weight)
        y = linear(x)
        assert y.shape == expected.shape
        assert y.dtype == BF16
        assert y.numel() == 0 or relative_error(y, expected) < 0.005


def test_with_a_bias_and_inputs_that_are_not_contiguous(file):
    source, path = file("qwen-image")
    linear = load(source, path, **STATIC).transformer.transformer_blocks[0].attn.to_q
    assert linear.bias is not None
    x = torch.randn(2, 128, 5, generator=torch.Generator().manual_seed(0)).to(BF16)
    y = linear(x.transpose(1, 2))
    assert torch.equal(y, linear(x.transpose(1, 2).contiguous()))
    assert torch.allclose((y - linear.bias).float(), F.linear(x.transpose(1, 2), linear.weight.dequantize()).float(), atol=0.3)


@pytest.mark.parametrize("layout", ["scaled", "scaled-one", "prefixed", "mixed", "legacy-input"])
def test_never_by_default(layout, tiny):
    source = folder(tiny, "flux2-dev")
    path, _ = checkpoint(source, "flux2-dev", layout)
    for keywords in ({}, {"quantization_transformer": "fp8-dynamic"}, {"quantization_transformer": "fp8-weight-only"}):
        pipe = load(source, path, **keywords)
        assert all(isinstance(p, Float8Tensor) or type(p) is nn.Parameter for p in pipe.transformer.parameters())
        assert "static input scales in" not in pipe.quantization_report["transformer"].note
    static = load(source, path, **STATIC)
    kinds = {type(p).__name__ for p in static.transformer.parameters()}
    assert kinds == {"Parameter", "StaticFloat8Tensor"}
    kept = static.quantization_report["transformer"].quantized_layers
    assert f"static input scales in {kept} of {kept} fp8 layers" in static.quantization_report["transformer"].note


def test_the_default_ignores_the_scales(tiny, file):
    """However wrong they are."""
    source, path = file("flux2-dev", 1e-6)
    assert error(source, "flux2-dev", path) < 0.01


@pytest.mark.parametrize("value", [1.0, 0.0, -0.5, float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_none_counts_as_absent(value, file):
    """1.0 is what converters write where they measured nothing: that layer is quantized dynamically, and the report says so."""
    source, path = file("flux2-dev")
    path = with_tensor(path, "double_blocks.1.img_attn.qkv.input_scale", torch.tensor(value))
    pipe = load(source, path, **STATIC)
    dynamic = {name for name, p in pipe.transformer.named_parameters() if isinstance(p, Float8Tensor)}
    assert dynamic == {f"transformer_blocks.1.attn.{name}.weight" for name in ("to_q", "to_k", "to_v")}
    assert "static input scales in 25 of 28 fp8 layers" in pipe.quantization_report["transformer"].note
    assert relative_error(forward(pipe.transformer, source, "flux2-dev"), reference(source, "flux2-dev")) < 0.012


def test_a_file_whose_scales_are_all_placeholders_has_none(tiny, tmp_path):
    source = folder(tiny, "flux2-dev")
    tensors = official(source, "flux2-dev")
    placeholders = {key.removesuffix(".weight"): 1.0 for key in tensors}
    write(tmp_path / "x.safetensors", tensors, LAYOUTS["scaled"], input_scales=placeholders)
    with pytest.raises(ValueError, match="no usable scales of activations"):
        load(source, tmp_path / "x.safetensors", **STATIC)


def test_the_weights_are_the_files(file):
    source, path = file("flux2-dev")
    static, dynamic = load(source, path, **STATIC).transformer, load(source, path).transformer
    for name, parameter in dynamic.named_parameters():
        if isinstance(parameter, Float8Tensor):
            other = static.get_parameter(name)
            assert torch.equal(other.qdata.view(torch.uint8), parameter.qdata.view(torch.uint8))
            assert torch.equal(other.scale, parameter.scale)
            assert other.input_scale.dtype == torch.float32


@pytest.mark.parametrize("name", ["flux2-dev", "ltx2"])
def test_saved_and_loaded_again(name, file, tmp_path):
    """With our loader, bit for bit; these weights are no stock tensors, so plain diffusers does not load them."""
    source, path = file(name)
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=path, **STATIC)
    output = generate(pipe, name)
    pipe.save_pretrained(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    assert torch.equal(generate(again, name), output)
    kinds = {type(p).__name__ for p in again.transformer.parameters()}
    assert "StaticFloat8Tensor" in kinds
