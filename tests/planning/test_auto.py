"""`quantization="auto"` with a budget: what is planned is what is loaded, and the report compares them."""

import pytest
import torch
from conftest import generate

from llm_dit import load_pipeline
from llm_dit.planning.card import get_card
from llm_dit.planning.plan import make_plan, plan_keywords


@pytest.mark.parametrize("name", ["flux2-klein", "z-image", "qwen-image", "ltx2.3"])
def test_plans_are_carried_out(name, tiny):
    pipe = load_pipeline(tiny(name), quantization="auto", vram_budget="20GB", torch_dtype=torch.bfloat16)
    assert torch.isfinite(generate(pipe, name)).all()
    report = pipe.quantization_report
    for part in pipe._recorder.plan.components:
        assert report[part.name].bytes_after == pytest.approx(part.weights, rel=0.01)
    assert any(note.startswith("the plan: ") for note in report.notes)
    assert any("planned" in note and "held" in note for note in report.notes)


def test_a_plan_in_bf16_is_loaded_in_bf16(tiny):
    pipe = load_pipeline(tiny("z-image"), quantization="auto", vram_budget="20GB")
    assert {model.dtype for model in (pipe.transformer, pipe.text_encoder, pipe.vae)} == {torch.bfloat16}


def test_what_the_caller_chose_is_planned_around(tiny):
    pipe = load_pipeline(tiny("z-image"), quantization="auto", vram_budget="20GB", quantization_transformer="int4")
    assert pipe.quantization_report["transformer"].method == "int4"
    assert pipe.quantization_report["text_encoder"].method == "none"


def test_a_plan_is_loaded_with_the_methods_that_it_names(tiny):
    plan = make_plan(str(tiny("z-image")), 20 * 10**9, get_card("rtx-3060"), fixed={"transformer": "int8", "encoder": "int4"})
    keywords = plan_keywords(plan)
    pipe = load_pipeline(tiny("z-image"), **{**keywords, "compile": False})
    assert {part.name: part.method for part in pipe.quantization_report} == keywords["quantization"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vram_budget": "200MB"}, "does not fit: .* would be enough"),
        ({"vram_budget": 24}, "24 is a number of bytes, and less than a MiB"),
        ({"vram_budget": "much"}, "written 24GB or 22.5GiB"),
        ({"vram_budget": "20GB", "quantization": "int8"}, "give both, or neither"),
        ({"vram_budget": "20GB", "transformer_file": "x.safetensors"}, "leave one of the two out"),
        ({"vram_budget": "20GB", "quantization_transformer": "int9"}, "did you mean 'int8'"),
    ],
)
def test_refusals(keywords, message, tiny):
    with pytest.raises(ValueError, match=message):
        load_pipeline(tiny("z-image"), **{"quantization": "auto", **keywords})


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["encode_then_free", "model", "group"])
@pytest.mark.parametrize("name", ["z-image", "flux2-klein", "flux2-dev", "qwen-image", "ltx2.3"])
def test_placements_on_the_gpu(name, offload, tiny):
    """Each gives the picture of the pipeline on the device, and its phases are measured."""
    from dataclasses import replace

    from llm_dit.planning.placing import carry_out

    whole = load_pipeline(tiny(name), quantization="int8", torch_dtype=torch.bfloat16, device_map="cuda")
    expected = generate(whole, name).cpu()
    plan = make_plan(str(tiny(name)), 20 * 10**9, get_card("h200"), fixed={"transformer": "int8", "encoder": "none"})
    chosen = replace(plan.chosen, candidate=replace(plan.chosen.candidate, offload=offload))
    pipe = load_pipeline(tiny(name), quantization="int8", torch_dtype=torch.bfloat16)
    recorder = carry_out(pipe, replace(plan, chosen=chosen))
    for _ in range(2):
        assert torch.allclose(generate(pipe, name).cpu(), expected, atol=0.05)
    assert set(recorder.to_dict()) == {"load", "encode", "denoise", "decode"}
    assert all(row["allocated"] for row in recorder.to_dict().values())
