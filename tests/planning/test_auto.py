"""`quantization="auto"` with a budget: what is planned is what is loaded, and the report compares them."""

from copy import deepcopy

import pytest
import torch
from conftest import encoding_keywords, generate

from llm_dit import load_pipeline
from llm_dit.families.z_image import QuantizableZImageImg2ImgPipeline
from llm_dit.loader import models_of
from llm_dit.planning.card import get_card
from llm_dit.planning.plan import make_plan, plan_keywords
from llm_dit.planning.turns import Turns


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


def test_a_small_vae_is_planned_in_int8_where_that_is_asked_for_or_saved(tiny, tmp_path):
    asked = {"quantization_transformer": "int8", "quantization_vae": "int8"}
    pipe = load_pipeline(tiny("z-image"), quantization="auto", vram_budget="20GB", **asked)
    assert pipe.quantization_report["vae"].method == "int8"
    load_pipeline(tiny("z-image"), quantization={"transformer": "int8", "vae": "int8"}).save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, quantization="auto", vram_budget="20GB")
    assert pipe.quantization_report["vae"].method == "already_quantized"


def test_the_whole_encoder_is_planned_where_it_is_asked_for(tiny):
    held = {}
    for layers in (None, "read", "all"):
        pipe = load_pipeline(tiny("flux2-klein"), quantization="auto", vram_budget="20GB", encoder_layers=layers)
        held[layers] = pipe.quantization_report["text_encoder"].bytes_after
        planned = next(part for part in pipe._recorder.plan.components if part.name == "text_encoder")
        assert held[layers] == pytest.approx(planned.weights, rel=0.01)
    assert held[None] == held["read"] < held["all"]


def test_a_file_that_the_configuration_names_is_not_planned_around(tiny, tmp_path):
    (tmp_path / "config.toml").write_text('[z_image]\ntransformer_file = "x.safetensors"\n')
    with pytest.raises(ValueError, match="leave one of the two out"):
        load_pipeline(tiny("z-image"), quantization="auto", vram_budget="20GB", config=tmp_path / "config.toml")


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


def taking_turns(tiny, name, device):
    """A pipeline whose text encoder and transformer take turns on `device`."""
    pipe = load_pipeline(tiny(name), quantization="int8", torch_dtype=torch.bfloat16)
    pipe._turns = Turns(models_of(pipe), pipe.family.encoding.encoders, torch.device(device))
    return pipe


@pytest.fixture
def moves(monkeypatch):
    """Which models were moved, by the pipeline and name of each, in the order of the moves; they stay where they are."""
    made, pipes = [], {}

    def move(models, device):
        names = {id(model): (which, name) for which, pipe in pipes.items() for name, model in models_of(pipe).items()}
        made.extend(names[id(model)] for model in models if names)

    monkeypatch.setattr("llm_dit.planning.turns.move_models", move)
    return made, pipes


def test_each_comes_when_it_is_about_to_run(tiny, moves):
    made, pipes = moves
    pipes["one"] = pipe = taking_turns(tiny, "z-image", "cpu")
    made.clear()
    generate(pipe, "z-image")
    assert [name for _, name in made] == ["transformer", "vae", "text_encoder", "text_encoder", "vae", "transformer"]
    made.clear()
    pipe._turns.take(encoding=False)
    assert made == []  # its turn lasts


def test_a_turn_that_failed_is_taken_again(tiny, monkeypatch):
    pipe = taking_turns(tiny, "z-image", "cpu")
    pipe._turns.take(encoding=True)

    def fail(models, device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("llm_dit.planning.turns.move_models", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pipe._turns.take(encoding=False)
    seen = []
    monkeypatch.setattr("llm_dit.planning.turns.move_models", lambda models, device: seen.extend(models))
    pipe._turns.take(encoding=True)
    assert pipe.text_encoder in seen


def test_a_copy_moves_its_own_models(tiny, moves):
    made, pipes = moves
    pipes["one"] = taking_turns(tiny, "z-image", "cpu")
    pipes["copy"] = deepcopy(pipes["one"])
    made.clear()
    generate(pipes["copy"], "z-image")
    assert {which for which, _ in made} == {"copy"}
    made.clear()
    deepcopy(pipes["one"].text_encoder)(torch.ones(1, 4, dtype=torch.int64))
    assert made == []  # a model that was copied alone stays where it is


def test_a_sibling_takes_the_turns_of_the_models_it_shares(tiny, moves):
    made, pipes = moves
    one = taking_turns(tiny, "z-image", "cpu")
    pipes["sibling"] = sibling = QuantizableZImageImg2ImgPipeline.from_pipe(one)
    del one
    made.clear()
    generate(sibling, "z-image-img2img")
    assert ("sibling", "text_encoder") in made
    assert sibling._turns.device == torch.device("cpu")


def test_what_takes_turns_is_not_moved_to_the_gpu_as_a_whole(tiny, caplog):
    pipe = taking_turns(tiny, "z-image", "cpu")
    assert pipe.to("cuda") is pipe
    assert "planned to take turns" in caplog.text
    assert pipe.transformer.device.type == "cpu"
    assert torch.isfinite(generate(pipe, "z-image")).all()


def test_what_takes_turns_is_still_cast(tiny):
    pipe = load_pipeline(tiny("z-image"), torch_dtype=torch.bfloat16)
    pipe._turns = Turns(models_of(pipe), pipe.family.encoding.encoders, torch.device("cpu"))
    pipe.to("cuda", torch.float32)
    assert {model.dtype for model in models_of(pipe).values()} == {torch.float32}


@pytest.mark.gpu
def test_turns_go_on_after_other_moves(tiny):
    pipe = taking_turns(tiny, "flux2-klein", "cuda")
    expected = generate(pipe, "flux2-klein").cpu()
    pipe.to("cpu")
    assert torch.allclose(generate(pipe, "flux2-klein").cpu(), expected, atol=0.05)
    pipe.encode_then_free("a red circle", **encoding_keywords("flux2-klein"))
    assert torch.allclose(generate(pipe, "flux2-klein").cpu(), expected, atol=0.05)
    assert torch.allclose(generate(deepcopy(pipe), "flux2-klein").cpu(), expected, atol=0.05)


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
