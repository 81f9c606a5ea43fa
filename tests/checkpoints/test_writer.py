"""The writer itself: its names against diffusers' converters, its values against what safetensors reads back."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ltx2_audio_vae_to_diffusers,
    convert_ltx2_transformer_to_diffusers,
    convert_ltx2_vae_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from official_names import comfy_text_encoder, ltx_monolith, official_names
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from writer import FP8, LAYOUTS, truncated, with_duplicate_key, with_header, with_tensor, without, write

from llm_dit.tiny import build

FAMILIES = {
    "flux2-klein": "flux2",
    "flux2-dev": "flux2",
    "ltx2": "ltx2",
    "ltx2.3": "ltx2",
    "z-image": "z_image",
    "qwen-image": "qwen_image",
}
CONVERTERS = {
    "flux2": convert_flux2_transformer_checkpoint_to_diffusers,
    "ltx2": convert_ltx2_transformer_to_diffusers,
    "z_image": convert_z_image_transformer_checkpoint_to_diffusers,
    "qwen_image": dict,
}
COMPONENTS = ("transformer", "connectors", "vae", "audio_vae", "vocoder")

# Of scripts/convert_ltx2_to_diffusers.py, and what LTX-2.3 adds to it.
CONNECTORS = (
    ("video_embeddings_connector", "video_connector"),
    ("audio_embeddings_connector", "audio_connector"),
    ("transformer_1d_blocks", "transformer_blocks"),
    ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
    ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
    ("text_embedding_projection.aggregate_embed", "text_proj_in"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)
VOCODER = (
    ("ups.", "upsamplers."),
    ("resblocks", "resnets"),
    ("conv_pre", "conv_in"),
    ("conv_post", "conv_out"),
    ("act_post", "act_out"),
    ("downsample.lowpass.filter", "downsample.filter"),
)


@cache
def pipeline(name):
    return build(name)


def official(name):
    return official_names(FAMILIES[name], pipeline(name).transformer.state_dict())


def renamed(state, renames):
    result = {}
    for key, tensor in state.items():
        name = key
        for old, new in renames:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def with_prefix(state, *prefixes):
    return {key.removeprefix("model.diffusion_model."): value for key, value in state.items() if key.startswith(prefixes)}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def converted_ltx2(state):
    renames = ((f"{prefix}prompt_adaln_single.", f"{prefix}prompt_adaln.") for prefix in ("audio_", ""))
    return renamed(convert_ltx2_transformer_to_diffusers(dict(state)), renames=tuple(renames))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_converters_of_diffusers_undo_the_names(name):
    convert = converted_ltx2 if FAMILIES[name] == "ltx2" else CONVERTERS[FAMILIES[name]]
    assert_same(convert(official(name)), pipeline(name).transformer.state_dict())


def test_the_converter_of_diffusers_does_not_know_two_names_of_ltx_2_3():
    converted = convert_ltx2_transformer_to_diffusers(official("ltx2.3"))
    unknown = converted.keys() - pipeline("ltx2.3").transformer.state_dict().keys()
    assert len(unknown) == 12
    assert all("prompt_adaln_single." in key for key in unknown)


@pytest.mark.parametrize("name", ["ltx2", "ltx2.3"])
def test_a_monolith_holds_every_component_under_its_own_prefix(name):
    states = {component: getattr(pipeline(name), component).state_dict() for component in COMPONENTS}
    monolith = ltx_monolith(states)
    assert len(monolith) == sum(map(len, states.values()))
    connectors = ("model.diffusion_model.video_emb", "model.diffusion_model.audio_emb", "text_embedding_projection.")
    assert_same(converted_ltx2(with_prefix(monolith, "model.")), states["transformer"])
    assert_same(renamed(with_prefix(monolith, *connectors), CONNECTORS), states["connectors"])
    assert_same(convert_ltx2_vae_to_diffusers(with_prefix(monolith, "vae.")), states["vae"])
    assert_same(convert_ltx2_audio_vae_to_diffusers(with_prefix(monolith, "audio_vae.")), states["audio_vae"])
    vocoder = {key.removeprefix("vocoder."): value for key, value in with_prefix(monolith, "vocoder.").items()}
    assert_same(renamed(vocoder, VOCODER), states["vocoder"])


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("z-image", "qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("flux2-klein", "qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen-image", "qwen2_5_vl", "visual.blocks.0.attn.qkv.weight"),
        ("ltx2", "gemma3", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("flux2-dev", "mistral3", "model.layers.2.mlp.down_proj.weight"),
    ],
)
def test_text_encoders_have_the_names_of_comfyui(tmp_path, name, kind, expected):
    tensors = comfy_text_encoder(kind, pipeline(name).text_encoder.state_dict(), layers=3)
    assert {"model.embed_tokens.weight", expected} <= tensors.keys()
    assert not any("language_model" in key or key.startswith("model.layers.3.") for key in tensors)
    values = write(tmp_path / "x.safetensors", tensors, LAYOUTS["scaled-marker"])
    assert values.keys() == {key for key, tensor in tensors.items() if tensor.is_floating_point()}
    assert "scaled_fp8" in load_file(tmp_path / "x.safetensors")


def scale_of(stored, layer):
    names = [f"{layer}.{name}" for name in ("weight_scale", "scale_weight") if f"{layer}.{name}" in stored]
    return stored[names[0]].reshape(-1, 1) if names else torch.ones(())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_stands_for_the_values_that_writing_returns(tmp_path, name, layout):
    tensors = official(name)
    values = write(tmp_path / "x.safetensors", tensors, layout, metadata={"config": "{}"})
    stored = {key.removeprefix(layout.prefix): value for key, value in load_file(tmp_path / "x.safetensors").items()}
    assert values.keys() == tensors.keys()
    quantized = [key for key in tensors if stored[key].dtype == FP8]
    biases = len(quantized) - sum(layout.covers(key, tensor) for key, tensor in tensors.items())
    assert biases >= 0 if layout.biases else biases == 0
    for key in tensors:
        read = stored[key].float()
        read = read * scale_of(stored, key.removesuffix(".weight")) if key in quantized else read
        assert torch.equal(read.reshape(values[key].shape), values[key])
        if layout.scale:
            assert torch.allclose(values[key], tensors[key].float(), rtol=0.07, atol=1e-3 * tensors[key].abs().max().item())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("config") == "{}"
    listed = json.loads(metadata["_quantization_metadata"])["layers"] if layout.metadata else {}
    assert listed.keys() == ({layout.prefix + key.removesuffix(".weight") for key in quantized} if layout.metadata else set())


def test_layouts_differ_as_published(tmp_path):
    tensors = official("flux2-dev")

    def shapes(layout):
        write(tmp_path / "x.safetensors", tensors, LAYOUTS[layout], input_scales={"single_blocks.0.linear1": 0.5})
        stored = load_file(tmp_path / "x.safetensors")
        layer = "single_blocks.0.linear1."
        return {key.removeprefix(layer): tuple(value.shape) for key, value in stored.items() if key.startswith(layer)} | {
            key: tuple(value.shape) for key, value in stored.items() if key == "scaled_fp8"
        }

    rows, columns = tensors["single_blocks.0.linear1.weight"].shape
    weight = {"weight": (rows, columns)}
    assert shapes("bf16") == shapes("raw") == weight
    assert shapes("scaled") == shapes("mixed") == {**weight, "weight_scale": (), "input_scale": ()}
    assert shapes("scaled-one") == {**weight, "weight_scale": (1,), "input_scale": (1,)}
    assert shapes("row") == shapes("fp8r") == {**weight, "weight_scale": (rows,)}
    assert shapes("column") == {**weight, "weight_scale": (rows, 1)}
    assert shapes("comfy_quant") == {**weight, "weight_scale": (), "comfy_quant": (27,)}
    assert shapes("legacy") == {**weight, "scale_weight": (1,), "scaled_fp8": (2,)}
    assert shapes("legacy-input") == {**weight, "scale_weight": (), "scale_input": (), "scaled_fp8": (0,)}


def test_what_goes_to_fp8(tmp_path):
    def stored(name, layout):
        write(tmp_path / "x.safetensors", official(name), LAYOUTS[layout])
        return {key for key, value in load_file(tmp_path / "x.safetensors").items() if value.dtype == FP8}

    blocks = stored("flux2-dev", "scaled")
    assert len(blocks) == 2 * 8 + 2 * 2
    assert blocks - stored("flux2-dev", "mixed") == {key for key in blocks if "_attn." in key}
    assert stored("flux2-dev", "raw-linears") - blocks >= {"img_in.weight", "final_layer.adaLN_modulation.1.weight"}
    assert stored("ltx2.3", "raw-biases") == {
        name for key in stored("ltx2.3", "scaled") for name in (key, f"{key.removesuffix('weight')}bias")
    }
    assert stored("z-image", "raw") == official("z-image").keys()
    # Two widths are no multiple of 16 unless the layout does not care.
    assert "single_blocks.0.linear1.weight" not in stored("flux2-klein", "scaled")


def test_input_scales_are_those_given(tmp_path):
    file = tmp_path / "x.safetensors"
    write(file, official("flux2-dev"), LAYOUTS["scaled"], input_scales={"single_blocks.0.linear1": 0.5})
    stored = load_file(file)
    assert stored["single_blocks.0.linear1.input_scale"] == 0.5
    assert stored["single_blocks.0.linear2.input_scale"] != 0.5


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "x.safetensors", {"a.weight": torch.ones(16, 16), "b": torch.zeros(3)}, LAYOUTS["bf16"], {"k": "v"})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "break_it",
    [
        truncated,
        lambda path: with_header(path, lambda header: header["b"].update(data_offsets=[0, 1])),
        lambda path: with_header(path, lambda header: {"b": header["b"]}),
    ],
)
def test_safetensors_refuses_what_is_broken(file, break_it):
    with pytest.raises(SafetensorError):
        load_file(break_it(file))
    assert load_file(file).keys() == {"a.weight", "b"}


def test_safetensors_does_not_notice_that_a_name_is_there_twice(file):
    twice = with_duplicate_key(file, "b")
    assert load_file(twice).keys() == {"a.weight", "b"}
    header = twice.read_bytes()[8:].split(b"}}")[0].decode()
    assert header.count('"b":') == 2


def test_sound_copies_differ_in_one_tensor(file):
    more = with_tensor(file, "c.weight", torch.ones(2))
    assert load_file(more).keys() == {"a.weight", "b", "c.weight"}
    less = without(file, "b")
    assert less != without(file, "a.weight")
    assert load_file(less).keys() == {"a.weight"}
    with safe_open(less, framework="pt") as opened:
        assert opened.metadata() == {"k": "v"}
