"""Files that our converter writes: the published layouts, which our loader and diffusers' own names agree on."""

import json
import struct

import pytest
import torch
from conftest import relative_error
from official_names import ltx_monolith, official_names
from safetensors import safe_open
from writer import LAYOUTS, write

from llm_dit import load_pipeline
from llm_dit.checkpoints import convert as module
from llm_dit.checkpoints.convert import convert
from llm_dit.checkpoints.header import read_header
from llm_dit.tiny import build

FAMILIES = {
    "flux2-klein": "flux2",
    "flux2-dev": "flux2",
    "ltx2": "ltx2",
    "ltx2.3": "ltx2",
    "z-image": "z_image",
    "qwen-image": "qwen_image",
}
CASES = [
    *((name, "comfy") for name in FAMILIES),
    ("flux2-klein", "bfl"),
    ("flux2-dev", "bfl"),
    ("ltx2", "ltx"),
    ("ltx2.3", "ltx"),
]
PREFIX = "model.diffusion_model."


def tensors_of(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_published_rules(name, layout, tiny, tmp_path):
    source = tiny(name)
    result = convert(source, tmp_path / "fp8.safetensors", layout)
    tensors, metadata = tensors_of(result.path)
    prefix = PREFIX if layout == "ltx" else ""
    expected = {
        prefix + key: value for key, value in official_names(FAMILIES[name], build(name).transformer.state_dict()).items()
    }
    weights = {key for key, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert result.fp8_weights == len(weights) > 0
    assert result.nbytes == result.path.stat().st_size
    companions = ("weight_scale", "comfy_quant")
    assert {key for key in tensors if not key.endswith(companions)} == set(expected)
    for key, value in expected.items():
        if key in weights:
            scale = tensors[key.removesuffix("weight") + "weight_scale"]
            assert scale.shape == ()
            assert scale.dtype == torch.float32
            assert float(scale) == pytest.approx(float(value.abs().max()) / 448, rel=1e-6)
            assert relative_error(tensors[key].float() * scale, value.float()) < 0.04
        else:
            assert torch.equal(tensors[key], value)
    if layout == "comfy":
        told = [bytes(tensor.tolist()) for key, tensor in tensors.items() if key.endswith("comfy_quant")]
        assert [json.loads(text) for text in told] == [{"format": "float8_e4m3fn"}] * len(weights)
    else:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        assert {f"{layer}.weight" for layer in layers} == weights


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_our_loader_reads_it_back(name, layout, tiny, tmp_path):
    result = convert(tiny(name), tmp_path / "fp8.safetensors", layout)
    keywords = {"torch_dtype": torch.bfloat16, "transformer_file": result.path, "quantization_transformer": "fp8-weight-only"}
    pipe = load_pipeline(tiny(name), **keywords)
    assert pipe.quantization_report["transformer"].backend == "checkpoint"
    reference = load_pipeline(tiny(name), torch_dtype=torch.bfloat16).transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        dense = value.dequantize() if hasattr(value, "qdata") else value
        assert relative_error(dense, reference[key]) < 0.04, key


def test_a_file_with_official_names_gives_the_same_file(tiny, tmp_path):
    state = official_names("flux2", build("flux2-dev").transformer.state_dict())
    write(tmp_path / "bf16.safetensors", state, LAYOUTS["bf16"])
    first, _ = tensors_of(convert(tiny("flux2-dev"), tmp_path / "a.safetensors", "bfl").path)
    second, _ = tensors_of(convert(tmp_path / "bf16.safetensors", tmp_path / "b.safetensors", "bfl").path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first if first[key].ndim)


def test_a_whole_ltx_file_keeps_its_other_components(tmp_path):
    pipe = build("ltx2.3")
    names = ("transformer", "connectors", "vae", "audio_vae", "vocoder")
    write(tmp_path / "bf16.safetensors", ltx_monolith({n: getattr(pipe, n).state_dict() for n in names}), LAYOUTS["bf16"])
    before, _ = tensors_of(tmp_path / "bf16.safetensors")
    after, _ = tensors_of(convert(tmp_path / "bf16.safetensors", tmp_path / "fp8.safetensors", "ltx").path)
    for key, value in before.items():
        if not key.startswith(f"{PREFIX}transformer_blocks."):
            assert torch.equal(after[key], value), key


def test_ltx_leaves_the_outer_blocks_as_lightricks_does():
    blocks = {"transformer_blocks": 48}
    left = (0, 1, -2, -1)
    goes = [
        i for i in range(48) if module._goes_to_fp8(f"{PREFIX}transformer_blocks.{i}.ff.net.2.weight", (64, 64), blocks, left)
    ]
    assert goes == list(range(2, 46))
    connector = f"{PREFIX}video_embeddings_connector.transformer_1d_blocks.3.ff.net.2.weight"
    assert not module._goes_to_fp8(connector, (64, 64), blocks, left)


def test_what_is_refused(tiny, tmp_path):
    target = tmp_path / "fp8.safetensors"
    with pytest.raises(ValueError, match=r"layout 'bfl' is for flux2, and .* holds a Z-Image transformer: use 'comfy'"):
        convert(tiny("z-image"), target, "bfl")
    with pytest.raises(ValueError, match="did you mean 'comfy'"):
        convert(tiny("z-image"), target, "comfi")
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        convert(tmp_path, target)
    with pytest.raises(ValueError, match="make it first"):
        convert(tiny("z-image"), tmp_path / "no" / "fp8.safetensors")
    convert(tiny("z-image"), target)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(tiny("z-image"), target)
    with pytest.raises(ValueError, match=r"quantized already \(.* is F8_E4M3\): give the bf16 model"):
        convert(target, tmp_path / "again.safetensors")
    load_pipeline(tiny("z-image"), quantization="int8").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"quantized already \(.* is I8\): give the bf16 model"):
        convert(tmp_path / "saved", tmp_path / "again.safetensors")
    write(tmp_path / "other.safetensors", {"a.weight": torch.zeros(4, 4)}, LAYOUTS["bf16"])
    with pytest.raises(ValueError, match=r"is no transformer of FLUX\.2"):
        convert(tmp_path / "other.safetensors", tmp_path / "x.safetensors")


def test_a_weight_with_nan_leaves_no_file(tmp_path):
    state = dict(official_names("z_image", build("z-image").transformer.state_dict()))
    key = "layers.0.attention.qkv.weight"
    state[key] = state[key].clone()
    state[key][0, 0] = float("nan")
    write(tmp_path / "bf16.safetensors", state, LAYOUTS["bf16"])
    with pytest.raises(ValueError, match="NaN"):
        convert(tmp_path / "bf16.safetensors", tmp_path / "fp8.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16.safetensors"]


def test_the_header_is_aligned_and_sound(tiny, tmp_path):
    path = convert(tiny("qwen-image"), tmp_path / "fp8.safetensors").path
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    assert read_header(path).nbytes == path.stat().st_size - 8 - length
