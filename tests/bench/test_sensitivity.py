"""`bench sensitivity` on a tiny pipeline: what it chooses, loaded as it writes it, is what it measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_dit import load_pipeline
from llm_dit.bench import sensitivity
from llm_dit.bench.picture_metrics import psnr
from llm_dit.bench.pictures import pictures_of
from llm_dit.bench.quality import scene_captions
from llm_dit.cli import app
from llm_dit.generate import GenerateOptions, call_arguments

pytest.importorskip("skimage")
pytest.importorskip("flip_evaluator")
CALL = {"height": 64, "width": 64, "num_inference_steps": 2}
PROMPTS = scene_captions(1)


@pytest.fixture(scope="module")
def trial(tiny):
    return sensitivity.Sensitivity(sensitivity.Options(str(tiny("z-image")), "int4", PROMPTS, call=CALL))


@pytest.fixture(scope="module")
def rows(trial):
    return list(trial.rows())


def test_groups_are_all_layers(trial, rows, tiny):
    report = load_pipeline(tiny("z-image"), quantization="int4").quantization_report["transformer"]
    assert sum(row["layers"] for row in rows) == report.quantized_layers
    assert all(row["error"] > 0 and row["bytes_saved"] > 0 for row in rows)
    assert trial.measure(()).bytes == report.bytes_after
    bf16 = trial.measure(list(trial.groups))
    assert bf16.psnr == 100
    assert bf16.bytes - sum(row["bytes_saved"] for row in rows) == report.bytes_after


def test_the_model_is_put_back(trial, rows):
    assert rows
    latents, pictures = trial.generate()
    assert all(np.array_equal(one, other) for one, other in zip(pictures, trial.reference[1], strict=True))
    assert all((one == other).all() for one, other in zip(latents, trial.reference[0], strict=True))


def test_the_choice_holds_what_was_asked(trial, rows):
    uniform = trial.measure(())
    wanted = uniform.psnr + 3
    mix = trial.best(rows, wanted)
    assert mix.psnr >= wanted
    assert uniform.bytes < mix.bytes
    fewer = trial.measure(mix.skip[:-1])
    assert fewer.psnr < wanted
    assert trial.best(rows, 0).skip == ()
    with pytest.raises(ValueError, match="cannot hold 99 dB"):
        trial.best(rows, 99)


def test_it_goes_on_from_the_rows_of_the_same_question_alone(trial, rows, tmp_path, monkeypatch):
    place = tmp_path / "rows.json"
    marked = [{**row, "psnr": 1.0} for row in rows]
    place.write_text(json.dumps([{**marked[0], "question": "another"}, *marked[1:]]))
    monkeypatch.setattr(trial, "options", replace(trial.options, output=place))
    found = list(trial.rows())
    assert found[1:] == marked[1:]
    assert found[0] == rows[0]
    assert [row["question"] == "another" for row in json.loads(place.read_text())] == [True, *[False] * len(rows)]


def test_what_it_writes_loads_as_it_was_measured(trial, rows, tiny, tmp_path):
    mix = trial.best(rows, trial.measure(()).psnr + 3)
    (tmp_path / "config.toml").write_text(sensitivity.toml_of("z_image", "int4", mix))
    pipe = load_pipeline(tiny("z-image"), config=tmp_path / "config.toml")
    assert pipe.quantization_report["transformer"].bytes_after == mix.bytes
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, GenerateOptions(str(tiny("z-image")), PROMPTS[0], tmp_path, call=CALL, seed=0))
    (picture,) = pictures_of(pipe(**{**arguments, "output_type": "np"}))
    assert psnr(trial.reference[1][0], picture) == pytest.approx(mix.psnr)


def test_the_command_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    size = ["--height", "64", "--width", "64", "--steps", "1", "--by", "block", "--psnr", "5"]
    command = ["bench", "sensitivity", str(tiny("z-image")), "--captions", "1", *size, "-o", str(tmp_path / "rows.json")]
    result = CliRunner().invoke(app, [*command, "--toml", str(tmp_path / "config.toml")])
    assert result.exit_code == 0, result.output
    assert "all groups: " in result.output
    assert "[z_image]" in (tmp_path / "config.toml").read_text()

    result = CliRunner().invoke(app, [*command, "--psnr", "99"])
    assert "cannot hold 99 dB" in str(result.exception)
    assert "| layers.0 |" in result.output  # what was measured is shown all the same

    def again(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity.Sensitivity, "_row", again)
    result = CliRunner().invoke(app, [*command, "--json"])
    assert {row["group"] for row in json.loads(result.output[result.output.index("{") :])["groups"]} >= {"layers.0", "layers.1"}


@given(index=st.integers(0, 99))
def test_groups(index):
    assert sensitivity.group_of(f"transformer_blocks.{index}.attn.to_out.0", "kind") == "transformer_blocks.*.attn.to_out.0"
    assert sensitivity.group_of(f"transformer_blocks.{index}.attn.to_out.0", "block") == f"transformer_blocks.{index}"
    assert sensitivity.group_of("proj_in", "kind") == "proj_in"
