"""What users do to a loaded pipeline, with every method: the picture stays the picture, or the call says why not."""

import copy
import io
import threading

import pytest
import torch
from conftest import generate, relative_error

from llm_dit import load_pipeline

WAYS = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8-dynamic": {"quantization": "fp8-dynamic"},
    "fp8-weight-only": {"quantization": "fp8-weight-only"},
    "layerwise": {"quantization": "fp8-weight-only", "quantization_backend": "layerwise"},
}
TORCHAO = [way for way in WAYS if way != "layerwise"]
NAMES = ("flux2-klein", "z-image", "qwen-image", "ltx2.3")


@pytest.fixture(scope="module")
def loaded(tiny):
    """`loaded(name, way)`: a pipeline that no test changes, and what it generates."""
    made = {}

    def make(name, way):
        if (name, way) not in made:
            pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way])
            made[name, way] = pipe, generate(pipe, name)
        return made[name, way]

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_around_everything(name, way, tiny, loaded):
    _, expected = loaded(name, way)
    with torch.inference_mode():
        pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way])
        pipe.to("cpu")
        assert torch.equal(generate(pipe, name), expected)
    assert torch.equal(generate(pipe.to("cpu"), name), expected)


@pytest.mark.parametrize("way", TORCHAO)
@pytest.mark.parametrize("name", NAMES)
def test_deepcopy(name, way, loaded):
    pipe, expected = loaded(name, way)
    twin = copy.deepcopy(pipe)
    assert torch.equal(generate(twin, name), expected)
    for part in twin.transformer.parameters():
        part.data = torch.zeros_like(part.data) if type(part.data) is torch.Tensor else part.data
    assert torch.equal(generate(pipe, name), expected)


def test_deepcopy_of_hooks_is_refused(loaded):
    with pytest.raises(ValueError, match="transformer is cast layerwise"):
        copy.deepcopy(loaded("z-image", "layerwise")[0])


@pytest.mark.parametrize("way", TORCHAO)
@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_transformer(name, way, tiny, loaded):
    pipe, expected = loaded(name, way)
    buffer = io.BytesIO()
    torch.save(pipe.transformer, buffer)
    buffer.seek(0)
    other = load_pipeline(tiny(name), dtype=torch.bfloat16, transformer=torch.load(buffer, weights_only=False))
    assert torch.equal(generate(other, name), expected)
    buffer = io.BytesIO()
    torch.save(pipe.transformer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert {type(value) for value in state.values()} == {type(value) for value in pipe.transformer.state_dict().values()}


@pytest.mark.parametrize("way", WAYS)
def test_two_pipelines_in_two_threads(way, tiny, loaded):
    name = "flux2-klein"
    _, expected = loaded(name, way)
    pipes = [load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way]) for _ in range(2)]
    outputs = [None, None]

    def run(index):
        outputs[index] = [generate(pipes[index], name) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected) for found in outputs for output in found)


@pytest.mark.parametrize("way", TORCHAO)
@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image", "ltx2.3"])
def test_fused_projections(name, way, tiny, loaded):
    _, expected = loaded(name, way)
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way])
    pipe.transformer.fuse_qkv_projections()
    assert relative_error(generate(pipe, name), expected) < 0.03
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(generate(pipe, name), expected)


def test_group_offloading_of_compiled_blocks_is_refused(tiny):
    pipe = load_pipeline(tiny("flux2-klein"), dtype=torch.bfloat16, quantization="int8", compile=True)
    with pytest.raises(ValueError, match=r"transformer is quantized and compiled.*leaf_level"):
        pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), num_blocks_per_group=1)
    pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), num_blocks_per_group=1, exclude_modules="transformer")
