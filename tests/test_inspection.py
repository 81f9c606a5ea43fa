"""`llm-dit inspect FILE`: what a file is, from its header, and what the loader then really does."""

import json
import re
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from llm_dit import load_pipeline
from llm_dit.checkpoints.convert import convert
from llm_dit.inspection import inspect_path


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("flux2-dev", "FLUX.2 transformer"),
        ("ltx2.3", "LTX-2 transformer"),
        ("z-image", "Z-Image transformer"),
        ("qwen-image", "Qwen-Image transformer"),
    ],
)
def test_it_says_what_the_loader_does(name, holds, tiny, tmp_path):
    file = convert(tiny(name), tmp_path / "fp8.safetensors").path
    found = inspect_path(file)
    assert found["holds"] == holds
    report = load_pipeline(tiny(name), torch_dtype=torch.bfloat16, transformer_file=file).quantization_report["transformer"]
    assert found["scales_per_tensor"] == found["stays_fp8"] == found["fp8_weights"]
    assert f"{found['stays_fp8']} weights stay in fp8" in found["loading"]
    if name == "ltx2.3":  # where no projection is fused, weights are layers
        assert report.quantized_layers == found["stays_fp8"]
    assert found["bytes"] == sum(found["bytes_by_dtype"].values())


def test_a_bf16_file_and_an_encoder(tiny, tmp_path):
    found = inspect_path(next((tiny("z-image") / "transformer").glob("*.safetensors")))
    assert found["layout"] == "bf16, not quantized"
    assert "quantized while it is read" in found["loading"]
    found = inspect_path(next((tiny("z-image") / "text_encoder").glob("*.safetensors")))
    assert found["holds"] == "text encoder"
    assert found["loading"].startswith("encoder_file: ")


def test_a_component_that_was_saved_quantized(tiny, tmp_path):
    load_pipeline(tiny("z-image"), torch_dtype=torch.bfloat16, quantization="int4").save_pretrained(tmp_path)
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    found = inspect_path(file)
    assert found["holds"] == "Z-Image transformer"
    assert re.fullmatch(r"torchao: \d+ weights as Int4GroupTensor", found["layout"])
    assert found["loading"] == "load_pipeline(the folder of its pipeline)"
    assert inspect_path(tmp_path / "transformer")["quantization"] == "int4 (llm_dit)"
    assert inspect_path(next((tmp_path / "vae").glob("*.safetensors")))["holds"] == "AutoencoderKL"
    with pytest.raises(ValueError, match=r"is a component that save_pretrained wrote.*give load_pipeline the folder"):
        load_pipeline(tiny("z-image"), torch_dtype=torch.bfloat16, transformer_file=file)


def test_what_would_be_refused_is_told_and_not_raised(tmp_path):
    save_file({"layers.0.attention.qkv.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "x.safetensors")
    found = inspect_path(tmp_path / "x.safetensors")
    assert found["loading"].startswith("refused: ")
    assert "int8" in found["loading"]
    save_file({"some.weight": torch.zeros(4, 4)}, tmp_path / "y.safetensors")
    assert "refused: it is no transformer" in inspect_path(tmp_path / "y.safetensors")["loading"]
    save_file({"some.weight": torch.zeros(4, 4)}, tmp_path / "z.safetensors", metadata={"x.weight": "_tensor_data_names"})
    assert "is not JSON" in inspect_path(tmp_path / "z.safetensors")["loading"]


def test_it_reads_the_header_alone(tmp_path):
    """A file of a terabyte, most of it a hole: what it holds is told without reading it, and without torch."""
    file = tmp_path / "large.safetensors"
    size = 2**39
    header = {
        name: {"dtype": "F8_E4M3", "shape": [2**20, size // 2**20], "data_offsets": [index * size, (index + 1) * size]}
        for index, name in enumerate(("layers.0.attention.qkv.weight", "cap_embedder.1.weight"))
    }
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + 2 * size)
    code = (
        "import sys; from llm_dit.inspection import inspect_path; "
        f"print(inspect_path({str(file)!r})['holds']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Z-Image transformer", done.stderr


def test_the_command_prints_a_line_a_fact(tiny, tmp_path):
    file = convert(tiny("z-image"), tmp_path / "fp8.safetensors").path
    done = subprocess.run([sys.executable, "-m", "llm_dit.cli", "inspect", str(file)], capture_output=True, text=True, check=True)
    lines = dict(line.split(": ", 1) for line in done.stdout.strip().splitlines())
    assert lines["holds"] == "Z-Image transformer"
    assert lines["layout"] == "fp8, one scale per tensor, comfy_quant formats"


def test_a_folder_says_how_it_loads(tiny, tmp_path):
    assert inspect_path(tiny("z-image"))["loading"] == "load_pipeline(PATH, quantization=METHOD) quantizes it while it is read"
    quantization = {"transformer": "int8", "encoder": "fp8-weight-only"}
    pipe = load_pipeline(tiny("z-image"), quantization=quantization, quantization_backend={"encoder": "layerwise"})
    pipe.save_pretrained(tmp_path)
    found = inspect_path(tmp_path)
    assert "transformer in torchao Int8WeightOnlyConfig" in found["loading"]
    assert "text_encoder in fp8, layerwise casting" in found["loading"]
