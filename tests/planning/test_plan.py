"""What a plan says: it fits, it is the best that does, and it explains itself."""

import json

import pytest
import torch
from typer.testing import CliRunner

from llm_dit import load_pipeline
from llm_dit.bench.calibrate import components_of
from llm_dit.cli import app
from llm_dit.decoding import WHOLE
from llm_dit.estimate import estimate_pipeline
from llm_dit.families import published_models
from llm_dit.forwards import Size
from llm_dit.planning.activations import activation_bytes, make_on_meta, shortened
from llm_dit.planning.candidates import LOSSES, candidates
from llm_dit.planning.card import ANY_CARD, CARDS, CPU, LADDER, get_card, parse_bytes
from llm_dit.planning.plan import make_plan
from llm_dit.planning.sizes import pipeline_sizes

GIB = 2**30
MODEL = "z-image-turbo"
META = torch.device("meta")


def plan(budget, card=ANY_CARD, model=MODEL, **size):
    return make_plan(model, parse_bytes(budget), card, Size(**{"height": 1024, "width": 1024, **size}))


def test_a_larger_budget_never_loses_more():
    losses = [one.shown.candidate.loss for budget in LADDER if (one := make_plan(MODEL, budget, ANY_CARD)).fits]
    streamed = [one.shown.candidate.offload == "group" for budget in LADDER if (one := make_plan(MODEL, budget, ANY_CARD)).fits]
    assert streamed == sorted(streamed, reverse=True)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("budget", ["6GB", "8GB", "12GB", "24GB", "80GB"])
def test_what_fits_fits_and_what_ranks_before_does_not(budget):
    one = plan(budget)
    assert one.fits
    assert all(phase.device <= one.budget for phase in one.shown.phases)
    assert [phase.name for phase in one.shown.phases] == ["load", "encode", "denoise", "decode"]
    assert all("too much" in line or "more that rank" in line for line in one.rejected)
    assert one.would


def test_the_whole_model_in_bf16_where_it_fits():
    one = plan("80GB")
    assert {part.method for part in one.components} == {"none"}
    assert one.shown.candidate.offload == "none"
    assert one.would == ("nothing ranks before it: a larger budget buys nothing",)


def test_what_the_next_budget_buys_is_what_is_planned_there():
    one = plan("8GB")
    assert str(plan("12GB").shown.candidate) in one.would[0]


def test_weights_are_those_of_the_estimate():
    estimate = {part.name: part for part in estimate_pipeline(MODEL).components}
    for part in plan("8GB").components:
        if part.role != "encoder":
            assert part.weights == estimate[part.name].bytes_for(part.method)


def test_nothing_fits():
    one = plan("1GB", height=2048, width=2048)
    assert not one.fits
    assert one.short_by == one.smallest.peak.device - 10**9
    assert "would be enough" in one.would[0]
    assert json.loads(json.dumps(one.to_dict()))["short_by_bytes"] == one.short_by
    enough = parse_bytes(one.would[0].split(" would")[0].replace(" ", ""))
    assert plan(enough, height=2048, width=2048).fits


def test_a_smaller_size_that_would_fit_does():
    big = plan("6GB", height=1024, width=1024, batch=64)
    assert not big.fits
    assert "would fit, with" in big.would[1]
    assert plan("6GB").fits


def test_cards_below_8_9_have_no_fp8():
    for card in (get_card("rtx-3060"), get_card("a100"), CPU):
        one = plan("8GB", card)
        assert not any(part.method.startswith("fp8") for part in one.components)
        assert any("needs compute capability 8.9" in line for line in one.rejected)
    assert plan("8GB", get_card("rtx-3060")).components[1].method == "int8"


def test_fp8_at_half_rate_is_said():
    assert any("half rate" in line for line in plan("8GB", get_card("rtx-4090")).reasons)
    assert not any("half rate" in line for line in plan("8GB", get_card("h200")).reasons)


def test_fragile_blocks_stay_in_bf16_where_there_is_room():
    sizes = pipeline_sizes("ltx-2.3", "read")
    assert sizes.skip == tuple(f"transformer_blocks.{index}" for index in (0, 1, 46, 47))
    transformer = sizes.components["transformer"]
    assert transformer.bytes_for("int8", True) > transformer.bytes_for("int8", False)


def test_candidates_are_told_apart():
    found = candidates(ANY_CARD, 0, True)
    assert len({str(one) + str(one.keep_fragile) for one in found}) == len(found)
    assert all(loss.evidence for rows in LOSSES.values() for loss in rows.values())
    assert not any(one.offload == "group" and one.methods["transformer"] == "none" for one in found)


@pytest.mark.parametrize("name", ["klein-4b", "z-image-turbo", "qwen-image"])
def test_two_blocks_have_the_activations_of_all(name):
    family, makers = components_of(name)
    whole = published_models()[name].components["transformer"]
    size = Size(512, 512)
    short, full = (
        activation_bytes(make_on_meta(make), "transformer", "denoise", "transformer", family.forwards, size)["none"]
        for make in (makers["transformer"], whole)
    )
    assert short == full


def test_shortened_models_have_two_blocks():
    model = make_on_meta(shortened(published_models()["flux2-dev"].components["transformer"]))
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (2, 2)


def test_activations_grow_with_what_is_asked():
    sizes = pipeline_sizes("klein-4b", "read")
    of = lambda **size: sizes.activations("transformer", "denoise", Size(**size), "none")  # noqa: E731
    small = of(height=512, width=512)
    assert small < of(height=1024, width=512) < of(height=1024, width=1024)
    assert small < of(height=512, width=512, references=1) < of(height=512, width=512, references=3)
    assert small < of(height=512, width=512, batch=2)


def test_tiles_take_less():
    sizes = pipeline_sizes(MODEL, "read")
    size = Size(2048, 2048)
    taken = [sizes.activations("vae", "decode", size, cut=cut) for cut in sizes.cuts(size)]
    assert sizes.cuts(size)[0] == WHOLE
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 1000}, "1008 is the nearest|992 is the nearest"),
        ({"width": 0}, "planned for a width from 32 to 16384, not 0"),
        ({"frames": 9}, "makes pictures, and no 9 frames"),
        ({"batch": 0}, "batch must be from 1"),
        ({"references": 1}, "planned without"),
    ],
)
def test_sizes_that_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        plan("24GB", **change)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5GiB", 3 * 2**29), ("512 mib", 2**29), ("8", 8 * 10**9)])
def test_budgets_are_read(text, size):
    assert parse_bytes(text) == size
    assert parse_bytes(size) == size


def run(*words, code=0):
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command():
    text = run(MODEL, "--vram", "8GB", "--card", "rtx-4060")
    assert "denoise" in text
    assert "█" in text
    assert "chosen: transformer" in text
    assert "rejected: " in text
    matrix = run(MODEL, "--vram", "8GB", "--vram", "24GB", "--card", "h100")
    assert "8 GB" in matrix
    assert "24 GB" in matrix


def test_the_command_in_json():
    found = json.loads(run(MODEL, "--vram", "8GB", "--json"))
    assert found["fits"]
    assert found["phases"]["decode"]["device"] <= found["budget_bytes"]
    nothing = json.loads(run(MODEL, "--vram", "500MB", "--json", code=1))
    assert not nothing["fits"]
    assert nothing["short_by_bytes"] > 0
    several = json.loads(run(MODEL, "--vram", "8GB", "--vram", "500MB", "--json"))
    assert [one["fits"] for one in several] == [True, False]
    card = json.loads(run(MODEL, "--card", "rtx-3060", "--json"))
    assert card["budget_bytes"] == CARDS["rtx-3060"].memory_bytes


def test_a_folder_is_planned_as_it_was_saved(tiny, tmp_path):
    from llm_dit import load_pipeline

    load_pipeline(tiny("flux2-dev"), quantization={"transformer": "int4", "encoder": "int8"}).save_pretrained(tmp_path)
    one = make_plan(str(tmp_path), 20 * 10**9, ANY_CARD, Size(64, 64))
    assert [part.method for part in one.components if part.role != "vae"] == ["as saved", "as saved"]
    assert one.shown.candidate.methods["transformer"] == "int4"
    read = load_pipeline(tmp_path, encoder_layers="read").quantization_report
    for part in one.components:
        assert part.weights == pytest.approx(read[part.name].bytes_after, rel=0.01)


def test_a_quantized_repository_is_planned_as_what_lies_in_the_cache(tiny, tmp_path):
    snapshot = tmp_path / "models--me--int8" / "snapshots" / ("0" * 40)
    pipe = load_pipeline(tiny("flux2-klein"), quantization={"transformer": "int8", "encoder": "int4"})
    pipe.save_pretrained(snapshot)
    (tmp_path / "models--me--int8" / "refs").mkdir()
    (tmp_path / "models--me--int8" / "refs" / "main").write_text("0" * 40)
    cache = {"cache_dir": str(tmp_path), "local_files_only": True}
    plan = make_plan("me/int8", 20 * 10**9, get_card("rtx-3060"), encoder_layers="all", **cache)
    for part in plan.components:
        assert part.weights == pytest.approx(pipe.quantization_report[part.name].bytes_after, rel=0.01)
    for file in (snapshot / "transformer").glob("*.safetensors"):
        file.unlink()
    pipeline_sizes.cache_clear()
    with pytest.raises(ValueError, match=r"transformer was saved quantized, .* download them first"):
        make_plan("me/int8", 20 * 10**9, get_card("rtx-3060"), **cache)
