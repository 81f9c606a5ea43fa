"""Offloading quantized pipelines: every way gives the picture that the pipeline on the device gives."""

import pytest
import torch
from conftest import generate, relative_error

from llm_dit import load_pipeline

WAYS = {
    "int8": {"quantization": {"transformer": "int8", "encoder": "int8"}},
    "int4": {"quantization": {"transformer": "int4", "encoder": "int4"}},
    "fp8-dynamic": {"quantization": {"transformer": "fp8-dynamic", "encoder": "fp8-weight-only"}},
    "fp8-weight-only": {"quantization": {"transformer": "fp8-weight-only", "encoder": "fp8-weight-only"}},
    "layerwise": {
        "quantization": {"transformer": "fp8-weight-only", "encoder": "fp8-weight-only"},
        "quantization_backend": "layerwise",
    },
}
NAMES = ("flux2-klein", "z-image", "qwen-image", "ltx2.3")


def group(kind, **keywords):
    def enable(pipe):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipe.enable_group_offload(device, torch.device("cpu"), offload_type=kind, **keywords)

    return enable


BLOCKS = group("block_level", num_blocks_per_group=1)
OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "blocks": BLOCKS,
    "leaves": group("leaf_level"),
    "blocks-stream": group("block_level", num_blocks_per_group=1, use_stream=True),
    "leaves-stream": group("leaf_level", use_stream=True),
}


@pytest.fixture(scope="module")
def on_device(tiny):
    outputs = {}

    def output(name, way):
        if (name, way) not in outputs:
            pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way])
            outputs[name, way] = generate(pipe.to("cuda" if torch.cuda.is_available() else "cpu"), name).cpu()
        return outputs[name, way]

    return output


@pytest.mark.gpu
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_gpu(name, way, offload, tiny, on_device):
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, **WAYS[way])
    OFFLOADS[offload](pipe)
    assert relative_error(generate(pipe, name).cpu(), on_device(name, way)) < 0.01


@pytest.mark.parametrize("offload", ["blocks", "leaves"])
@pytest.mark.parametrize("way", WAYS)
def test_groups_from_the_host_to_the_host(way, offload, tiny, on_device):
    """What runs without a GPU."""
    if torch.cuda.is_available():
        pytest.skip("the GPU has its own")
    pipe = load_pipeline(tiny("flux2-klein"), dtype=torch.bfloat16, **WAYS[way])
    OFFLOADS[offload](pipe)
    assert relative_error(generate(pipe, "flux2-klein"), on_device("flux2-klein", way)) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["model", "leaves", "leaves-stream"])
@pytest.mark.parametrize("way", ["int8", "int4", "fp8-dynamic", "fp8-weight-only"])
def test_with_compiled_blocks(way, offload, tiny, on_device):
    torch.compiler.reset()
    pipe = load_pipeline(tiny("flux2-klein"), dtype=torch.bfloat16, compile=True, **WAYS[way])
    OFFLOADS[offload](pipe)
    bound = 0.3 if way == "int4" else 0.13
    for _ in range(2):
        assert relative_error(generate(pipe, "flux2-klein").cpu(), on_device("flux2-klein", way)) < bound


def test_a_compile_mode_that_does_not_go_with_offloading_is_told(tiny):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, compile=True, compile_mode="reduce-overhead")
    with pytest.warns(UserWarning, match="addresses that offloading frees"):
        OFFLOADS["leaves"](pipe)
