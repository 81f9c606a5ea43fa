"""Saving: what is saved loads again, bit for bit; what is not whole does not load."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import generate
from hub import local_hub

from llm_dit import load_pipeline, saving

QUANTIZATION = {"transformer": "int4", "encoder": "int8", "vae": "int8"}


@pytest.fixture
def pipe(tiny):
    return load_pipeline(tiny("z-image"), quantization=QUANTIZATION)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("variant", [None, "q"])
def test_shards_and_variants(method, variant, tiny, tmp_path):
    quantization = {"transformer": method, "encoder": method}
    pipe = load_pipeline(tiny("flux2-klein"), quantization=quantization)
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="200KB")
    pattern = "diffusion_pytorch_model*.q*.safetensors" if variant else "diffusion_pytorch_model*.safetensors"
    assert len(list((tmp_path / "transformer").glob(pattern))) > 1
    again = load_pipeline(tmp_path, variant=variant)
    assert again.quantization_report["transformer"].method == "already_quantized"
    assert torch.equal(generate(again, "flux2-klein"), generate(pipe, "flux2-klein"))


def test_saving_over_another_pipeline(pipe, tiny, tmp_path):
    """What belongs to nobody and what belongs to another variant stays; weights of the same variant do not."""
    load_pipeline(tiny("z-image"), dtype=torch.bfloat16).save_pretrained(tmp_path, variant="old")
    load_pipeline(tiny("z-image"), dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "transformer" / "notes.txt").write_text("mine too")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "transformer" / "notes.txt").read_text() == "mine too"
    weights = {path.name for path in (tmp_path / "transformer").iterdir()} - {"notes.txt", "config.json"}
    assert weights == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.old.safetensors"}
    assert torch.equal(generate(load_pipeline(tmp_path), "z-image"), generate(pipe, "z-image"))


def test_links_are_replaced_and_not_followed(pipe, tiny, tmp_path):
    pipe.save_pretrained(tmp_path / "other")
    before = sorted(path.name for path in (tmp_path / "other" / "transformer").iterdir())
    pipe.save_pretrained(tmp_path / "mine")
    for name in ("transformer", "scheduler"):
        shutil.rmtree(tmp_path / "mine" / name)
    (tmp_path / "mine" / "transformer").symlink_to(tmp_path / "other" / "transformer")
    (tmp_path / "mine" / "scheduler").write_text("a file where a folder goes")
    pipe.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "transformer").is_symlink()
    assert sorted(path.name for path in (tmp_path / "other" / "transformer").iterdir()) == before
    assert torch.equal(generate(load_pipeline(tmp_path / "mine"), "z-image"), generate(pipe, "z-image"))


def test_an_error_while_moving_loses_nothing(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    replace = saving._replace_weights

    def failing(new, place, variant):
        if place.name == "vae":
            raise PermissionError("read only")
        replace(new, place, variant)

    monkeypatch.setattr(saving, "_replace_weights", failing)
    with pytest.raises(PermissionError):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not whole"):
        load_pipeline(tmp_path)
    assert list((tmp_path / saving.UNFINISHED / "vae").glob("*.safetensors"))


def test_a_dropped_encoder_is_missed(tiny, tmp_path):
    pipe = load_pipeline(tiny("z-image"), quantization="int8")
    pipe.encode_then_free("a cat", drop=True)
    with pytest.raises(ValueError, match="text_encoder was dropped after encoding"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_model_is_called_with_goes_along(tiny, tmp_path):
    shutil.copytree(tiny("z-image"), tmp_path / "bf16")
    (tmp_path / "bf16" / "call.json").write_text('{"height": 64}')
    load_pipeline(tmp_path / "bf16", quantization="int8").save_pretrained(tmp_path / "int8")
    assert (tmp_path / "int8" / "call.json").read_text() == '{"height": 64}'


def test_saving_over_what_it_was_loaded_from(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = generate(pipe, "z-image")
    load_pipeline(tmp_path).save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), "z-image"), expected)


def test_a_failure_leaves_what_was_there(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    pipe.vae.save_pretrained = full
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


KILLED = """
import os, sys
from llm_dit import load_pipeline, saving
pipe = load_pipeline(sys.argv[1], quantization={"transformer": "int4"})
pipe.vae.save_pretrained = lambda *args, **kwargs: os._exit(9)
pipe.save_pretrained(sys.argv[2])
"""


def test_a_killed_process_leaves_nothing_that_loads(tiny, pipe, tmp_path):
    source = str(tiny("z-image"))
    command = [sys.executable, "-c", KILLED, source, str(tmp_path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 9
    with pytest.raises(ValueError, match=r"is not whole.*save it again"):
        load_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), "z-image"), generate(pipe, "z-image"))


def test_a_file_in_the_way(pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_model_card(pipe, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    pipe.save_pretrained(tmp_path)
    load_pipeline(tmp_path).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n")
    assert card.count("## Quantization") == 1
    assert re.search(r"llm-dit \S+, torch \S+, torchao \S+", card)
    assert re.search(r"\| transformer \| int4 \| [\d.]+ [KM]iB \|", card)
    assert "| text_encoder | int8 |" in card


def test_no_card_for_what_is_not_quantized(tiny, tmp_path):
    load_pipeline(tiny("z-image"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


PUSH = """
import sys
from llm_dit import load_pipeline, saving
pipe = load_pipeline(sys.argv[1], quantization={"transformer": "int8"})
if sys.argv[3] == "push":
    pipe.push_to_hub("somebody/quantized")
else:
    pipe.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="somebody/quantized")
"""


@pytest.mark.parametrize("how", ["push", "save"])
def test_pushing_to_a_hub(how, tiny, tmp_path):
    pushed = tmp_path / "pushed"
    with local_hub(pushed) as endpoint:
        environment = {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_x",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", PUSH, str(tiny("z-image")), str(tmp_path / "saved"), how]
        result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "| transformer | int8 |" in (pushed / "README.md").read_text()
    again = load_pipeline(pushed)
    expected = load_pipeline(tiny("z-image"), quantization={"transformer": "int8"})
    assert torch.equal(generate(again, "z-image"), generate(expected, "z-image"))


def test_a_variant_by_position_leaves_the_weights_of_others(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, True, "q")
    found = {path.name for path in (tmp_path / "transformer").glob("*.safetensors")}
    assert found == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.q.safetensors"}


def test_another_process_than_the_main_one_writes_nothing(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
