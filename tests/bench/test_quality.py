"""`bench quality` on tiny pipelines: what it measures is ordered as the methods are, and an interrupted run goes on."""

import json
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llm_dit import load_pipeline
from llm_dit.bench import picture_metrics, quality
from llm_dit.bench.layer_noise import layer_noise, signal_to_noise
from llm_dit.bench.picture_metrics import MOST_DB, flip, psnr, ssim
from llm_dit.bench.quality_report import contact_sheet
from llm_dit.cli import app
from llm_dit.quantization import hardware
from llm_dit.tiny import get, scenes

pytest.importorskip("skimage")
pytest.importorskip("flip_evaluator")

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}


def options(tiny, folder, **keywords):
    defaults = {"methods": ("int8", "int4"), "prompts": quality.scene_captions(2), "captions": True, "call": SIZE}
    return quality.Options(str(tiny("z-image")), folder=folder, **{**defaults, **keywords})


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    return list(quality.run(options(tiny, tmp_path_factory.mktemp("quality"))))


def test_better_methods_measure_better(rows):
    reference, floor, int8, int4 = rows
    assert [row["method"] for row in rows] == ["none", "float32", "int8", "int4"]
    assert "psnr" not in reference
    assert floor["psnr"] > int8["psnr"] > int4["psnr"] > 10
    assert floor["ssim"] > int8["ssim"] > int4["ssim"]
    assert floor["flip"] < int8["flip"] < int4["flip"]
    assert len(int8["latent_error"]) == SIZE["num_inference_steps"]
    assert floor["latent_error"][-1] < int8["latent_error"][-1] < int4["latent_error"][-1]
    assert reference["bytes"] > int8["bytes"] > int4["bytes"]
    assert all(0 <= row["caption_score"] <= row["caption_parts"] <= 1 for row in rows)
    assert len(int4["worst_layers"]) == quality.WORST
    assert max(layer["output_db"] for layer in int4["worst_layers"]) < min(layer["output_db"] for layer in int8["worst_layers"])
    json.dumps(rows, allow_nan=False)


def test_a_quantized_model_is_nothing_to_compare_with(tiny, tmp_path):
    load_pipeline(tiny("z-image"), quantization="int4").save_pretrained(tmp_path / "int4")
    asked = quality.Options(str(tmp_path / "int4"), ("int8",), ("a cat",), tmp_path / "pictures", call=SIZE)
    with pytest.raises(ValueError, match="holds a quantized transformer: give the bf16 pipeline"):
        next(quality.run(asked))


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    asked = options(tiny, tmp_path, methods=("int8",), floor="skip")
    made = []
    generate = quality._generate

    def counted(pipe, options, prompts, folder):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((folder.name, *prompts))
        generate(pipe, options, prompts, folder)

    monkeypatch.setattr(quality, "_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        list(quality.run(asked))
    made.clear()
    monkeypatch.setattr(quality, "_generate", lambda *args: (made.append((args[3].name, *args[2])), generate(*args)))
    rows = list(quality.run(asked))
    # The first picture of a method is made again, because the layers are compared in it.
    assert made == [("int8", 0), ("int8", 1)]
    made.clear()
    assert list(quality.run(asked)) == rows
    assert made == []


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_prompts_of_one_call_give_the_pictures_of_single_calls(name, tiny, tmp_path):
    asked = {"methods": (), "floor": "skip", "prompts": quality.scene_captions(3), "captions": False, "call": SIZE}
    for batch in (1, 2):
        list(quality.run(quality.Options(str(tiny(name)), folder=tmp_path / str(batch), batch=batch, **asked)))
    for number in range(3):
        one, two = (np.asarray(Image.open(tmp_path / str(batch) / "none" / f"{number:04}-0.png")) for batch in (1, 2))
        assert psnr(one, two) > 30


def test_another_question_is_refused(tiny, tmp_path):
    list(quality.run(options(tiny, tmp_path, methods=(), floor="skip")))
    with pytest.raises(ValueError, match="holds pictures of other sizes or steps: give another --folder"):
        list(quality.run(options(tiny, tmp_path, methods=(), floor="skip", call={**SIZE, "height": 128})))
    with pytest.raises(ValueError, match=r"holds pictures of the same prompts asked for otherwise \(--captions, --prompts\)"):
        list(quality.run(options(tiny, tmp_path, methods=(), floor="skip", captions=False)))


def test_a_model_that_was_changed_is_another_model(tiny, tmp_path):
    """And one that was moved is the same."""
    source = tmp_path / "model"
    shutil.copytree(tiny("z-image"), source)
    asked = options(tiny, tmp_path / "kept", methods=(), floor="skip")
    rows = list(quality.run(asked))
    assert list(quality.run(replace(asked, source=f"{source}/"))) == rows
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="holds pictures of another model, or of this one before it was changed"):
        list(quality.run(replace(asked, source=str(source))))


def test_a_folder_without_pictures_takes_any_question(tiny, tmp_path):
    with pytest.raises(ValueError, match="divisible by"):
        list(quality.run(options(tiny, tmp_path, methods=(), floor="skip", call={**SIZE, "height": 17})))
    assert list(quality.run(options(tiny, tmp_path, methods=(), floor="skip")))


def test_all_captions_that_are_held_out():
    things = [scenes.Thing(*each) for each in product(scenes.SIZES, scenes.COLOURS, scenes.SHAPES)]
    pairs = [scenes.Scene((one, other), way) for one, other, way in product(things, things, scenes.RELATIONS)]
    assert sum(map(scenes.held_out, pairs)) == quality._HELD_OUT
    with pytest.raises(ValueError, match="there are 939 captions that no model was trained on, and not 940: ask for fewer"):
        quality.scene_captions(940)


def test_a_wide_picture_keeps_its_shape_on_the_sheet(tmp_path):
    (tmp_path / "none").mkdir()
    Image.new("RGB", (1024, 512), "red").save(tmp_path / "none" / "0000-0.png")
    sheet = contact_sheet([{"method": "none", "bytes": 1}], tmp_path, ["a red field"])
    red = np.argwhere((np.asarray(sheet) == (255, 0, 0)).all(-1))
    assert tuple(red.max(0) - red.min(0) + 1) == (128, 256)


def test_lpips_where_its_weights_are(tmp_path, monkeypatch):
    """AlexNet with random weights in place of the published ones: they are what cannot be had here."""
    pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "lpips" not in picture_metrics.metrics()
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "checkpoints" / picture_metrics._ALEXNET)
    measure = picture_metrics.metrics()["lpips"]
    generator = np.random.default_rng(0)
    grey = np.full((64, 64, 3), 100, np.uint8)
    near, far = (np.clip(grey + generator.normal(0, noise, grey.shape), 0, 255).astype(np.uint8) for noise in (5, 60))
    assert 0 == measure(grey, grey) < measure(grey, near) < measure(grey, far)


def test_a_method_that_the_card_lacks_is_refused_before_a_picture_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "detect_hardware", lambda: hardware.Hardware("RTX 3060", (8, 6), 12 * 1024**3))
    with pytest.raises(ValueError, match=r"needs a CUDA device of compute capability 8\.9"):
        list(quality.run(options(tiny, tmp_path / "q", methods=("int8", "fp8-dynamic"))))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image", "ltx2.3"])
def test_every_family(name, tiny, tmp_path):
    call = {key: value for key, value in get(name).call().items() if key not in ("prompt", "generator", "output_type")}
    asked = quality.Options(str(tiny(name)), ("int8",), ("a red circle",), tmp_path, call=call, floor="skip")
    _, row = quality.run(asked)
    assert 20 < row["psnr"] <= MOST_DB
    assert "caption_score" not in row


def test_clips_are_scored_with_their_sound(tiny, tmp_path):
    """Drawn clips in place of the pipeline's: the whole caption is read off what was kept, and a wrong pitch is heard."""
    name, captions = "ltx2.3", quality.captions_for(str(tiny("ltx2.3")), 2)
    call = {key: value for key, value in get(name).call().items() if key not in ("prompt", "generator", "output_type")}
    asked = quality.Options(str(tiny(name)), (), captions, tmp_path, captions=True, call=call, floor="skip", batch=2)
    (row,) = quality.run(asked)
    assert 0 <= row["caption_score"] <= row["caption_parts"] <= 1
    generator, none = np.random.default_rng(0), tmp_path / "none"
    for number, caption in enumerate(captions):
        clip = scenes.parse_clip(caption)
        assert scenes.clip_held_out(clip)
        with safe_open(none / f"{number:04}.safetensors", "pt") as file:
            assert file.get_tensor("sound").ndim == 2
            rate = file.metadata()["sampling_rate"]
        for picture in none.glob(f"{number:04}-*.png"):
            picture.unlink()
        for place, frame in enumerate(scenes.draw_clip(clip, generator)[::2]):
            Image.fromarray(frame).save(none / f"{number:04}-{place}.png")
        tone = torch.from_numpy(scenes.draw_tone(clip, generator)[None] / 32768)
        assert quality._score(none, number, caption).parts["pitch"] is False  # the tiny model's noise
        save_file({"sound": tone}, none / f"{number:04}.safetensors", {"sampling_rate": "16000"})
        assert rate.isdigit()
        assert quality._score(none, number, caption).whole


def test_the_command(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    arguments = ["bench", "quality", str(tiny("z-image")), "--methods", "int8", "--prompts", str(tmp_path / "prompts.txt")]
    size = ["--height", "64", "--width", "64", "--steps", "2", "--folder", str(tmp_path / "kept"), "--floor", "skip"]
    files = ["--sheet", str(tmp_path / "sheet.png"), "--report", str(tmp_path / "report.html")]
    result = CliRunner().invoke(app, [*arguments, *size, *files])
    assert result.exit_code == 0, result.output
    assert "| int8 |" in result.output
    assert Image.open(tmp_path / "sheet.png").size[1] == 64 + 2 * 128
    report = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert 'src="http' not in report
    assert "a blue square" in report
    result = CliRunner().invoke(app, [*arguments, *size, "--json"])
    assert [row["method"] for row in json.loads(result.output[result.output.index("[") :])] == ["none", "int8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the two"),
        (["--captions", "2", "--prompts", "x"], "one of the two"),
        (["--prompts", "nowhere.txt"], "there is no file"),
        (["--captions", "2", "--methods", "int9"], "int9"),
        (["--captions", "2", "--floor", "bf8"], "unknown floor"),
        (["--captions", "2", "--sheet", "sheet.foo"], "tells no format of pictures"),
        (["--captions", "2", "--folder", __file__], "is a file, and pictures are to be kept there"),
    ],
)
def test_what_is_asked_wrongly(arguments, message, tiny, tmp_path):
    command = ["bench", "quality", str(tiny("z-image")), "--folder", str(tmp_path / "q"), *arguments]
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False, standalone_mode=False)


def test_layers_are_compared_with_the_checkpoint(tiny):
    pipe = load_pipeline(tiny("z-image"), quantization="int8")
    with layer_noise(pipe.transformer) as read:
        pipe.set_progress_bar_config(disable=True)
        pipe(**get("z-image").call())
    found = {layer.name: layer for layer in read()}
    assert len(found) == pipe.quantization_report["transformer"].quantized_layers
    assert all(35 < layer.weight_db < 55 for layer in found.values())
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


@given(noise=st.floats(1e-3, 10), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_signal_to_noise(noise, seed):
    generator = torch.Generator().manual_seed(seed)
    signal, error = torch.randn(2, 4000, generator=generator)
    assert signal_to_noise(signal, signal + noise * error) == pytest.approx(-20 * np.log10(noise), abs=0.5)
    assert signal_to_noise(signal, signal) == MOST_DB


def test_metrics_of_known_pictures():
    grey = np.full((64, 64, 3), 100, np.uint8)
    assert psnr(grey, grey) == MOST_DB
    assert psnr(grey, grey + 10) == pytest.approx(20 * np.log10(255 / 10))
    assert ssim(grey, grey) == 1
    assert flip(grey, grey) == 0
    assert 0 < flip(grey, grey + 10) < flip(grey, grey + 80) <= 1
