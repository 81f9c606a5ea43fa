"""Encoding first and freeing what encoded, and leaving out what nothing reads: to the bit the same pictures."""

import gc

import diffusers
import pytest
import torch
from conftest import encoding_keywords, generate, tensors_of

from llm_dit import load_pipeline
from llm_dit.estimate import estimate_pipeline
from llm_dit.tiny import get

NAMES = ("flux2-klein", "flux2-dev", "z-image", "qwen-image", "ltx2", "ltx2.3")
READ_PARTLY = ("flux2-klein", "flux2-dev", "z-image")
WAYS = {
    "bf16": {},
    "int8": {"quantization": {"encoder": "int8"}},
    "int4": {"quantization": {"encoder": "int4"}},
    "fp8": {"quantization": {"encoder": "fp8-weight-only"}},
    "layerwise": {"quantization": {"encoder": "fp8-weight-only"}, "quantization_backend": "layerwise"},
}


def encoded(pipe, name, **keywords):
    """What the pipeline generates from a prompt that was encoded before."""
    pipe.set_progress_bar_config(disable=True)
    call = get(name).call()
    given = {key: call.pop(key) for key in ("prompt", "negative_prompt") if key in call}
    return tensors_of(pipe(**pipe.encode_then_free(**given, **keywords(call) if callable(keywords) else keywords), **call))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_encoded_prompt_gives_the_picture_of_the_prompt(name, drop, tiny, reference):
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16)
    call = get(name).call()
    assert torch.equal(encoded(pipe, name, drop=drop, **encoding_keywords(name)), reference(name)), call.keys()
    assert (pipe.text_encoder is None) == drop
    assert "text_encoder: " in str(pipe.quantization_report)
    assert ("dropped" if drop else "kept on the host") in str(pipe.quantization_report)


@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image", "ltx2.3"])
def test_two_prompts_one_after_the_other(name, tiny):
    pipe = load_pipeline(tiny(name), quantization={"transformer": "int8", "encoder": "int8"})
    first = encoded(pipe, name, **encoding_keywords(name))
    assert torch.equal(encoded(pipe, name, **encoding_keywords(name)), first)
    assert str(pipe.quantization_report).count("freed from") == 1


def test_guidance_takes_the_negative_prompt_that_the_pipeline_would(tiny):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    call = {**get("z-image").call(), "guidance_scale": 4.0}
    expected = tensors_of(pipe(**call))
    call = {**get("z-image").call(), "guidance_scale": 4.0}
    prompt = call.pop("prompt")
    arguments = pipe.encode_then_free(prompt, **encoding_keywords("z-image"))
    assert torch.equal(tensors_of(pipe(**arguments, **call)), expected)


def test_what_cannot_encode_says_so(tiny):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16)
    pipe.encode_then_free("a cat", drop=True)
    with pytest.raises(ValueError, match="has no text_encoder to encode with"):
        pipe.encode_then_free("a cat")
    with pytest.raises(ValueError, match="has no text_encoder"):
        load_pipeline(tiny("ltx2-latent-upsample"), dtype=torch.bfloat16).encode_then_free("a cat")


def test_group_offloaded_pipelines_are_refused(tiny):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="transformer is offloaded, which moves the models itself"):
        pipe.encode_then_free("a cat")


def test_offloaded_pipelines_are_refused(tiny):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="is offloaded"):
        pipe.encode_then_free("a cat")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_the_larger_half(name, tiny):
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16)
    expected = generate(pipe.to("cuda"), name).cpu()  # and makes the workspaces that stay
    encoder = sum(parameter.nbytes for parameter in pipe.text_encoder.parameters())
    pipe.to("cpu")
    outputs = []
    whole = peak_of(lambda: outputs.append(generate(pipe.to("cuda"), name).cpu()))
    pipe.to("cpu")
    start = torch.cuda.memory_allocated()
    assert peak_of(lambda: outputs.append(encoded(pipe, name, **encoding_keywords(name)).cpu())) <= whole - 0.9 * encoder
    torch.cuda.reset_peak_memory_stats()
    outputs.append(encoded(pipe, name, **encoding_keywords(name)).cpu())  # what is on the device leaves it for the text encoder
    assert torch.cuda.max_memory_allocated() - start <= whole - 0.9 * encoder
    assert all(torch.equal(output, expected) for output in outputs)


def peak_of(run) -> int:
    """Bytes on the device at most while `run` runs, above those before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


# --- encoder_layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", READ_PARTLY)
def test_what_nothing_reads_is_left_out(name, way, tiny):
    whole = load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way])
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, encoder_layers="read", **WAYS[way])
    assert torch.equal(generate(pipe, name), generate(whole, name))
    ours, theirs = pipe.quantization_report["text_encoder"], whole.quantization_report["text_encoder"]
    assert ours.method == theirs.method
    assert ours.bytes_after < 0.85 * theirs.bytes_after
    assert "left out, because nothing reads it: layer 3" in ours.note
    assert type(pipe.text_encoder) is type(whole.text_encoder)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8-weight-only"])
def test_of_a_folder_that_was_saved_quantized(method, tiny, tmp_path):
    load_pipeline(tiny("flux2-klein"), quantization={"encoder": method}).save_pretrained(tmp_path)
    whole = load_pipeline(tmp_path)
    pipe = load_pipeline(tmp_path, encoder_layers="read")
    assert torch.equal(generate(pipe, "flux2-klein"), generate(whole, "flux2-klein"))
    assert pipe.quantization_report["text_encoder"].bytes_after < whole.quantization_report["text_encoder"].bytes_after


@pytest.mark.parametrize("name", ["qwen-image", "ltx2.3"])
def test_families_that_read_all(name, tiny, reference):
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, encoder_layers="read")
    assert torch.equal(generate(pipe, name), reference(name))


def test_what_was_left_out_is_not_asked_for(tiny, tmp_path):
    pipe = load_pipeline(tiny("flux2-dev"), dtype=torch.bfloat16, encoder_layers="read")
    with pytest.raises(ValueError, match="text_encoder_out_layers asks for layer 4"):
        pipe.encode_prompt("a cat", text_encoder_out_layers=(1, 2, 4))
    with pytest.raises(ValueError, match="upsampling a prompt needs the whole text encoder"):
        pipe.upsample_prompt("a cat")
    with pytest.raises(ValueError, match="loaded without"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown encoder_layers 'red'"):
        load_pipeline(tiny("flux2-dev"), encoder_layers="red")


def test_a_text_encoder_that_was_passed_stays_whole(tiny):
    plain = diffusers.DiffusionPipeline.from_pretrained(tiny("z-image"), dtype=torch.bfloat16)
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, encoder_layers="read", text_encoder=plain.text_encoder)
    assert pipe.text_encoder is plain.text_encoder
    assert "left out" not in str(pipe.quantization_report)


@pytest.mark.parametrize(("model", "share"), [("klein-9b", 0.29), ("flux2-dev", 0.28), ("z-image-turbo", 0.025)])
def test_the_estimate_knows_both(model, share):
    """The shares of the parameters: of Qwen3-8B nine layers and the head, of Mistral ten, its head and what sees."""
    result = estimate_pipeline(model)
    (reading,) = result.reading
    whole = next(component for component in result.components if component.name == "text_encoder")
    assert 1 - reading.parameters / whole.parameters == pytest.approx(share, abs=0.015)
    encoder, rest = whole.bytes_for("none"), result.held("none") - whole.bytes_for("none")
    assert result.held_at_once("none") == max(encoder, rest)


@pytest.mark.parametrize("name", READ_PARTLY)
def test_the_estimate_is_what_is_then_held(name, tiny):
    (reading,) = estimate_pipeline(str(tiny(name))).reading
    for method in ("none", "int8"):
        pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, quantization={"encoder": method}, encoder_layers="read")
        assert pipe.quantization_report["text_encoder"].bytes_after == pytest.approx(reading.bytes_for(method), rel=0.01)
