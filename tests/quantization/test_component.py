"""`quantize_component` and `quantize_vae`: what they count, refuse and leave alone."""

import logging

import pytest
import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor

from llm_dit.quantization import (
    METHODS,
    REMOVED_METHODS,
    VALID_METHODS,
    estimate_memory,
    get_method,
    hardware,
    is_fp8_compatible_layer,
    model_bytes,
    quantize_component,
    quantize_vae,
)
from llm_dit.quantization.methods import weights_method

QUANTIZING = [method for method in VALID_METHODS if method != "none"]


class Model(nn.Module):
    """Names as they occur: norms with Linears in them, an audio sibling, odd widths, a tied head."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 256)
        self.to_q = nn.Linear(256, 256)
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(256, 512)})
        self.proj_out = nn.Linear(256, 32)
        self.audio_proj_out = nn.Linear(256, 32)
        self.odd = nn.Linear(250, 30)
        self.lm_head = nn.Linear(256, 64, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, inputs):
        return self.proj_out(self.to_q(inputs)) + self.audio_proj_out(inputs)


def quantized_names(model):
    return {name.removesuffix(".weight") for name, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)}


def test_the_names_users_write():
    assert VALID_METHODS == ("none", "fp8-dynamic", "fp8-weight-only", "int8", "int4")
    assert get_method("fp8").name == "fp8-dynamic"
    assert tuple(METHODS) == VALID_METHODS


@pytest.mark.parametrize(("removed", "replacement"), REMOVED_METHODS.items())
def test_removed_methods_name_their_replacement(removed, replacement):
    with pytest.raises(ValueError, match=f"{removed}.*removed: use '{replacement}'"):
        quantize_component(Model(), removed, "transformer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in8", "transformer"), "did you mean 'int8'"),
        (("int8", "transfomer"), "did you mean 'transformer'"),
        (("fp8", "transformer", "per-rwo"), "did you mean 'per-row'"),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_component(Model(), *arguments)


@pytest.mark.parametrize("name", ["quantize_model_torchao", "fp8_inference", "create_fp8_filter_fn", "analyze_fp8_compatibility"])
def test_removed_functions_raise_import_error(name):
    import llm_dit.quantization

    with pytest.raises(ImportError, match=f"{name} was removed"):
        getattr(llm_dit.quantization, name)
    with pytest.raises(ImportError, match=f"{name} was removed"):
        exec(f"from llm_dit.quantization import {name}", {})


@pytest.mark.parametrize("method", VALID_METHODS)
def test_counts_add_up_and_every_skip_has_its_reason(method):
    model, stats = quantize_component(Model(), method, "transformer")
    assert stats["method"] == method
    assert stats["component_type"] == "transformer"
    assert stats["quantized_layers"] + stats["skipped_layers"] == stats["total_layers"] == 6
    assert len(stats["skip_reasons"]) == stats["skipped_layers"]
    assert all(stats["skip_reasons"].values())
    assert stats["quantized_layers"] == len(quantized_names(model))
    assert stats["bytes_after"] == model_bytes(model)


@pytest.mark.parametrize(
    ("component_type", "method", "expected"),
    [
        ("transformer", "int8", {"to_q", "proj_out", "audio_proj_out", "odd"}),
        ("encoder", "int8", {"to_q", "proj_out", "audio_proj_out", "odd"}),
        ("transformer", "fp8-dynamic", {"to_q", "proj_out", "audio_proj_out"}),
        ("transformer", "int4", {"to_q", "proj_out", "audio_proj_out"}),
    ],
)
def test_filters(component_type, method, expected):
    model, _ = quantize_component(Model(), method, component_type)
    assert quantized_names(model) == expected


def test_skip_patterns_match_whole_names():
    model, stats = quantize_component(Model(), "int8", "transformer", skip_patterns=["proj_out"])
    assert quantized_names(model) == {"to_q", "audio_proj_out", "odd"}
    assert stats["skip_reasons"]["proj_out"] == "skip pattern 'proj_out'"


def test_a_tied_weight_stays_tied():
    model, stats = quantize_component(Model(), "int8", "transformer")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "tied" in stats["skip_reasons"]["lm_head"]


def test_a_layer_used_twice_is_one_layer():
    layer = nn.Linear(64, 64)
    model, stats = quantize_component(nn.Sequential(layer, layer), "int8", "transformer")
    assert (stats["quantized_layers"], stats["total_layers"]) == (1, 1)
    assert model[0] is model[1]


@pytest.mark.parametrize("method", QUANTIZING)
def test_outputs_stay_close(method):
    torch.manual_seed(0)
    model = Model()
    inputs = torch.randn(4, 256)
    with torch.no_grad():
        expected = model(inputs)
        quantize_component(model, method, "transformer")
        error = (model(inputs) - expected).norm() / expected.norm()
    assert error < {"int8": 0.02, "int4": 0.2}.get(method, 0.08)


def test_halves_the_bytes():
    _, stats = quantize_component(nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(torch.bfloat16), "int8", "transformer")
    assert stats["bytes_after"] < 0.51 * stats["bytes_before"]
    assert stats["bytes_before"] == 2 * 1024 * 1024


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_raw_fp8_is_left_whole(dtype):
    model = nn.Linear(64, 64)
    model.weight = nn.Parameter(model.weight.to(dtype), requires_grad=False)
    _, stats = quantize_component(model, "int8", "transformer")
    assert stats["method"] == "already_quantized"
    assert stats["quantized_layers"] == 0
    assert stats["quantized_by"] == "raw float8"


def test_what_is_quantized_already_is_not_estimated():
    model, _ = quantize_component(nn.Sequential(nn.Linear(64, 64)), "int8", "transformer")
    with pytest.raises(ValueError, match=r"Sequential is already quantized \(torchao\): estimate the model in 16 bits"):
        estimate_memory(model, "int4", "transformer")


def test_a_pipeline_is_no_component():
    with pytest.raises(TypeError, match=r"takes a model, such as pipe\.transformer, and not a dict"):
        quantize_component({}, "int8", "transformer")


@pytest.mark.parametrize("method", QUANTIZING)
def test_weights_say_what_they_were_quantized_to(method):
    assert weights_method(Model()) is None
    assert weights_method(quantize_component(Model(), method, "transformer")[0]) == method
    if method == "int8":
        assert weights_method(quantize_vae(nn.Sequential(nn.Conv2d(32, 32, 3)))) == "int8"


@pytest.mark.parametrize("method", QUANTIZING)
def test_twice_is_once(method):
    model, _ = quantize_component(Model(), method, "transformer")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    _, stats = quantize_component(model, "int8", "transformer")
    assert stats["method"] == "already_quantized"
    assert stats["quantized_layers"] == 0
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("bitsandbytes.nn.modules", "bitsandbytes"),
        ("optimum.quanto.nn.qlinear", "quanto"),
        ("sdnq.layers", "SDNQ"),
        ("diffusers.quantizers.gguf.utils", "GGUF"),
    ],
)
def test_other_libraries_are_recognized(module, library):
    kind = type("QuantizedLinear", (nn.Linear,), {"__module__": module})
    _, stats = quantize_component(nn.Sequential(kind(64, 64)), "int8", "transformer")
    assert stats["method"] == "already_quantized"
    assert stats["quantized_by"] == library


def test_under_inference_mode_the_result_can_be_moved_later():
    with torch.inference_mode():
        model, stats = quantize_component(nn.Sequential(nn.Linear(256, 256)), "int8", "transformer")
        model(torch.ones(1, 256))
    assert stats["quantized_layers"] == 1
    model[0].weight.data.to("cpu").clone()
    assert not model[0].weight.is_inference()


def test_on_meta_it_stays_on_meta():
    with torch.device("meta"):
        model = Model()
    _, stats = quantize_component(model, "int4", "transformer")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert stats["bytes_after"] < stats["bytes_before"]


def test_nothing_to_quantize_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"none of the 1 layers.*12 x 10 is not divisible by 16"):
        quantize_component(nn.Sequential(nn.Linear(12, 10)), "fp8-dynamic", "transformer")
    with pytest.raises(ValueError, match="none of the 0 layers"):
        quantize_component(nn.ReLU(), "int8", "encoder")


@pytest.mark.parametrize("method", QUANTIZING)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_is_refused_stays_as_it_was(method, value):
    """So that what the error asks for, here to skip the layer, then quantizes the others."""
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64, dtype=torch.bfloat16))
    with torch.no_grad():
        model[1].weight[3, 5] = value
    with pytest.raises(ValueError, match="layer '1' cannot be quantized: the weight holds NaN or infinity"):
        quantize_component(model, method, "transformer")
    assert quantized_names(model) == set()
    _, stats = quantize_component(model, method, "transformer", skip_patterns=["1"])
    assert stats["quantized_layers"] == 1


@pytest.mark.parametrize("function", [quantize_component, estimate_memory])
def test_a_string_is_no_list_of_patterns(function):
    with pytest.raises(ValueError, match="skip_patterns must be a list of name patterns, not the string 'proj_out'"):
        function(Model(), "int8", "transformer", skip_patterns="proj_out")


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_every_layer_counts(first, monkeypatch):
    monkeypatch.setattr(hardware, "detect_hardware", lambda: hardware.Hardware("H100", (9, 0), 80 * 1024**3))
    other = torch.float16 if first == torch.bfloat16 else torch.bfloat16
    model = nn.Sequential(nn.Linear(64, 64, dtype=first), nn.Linear(64, 64, dtype=other))
    with pytest.raises(ValueError, match=r"computes in bfloat16 on CUDA, and the weights are torch\.float16"):
        quantize_component(model, "fp8-dynamic", "transformer")


def test_a_bad_weight_is_named():
    model = Model()
    with torch.no_grad():
        model.proj_out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'proj_out'.*NaN or infinity"):
        quantize_component(model, "int8", "transformer")


def test_multihead_attention_keeps_working():
    model = nn.Sequential(nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 64)).eval()
    _, stats = quantize_component(model, "int8", "encoder")
    assert "MultiheadAttention" in stats["skip_reasons"]["0.out_proj"]
    assert torch.isfinite(model[0](*[torch.randn(1, 5, 64)] * 3)[0]).all()


def test_verbose_logs_each_layer(caplog):
    with caplog.at_level(logging.INFO, logger="llm_dit"):
        quantize_component(Model(), "int8", "transformer", verbose=True)
    assert "to_q: int8" in caplog.text
    assert "norm1.linear: left as it is (transformer filter '*norm*')" in caplog.text


@pytest.mark.parametrize("method", ["fp8-dynamic", "fp8-weight-only", "int4"])
def test_vaes_refuse_all_but_int8(method):
    with pytest.raises(ValueError, match=r"not offered for a vae, because .*: use 'int8'"):
        quantize_vae(nn.Sequential(nn.Conv2d(4, 4, 3)), method)


def test_a_vae_counts_convolutions_and_linears():
    vae = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv3d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3), nn.Linear(8, 8), nn.GroupNorm(2, 8))
    assert quantize_vae(vae) is vae
    assert quantized_names(vae) == {"0", "1", "2", "3"}
    with torch.device("meta"):
        meta = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Embedding(4, 4))
    _, stats = quantize_component(meta, "int8", "vae")
    assert (stats["quantized_layers"], stats["total_layers"]) == (1, 1)


def test_fp8_compatible_layers():
    assert is_fp8_compatible_layer(nn.Linear(64, 32))
    assert not is_fp8_compatible_layer(nn.Linear(64, 30))
    assert not is_fp8_compatible_layer(nn.Linear(60, 32))
    assert not is_fp8_compatible_layer(nn.Conv2d(16, 16, 1))


@pytest.mark.parametrize("method", VALID_METHODS)
def test_the_estimate_is_what_is_then_held(method):
    with torch.device("meta"):
        meta = Model()
    model, stats = quantize_component(Model().to(torch.bfloat16), method, "transformer")
    estimate = estimate_memory(meta, method, "transformer")
    assert estimate.bytes_after == stats["bytes_after"] == model_bytes(model)
    assert estimate.bytes_before == stats["bytes_before"]
    assert estimate.quantized_layers == stats["quantized_layers"]
