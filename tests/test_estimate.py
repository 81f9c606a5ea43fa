"""Estimates of whole pipelines, and recommendations made from them."""

import json

import pytest
import torch

from llm_dit import load_pipeline
from llm_dit.estimate import estimate_pipeline
from llm_dit.quantization import VALID_METHODS, Hardware
from llm_dit.recommend import recommend, total_bytes
from llm_dit.tiny import get, tiny_pipelines

GIB = 1024**3
PUBLISHED = ("klein-4b", "klein-9b", "flux2-dev", "z-image-turbo", "qwen-image", "qwen-image-2.1", "ltx-2", "ltx-2.3")


@pytest.mark.parametrize("name", ["z-image", "z-image-controlnet", "flux2-klein", "flux2-dev", "qwen-image", "ltx2", "ltx2.3"])
@pytest.mark.parametrize("method", ["none", "fp8-dynamic", "int8", "int4"])
def test_estimates_are_what_is_then_held(name, method, tiny):
    quantization = {"transformer": method, "encoder": method, "vae": "int8" if method == "int8" else "none"}
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, quantization=quantization)
    for component in estimate_pipeline(str(tiny(name))).components:
        held = pipe.quantization_report[component.name].bytes_after
        expected = component.bytes_for(quantization[component.role])
        assert expected == pytest.approx(held, rel=0.01), component.name


def test_estimates_of_a_saved_quantized_folder_are_its_bytes(tiny, tmp_path):
    pipe = load_pipeline(tiny("z-image"), quantization={"transformer": "int8", "encoder": "int4"})
    pipe.save_pretrained(tmp_path)
    for component in estimate_pipeline(str(tmp_path)).components:
        held = pipe.quantization_report[component.name].bytes_after
        assert component.bytes_for("none") == pytest.approx(held, rel=0.01)
        assert bool(component.saved) is (component.role != "vae")


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_by_name(model):
    estimate = estimate_pipeline(model)
    json.dumps(estimate.to_dict())
    for component in estimate.components:
        dense = component.bytes_for("none")
        assert dense == pytest.approx(2 * component.parameters, rel=0.01)
        if component.role == "vae":
            assert set(component.methods) == {"none", "int8"}
            assert component.bytes_for("int8") <= 0.55 * dense
        else:
            assert set(component.methods) == set(VALID_METHODS)
        if component.role == "transformer":
            assert component.bytes_for("int8") < 0.51 * dense
            assert component.bytes_for("int4") < 0.29 * dense


def test_classes_stand_for_the_published_model():
    by_class = estimate_pipeline("QuantizableLTX2ConditionPipeline")
    assert by_class.pipeline_class == "LTX2ConditionPipeline"
    assert [c.parameters for c in by_class.components] == [c.parameters for c in estimate_pipeline("ltx-2").components]
    assert (
        estimate_pipeline("Flux2KleinPipeline").components[1].parameters == estimate_pipeline("klein-4b").components[1].parameters
    )


@pytest.mark.parametrize("name", [row.pipeline_class for row in tiny_pipelines().values()])
def test_every_class_can_be_estimated(name):
    assert estimate_pipeline(name).components


def test_unknown_sources_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'klein-9b'"):
        estimate_pipeline("klein9b")


def card(gib, capability=(8, 9)):
    return Hardware("a card", capability, gib * GIB)


@pytest.mark.parametrize(
    ("gib", "transformer", "encoder"),
    [(80, "fp8-dynamic", "none"), (24, "fp8-dynamic", "int8"), (20, "int4", "int8"), (16, "int4", "int4")],
)
def test_recommendations_compress_only_as_far_as_needed(gib, transformer, encoder):
    result = recommend(card(gib), estimate_pipeline("klein-9b"))
    assert (result.methods["transformer"], result.methods["encoder"]) == (transformer, encoder)


def test_a_saved_method_is_not_recommended_against(tiny, tmp_path):
    load_pipeline(tiny("z-image"), quantization="int8").save_pretrained(tmp_path)
    found = recommend(card(24), estimate_pipeline(str(tmp_path)))
    assert list(found.methods) == ["encoder", "vae"]
    assert "transformer: saved quantized, and loaded as it was saved: ask for nothing" in found.reasons
    assert "transformer as saved, encoder none" in found.reasons[-1]


def test_recommendations_know_the_card():
    estimate = estimate_pipeline("klein-4b")
    assert recommend(card(24, (8, 6)), estimate).methods["transformer"] == "int8"
    assert recommend(card(24, (8, 9)), estimate).methods["transformer"] == "fp8-dynamic"
    assert recommend(Hardware("CPU", None, 0)).methods["transformer"] == "int8"
    assert "no fp8 tensor cores" in recommend(card(24, (8, 6))).reasons[0]


def test_what_does_not_fit_is_told_what_to_do():
    result = recommend(card(8), estimate_pipeline("flux2-dev"))
    assert "enable_model_cpu_offload" in result.reasons[-1]


def test_a_large_vae_is_worth_int8():
    assert recommend(card(80), estimate_pipeline("ltx-2")).methods["vae"] == "int8"
    assert recommend(card(80), estimate_pipeline("z-image-turbo")).methods["vae"] == "none"


def test_totals():
    estimate = estimate_pipeline("z-image-turbo")
    dense = total_bytes(estimate, {"transformer": "none", "encoder": "none", "vae": "none"})
    assert dense == sum(component.bytes_for("none") for component in estimate.components)
    assert get("z-image").pipeline_class == estimate.pipeline_class
