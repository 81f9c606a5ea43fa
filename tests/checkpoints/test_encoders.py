"""Text encoders from ComfyUI's files (`encoder_file`): scaled fp8, pruned, under the names of transformers before version 5."""

import re
from functools import cache

import pytest
import torch
from cases import BF16, checkpoint, same_bits, same_weights
from conftest import generate, relative_error
from diffusers import DiffusionPipeline
from official_names import comfy_text_encoder
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Float8Tensor
from writer import FP8, LAYOUTS, with_tensor, without, write

from llm_dit import load_pipeline
from llm_dit.quantization import quantize_component

KINDS = {
    "z-image": "qwen3",
    "flux2-klein": "qwen3",
    "flux2-dev": "mistral3",
    "qwen-image": "qwen2_5_vl",
    "ltx2": "gemma3",
    "ltx2.3": "gemma3",
}
LAYERS = {"flux2-dev": 3}
"""Mistral's file has three quarters of the layers: what FLUX.2 reads."""
LAYOUT_NAMES = ("bf16", "scaled", "scaled-marker", "comfy_quant", "column", "raw", "legacy-input")


@cache
def encoder(source):
    """The bf16 text encoder of a saved pipeline; not to be changed."""
    return DiffusionPipeline.from_pretrained(source, dtype=BF16).text_encoder


def comfy(source, name, state=None, layers=None):
    state = encoder(source).state_dict() if state is None else state
    return comfy_text_encoder(KINDS[name], state, layers=layers or LAYERS.get(name))


@cache
def encoder_file(source, name, layout):
    path = source.with_name(f"{source.name}-encoder-{layout}.safetensors")
    return path, write(path, comfy(source, name), LAYOUTS[layout])


def named(source, name):
    """The names of transformers by those of the file, made from tensors that number them."""
    state = encoder(source).state_dict()
    numbers = {key: torch.full(tensor.shape, float(index)) for index, (key, tensor) in enumerate(state.items())}
    keys = list(state)
    numbered = comfy(source, name, numbers)
    # A head that is the embedding is not in the file, which numbers do not tell.
    present = [key for key, tensor in comfy(source, name).items() if tensor.is_floating_point()]
    return {key: keys[int(numbered[key].flatten()[0])] for key in present}


def load(source, file, **keywords):
    return load_pipeline(source, torch_dtype=BF16, encoder_file=file, **keywords)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", KINDS)
def test_an_encoder_loads_as_it_is(name, layout, tiny):
    source = tiny(name)
    path, values = encoder_file(source, name, layout)
    pipe = load(source, path)
    model, report = pipe.text_encoder, pipe.quantization_report["text_encoder"]
    contents = load_file(path)
    prefix = LAYOUTS[layout].prefix
    expected = {ours: values[theirs] for theirs, ours in named(source, name).items()}
    raw = {ours: contents[prefix + theirs] for theirs, ours in named(source, name).items()}
    kept = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key not in expected:
            assert key.startswith("lm_head."), key
            continue
        module = model.get_submodule(key.rpartition(".")[0])
        matrix = key.endswith(".weight") and isinstance(module, nn.Linear) and not any(size % 16 for size in tensor.shape)
        assert isinstance(tensor, Float8Tensor) == (matrix and raw[key].dtype == FP8), key
        if isinstance(tensor, Float8Tensor):
            kept.add(key)
            assert torch.equal(tensor.qdata.view(torch.uint8), raw[key].view(torch.uint8)), key
            assert torch.equal(tensor.dequantize(torch.float32), expected[key]), key
        else:
            assert same_bits(tensor.detach(), expected[key].to(BF16)), key
    assert report.quantized_layers == len(kept)
    assert report.quantized_layers + len(report.skip_reasons) == report.total_layers
    assert set(report.dequantized) == {key for key, tensor in raw.items() if tensor.dtype == FP8 and key not in kept}
    assert report.method == ("fp8-weight-only" if kept else "none")
    assert (report.backend == "checkpoint") == bool(kept)
    assert pipe.quantization_report["transformer"].method == "none"
    assert torch.isfinite(generate(pipe, name)).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_bf16_file_is_the_model(name, tiny, reference):
    """To the bit, whatever was pruned: nothing that is left out is read."""
    source = tiny(name)
    pipe = load(source, encoder_file(source, name, "bf16")[0])
    assert torch.equal(generate(pipe, name), reference(name))


@pytest.mark.parametrize("name", KINDS)
def test_a_scaled_file_generates_close_to_the_model(name, tiny, reference):
    """Whole pipelines of tiny models, which amplify errors: this says "not broken" and no more."""
    source = tiny(name)
    pipe = load(source, encoder_file(source, name, "scaled-marker")[0])
    assert relative_error(generate(pipe, name), reference(name)) < 0.1


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["bf16", "scaled"])
@pytest.mark.parametrize("name", ["z-image", "qwen-image", "ltx2"])
def test_another_method(name, layout, method, tiny):
    source = tiny(name)
    path, values = encoder_file(source, name, layout)
    pipe = load(source, path, quantization_encoder=method)
    report = pipe.quantization_report["text_encoder"]
    assert (report.method, report.backend) == (method, "torchao")
    assert ("dequantized and quantized again" in report.note) == (layout == "scaled")
    plain = DiffusionPipeline.from_pretrained(source, dtype=BF16).text_encoder
    plain.load_state_dict({ours: values[key].to(BF16) for key, ours in named(source, name).items()}, strict=False)
    plain.tie_weights()
    quantize_component(plain, method, "encoder")
    same_weights(pipe.text_encoder, plain)


def test_what_was_pruned_is_said_and_not_saved(tiny, tmp_path):
    source = tiny("flux2-dev")
    pipe = load(source, encoder_file(source, "flux2-dev", "scaled")[0])
    note = pipe.quantization_report["text_encoder"].note
    assert "layer 3" in note
    assert "vision_tower" in note
    with pytest.raises(ValueError, match="text_encoder was loaded without"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in KINDS if name != "flux2-dev"])
def test_saved_and_loaded_again(name, tiny, tmp_path):
    source = tiny(name)
    pipe = load(source, encoder_file(source, name, "scaled")[0])
    output = generate(pipe, name)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), name), output)
    plain = DiffusionPipeline.from_pretrained(tmp_path, dtype=BF16)
    assert relative_error(generate(plain, name), output) < 1e-6


def test_with_a_transformer_from_a_file(tiny):
    source = tiny("z-image")
    file, _ = checkpoint(source, "z-image", "scaled")
    pipe = load(source, encoder_file(source, "z-image", "scaled")[0], transformer_file=file)
    methods = {report.name: report.method for report in pipe.quantization_report}
    assert methods == {"text_encoder": "fp8-weight-only", "transformer": "fp8-dynamic", "vae": "none"}
    assert torch.isfinite(generate(pipe, "z-image")).all()


def test_a_head_in_fp8_that_the_model_does_not_have(tiny, tmp_path):
    """Z-Image's encoder is a Qwen3Model; some files are of the Qwen3ForCausalLM."""
    source = tiny("z-image")
    path, _ = encoder_file(source, "z-image", "scaled")
    hidden = encoder(source).config.hidden_size
    path = with_tensor(path, "lm_head.weight", torch.ones(512, hidden).to(torch.float8_e4m3fn))
    path = with_tensor(path, "lm_head.weight_scale", torch.tensor(0.1))
    pipe = load_pipeline(source, torch_dtype=BF16, encoder_file=path)
    assert pipe.quantization_report["text_encoder"].method == "fp8-weight-only"


def test_without_its_last_layers_an_encoder_has_no_final_norm(tiny, tmp_path):
    """The pipeline reads what its last layer gives, and a norm that the file holds would change it."""
    source = tiny("flux2-dev")
    state = comfy(source, "flux2-dev")
    norm = next(
        key for key in encoder(source).state_dict() if key.endswith("norm.weight") and "layer" not in key and "vision" not in key
    )
    write(
        tmp_path / "x.safetensors",
        {**state, "model.norm.weight": torch.full_like(encoder(source).state_dict()[norm], 3.0)},
        LAYOUTS["bf16"],
    )
    write(tmp_path / "y.safetensors", state, LAYOUTS["bf16"])
    kept = load_pipeline(source, torch_dtype=BF16, encoder_file=tmp_path / "x.safetensors")
    usual = load_pipeline(source, torch_dtype=BF16, encoder_file=tmp_path / "y.safetensors")
    assert torch.equal(generate(kept, "flux2-dev"), generate(usual, "flux2-dev"))


def test_config_toml_names_the_file(tiny, tmp_path):
    source = tiny("z-image")
    config = tmp_path / "config.toml"
    config.write_text(f'[z_image]\nencoder_file = "{encoder_file(source, "z-image", "scaled")[0]}"\n')
    pipe = load_pipeline(source, torch_dtype=BF16, config=config)
    assert pipe.quantization_report["text_encoder"].backend == "checkpoint"


# --- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_that_is_read_is_missing(layers, tiny, tmp_path):
    source = tiny("flux2-dev")
    write(tmp_path / "x.safetensors", comfy(source, "flux2-dev", layers=layers), LAYOUTS["scaled"])
    with pytest.raises(ValueError, match=rf"does not fill .*layers\.{layers}\."):
        load(source, tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_that_is_missing(name, tiny):
    source = tiny(name)
    path, _ = encoder_file(source, name, "bf16")
    for key in (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ):
        with pytest.raises(ValueError, match=re.escape(key.removeprefix("model."))):
            load(source, without(path, key))


@pytest.mark.parametrize(("name", "other"), [(a, b) for a in KINDS for b in KINDS if KINDS[a] != KINDS[b]])
def test_a_file_of_another_encoder(name, other, tiny):
    path, _ = encoder_file(tiny(other), other, "scaled")
    with pytest.raises(ValueError, match=re.escape(path.name)):
        load(tiny(name), path)


def test_a_transformer_is_no_encoder(tiny):
    source = tiny("z-image")
    file, _ = checkpoint(source, "z-image", "scaled")
    with pytest.raises(ValueError, match=re.escape(file.name)):
        load(source, file)


@pytest.mark.parametrize("name", ["z-image", "flux2-dev"])
def test_scales_that_land_nowhere(name, tiny):
    path, _ = encoder_file(tiny(name), name, "scaled")
    with pytest.raises(ValueError, match=r"model\.norm\.weight_scale"):
        load(tiny(name), with_tensor(path, "model.norm.weight_scale", torch.tensor(0.1)))
    extra = with_tensor(path, "model.layers.0.mlp.extra.weight", torch.ones(16, 16).to(FP8))
    extra = with_tensor(extra, "model.layers.0.mlp.extra.weight_scale", torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.extra\.weight"):
        load(tiny(name), extra)
    key = "model.layers.1.mlp.up_proj.weight_scale"
    with pytest.raises(ValueError, match=re.escape(key)):
        load(tiny(name), with_tensor(path, key, torch.tensor(float("nan"))))


def test_an_encoder_and_a_file_of_one(tiny):
    source = tiny("z-image")
    with pytest.raises(ValueError, match="give one of the two"):
        load(source, encoder_file(source, "z-image", "scaled")[0], text_encoder=encoder(source))
