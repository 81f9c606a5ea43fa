"""The command line and the scripts, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import generate, typed
from PIL import Image

from llm_dit import load_pipeline

ROOT = Path(__file__).parent.parent
SMALL = ["--height", "64", "--width", "64", "--steps", "2", "--device", "cpu"]


def run(*arguments, script=None, code=0, fresh=False):
    """Runs `llm-dit` or a script; returns its standard output, or, for a failure, its standard error.

    A script, and with `fresh` a command too, has a process of its own, which takes seconds to import what this one has.
    """
    if script or fresh:
        command = [sys.executable, "-W", "ignore", *([str(ROOT / script)] if script else ["-m", "llm_dit.cli"])]
        words = [*command, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        found, out, error = done.returncode, done.stdout, done.stderr
    else:
        found, out, error = typed(*arguments, cwd=ROOT)
    assert found == code, out + error
    assert "Traceback" not in error
    return error if code else out


def test_help_needs_no_torch():
    code = "import sys, llm_dit.cli; assert not {'torch', 'diffusers', 'transformers', 'torchao'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    text = run("--help", fresh=True)
    assert all(command in text for command in ("generate", "quantize", "recommend", "estimate", "inspect", "demo", "bench"))


@pytest.mark.parametrize(
    ("script", "name", "options"),
    [
        ("pipelines/z_image.py", "z-image", ["--quantization-transformer", "int8"]),
        ("pipelines/flux2.py", "flux2-klein", ["--quantization", "fp8-dynamic", "--quantization-encoder", "int8"]),
        ("pipelines/qwen_image.py", "qwen-image", ["--quantization-vae", "int8", "--guidance", "1.0"]),
    ],
)
def test_scripts_make_pictures(script, name, options, tiny, tmp_path):
    output = tmp_path / "out.png"
    text = run("a red circle", "--model", tiny(name), *options, *SMALL, "-o", output, script=script)
    assert Image.open(output).size == (64, 64)
    assert "not quantized" in text or "int8" in text
    assert list(tmp_path.iterdir()) == [output]


def test_the_ltx2_script_makes_a_clip_with_sound(tiny, tmp_path):
    av = pytest.importorskip("av")
    output = tmp_path / "out.mp4"
    options = ["--model", tiny("ltx2"), "--quantization-transformer", "int8", "--frames", "9", *SMALL]
    run("a red circle", *options, "-o", output, script="pipelines/ltx2.py")
    with av.open(str(output)) as clip:
        assert sum(1 for _ in clip.decode(video=0)) == 9
        assert len(clip.streams.audio) == 1
    assert list(tmp_path.iterdir()) == [output]


def test_generate_is_the_same_code(tiny, tmp_path):
    for command, script in ((["generate"], None), ([], "pipelines/z_image.py")):
        options = ["a red circle", "--model", tiny("z-image"), "--quantization", "int8", *SMALL, "--seed", "3"]
        run(*command, *options, "-o", tmp_path / f"{bool(script)}.png", script=script)
    assert (tmp_path / "True.png").read_bytes() == (tmp_path / "False.png").read_bytes()


def test_a_config_file_and_options_over_it(tiny, tmp_path):
    (tmp_path / "config.toml").write_text('[z_image]\nquantization_transformer = "int4"\nquantization_encoder = "int8"\n')
    options = ["--model", tiny("z-image"), "--config", tmp_path / "config.toml", "--quantization-encoder", "none", *SMALL]
    text = run("generate", "a red circle", *options, "-o", tmp_path / "out.png")
    assert "transformer   transformer  int4" in text
    assert "text_encoder  encoder      none" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a cat"], "which model? give --model"),
        (["generate", "a cat", "--model", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["generate", "a cat", "--model", "TINY", "--quantization", "int9"], "did you mean 'int8'"),
        (["generate", "a cat", "--model", "TINY", "-o", "out.jpg"], "must end in .png"),
        (["generate", "a cat", "--model", "TINY", "-o", "no/such/out.png"], "no folder"),
        (["generate", "a cat", "--model", "TINY", "--frames", "3"], "--frames is for clips: leave it out"),
        (["generate", "a cat", "--model", "TINY", "--vram", "9GB"], "--vram is what --quantization auto plans for"),
        (["generate", "a cat", "--model", "TINY", "--offload", "some"], "unknown offload 'some'"),
        (["generate", "a cat", "--model", "TINY", "--device", "cpu", "--offload", "model"], "runs on the CPU: leave it out"),
        (["generate", "a cat", "--model", "TINY", "--no-compile", "--compile-mode", "default"], "leave one out"),
        (["generate", "a cat", "--model", "TINY", "--config", "none.toml"], "no configuration file"),
        (["generate", "a cat", "--model", "TINY", "--steps", "two"], "--steps"),
        (["generate", "a cat", "--model", "TINY", "--steps", "0"], "--steps"),
        (["generate", "a cat", "--model", "TINY", "--bogus", "1"], "--bogus"),
        (["generate", "a cat", "--model", "TINY", "--quantization-backend", "layerwise"], "has nothing to quantize"),
        (["estimate"], "rgument"),
        (["bogus"], "bogus"),
        (["generate", "a cat", "--model", "TINY", "--compile-mode", "fast"], "unknown compile_mode 'fast'"),
        (["generate", "a cat", "--model", "TINY", "--quantization-granularity", "row"], "did you mean 'per-row'"),
        (["quantize", "TINY", "unwritten", "--quantization", "8bit"], "was removed: use 'int8' instead"),
        (["quantize", "TINY", "TINY"], "exists already"),
        (["quantize", "TINY", "unwritten"], "quantize needs a method"),
        (["quantize", "TINY", "unwritten", "--quantization", "auto"], "to save, name a method"),
        (["quantize", "TINY", "unwritten", "--quantization", "none"], "quantize has nothing to quantize"),
        (["convert", "TINY", "-o", "fp8.bin"], "must end in .safetensors"),
        (["estimate", "z-image-turb"], "did you mean 'z-image-turbo'"),
        (["estimate", "./no"], "there is no folder './no'"),
        (["plan", "no/such/folder", "--vram", "8GB"], "there is no folder"),
        (["inspect", "README.md"], "not a safetensors file"),
        (["inspect", "docs"], "neither a safetensors file nor a folder"),
        (["bench", "load", "--geometry", "2gb"], "unknown geometry"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tiny):
    arguments = [str(tiny("z-image")) if argument == "TINY" else argument for argument in arguments]
    small = SMALL if arguments[0] == "generate" and "--steps" not in arguments else []
    error = run(*arguments, *small, code=2)
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_mistake_ends_the_process_with_code_2():
    assert run("generate", "a cat", code=2, fresh=True) == "error: which model? give --model a folder or a repository id\n"


def test_a_script_refuses_another_familys_model(tiny):
    error = run("a cat", "--model", tiny("flux2-klein"), code=2, script="pipelines/z_image.py")
    assert "holds a FLUX.2 pipeline: use pipelines/flux2.py" in error


def test_quantize_saves_nothing_of_an_interrupted_run(tiny, tmp_path):
    stale = tmp_path / "out.part" / "old_component" / "config.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    run("quantize", tiny("z-image"), tmp_path / "out", "--quantization", "int8")
    assert not (tmp_path / "out" / "old_component").exists()
    assert not (tmp_path / "out.part").exists()


def test_quantize_saves_what_then_loads(tiny, tmp_path):
    run("quantize", tiny("z-image"), tmp_path / "out", "--quantization", "int4", "--quantization-encoder", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    saved = load_pipeline(tmp_path / "out")
    fresh = load_pipeline(tiny("z-image"), quantization={"transformer": "int4", "encoder": "int8"})
    assert torch.equal(generate(saved, "z-image"), generate(fresh, "z-image"))


def test_estimate_and_recommend(tiny):
    data = json.loads(run("estimate", tiny("z-image"), "--json"))
    assert set(data["components"]) == {"text_encoder", "transformer", "vae"}
    assert "8.49 GiB" in run("estimate", "klein-9b")
    advice = json.loads(run("recommend", "ltx-2", "--json"))
    assert advice["methods"]["vae"] == "int8"
    assert advice["reasons"]


def test_inspect(tiny, tmp_path):
    load_pipeline(tiny("z-image"), quantization={"transformer": "int8", "vae": "int8"}).save_pretrained(tmp_path)
    data = json.loads(run("inspect", tmp_path, "--json"))
    assert data["components"]["transformer"]["quantization"] == "torchao Int8WeightOnlyConfig"
    assert data["components"]["vae"]["quantization"] == "int8 (llm_dit)"
    assert "quantization" not in data["components"]["text_encoder"]
    text = run("inspect", tmp_path)
    assert "Int8WeightOnlyConfig" in text
    assert "KiB" in text
    assert "{" not in text  # what Python would show
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    data = json.loads(run("inspect", file, "--json"))
    assert data["bytes_by_dtype"]["I8"] > data["bytes_by_dtype"]["BF16"]


def test_the_demo(tmp_path):
    text = run("demo", "--folder", tmp_path / "demo", "--methods", "int4", fresh=True)
    assert Image.open(tmp_path / "demo" / "demo.png").width > 3 * 128
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["method", "none", "int4"]
