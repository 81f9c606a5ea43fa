"""LoRAs on a GPU, in a compiled pipeline: nothing is compiled again, and fusing keeps the weights where they are."""

import gc

import pytest
import torch
from conftest import generate
from test_formats import Z, linear, pair

from llm_dit import load_pipeline
from llm_dit.quantization.sizes import plain_parts

pytest.importorskip("peft")

NAME = "z-image"
METHODS = ("int8", "int4", "fp8-dynamic", "fp8-weight-only")


def compiled(tiny, method):
    torch.compiler.reset()
    return load_pipeline(tiny(NAME), quantization=method, compile=True, device_map="cuda", torch_dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_swapping_adapters_of_one_rank_recompiles_nothing(method, tiny):
    pipe = compiled(tiny, method)
    first, second = (pair(f"transformer.{Z}", *linear(pipe, Z), seed=seed) for seed in (1, 2))
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="style")
    one = generate(pipe, NAME)
    with torch.compiler.set_stance("fail_on_recompile"):
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        assert not torch.equal(generate(pipe, NAME), one)
        pipe.load_lora_weights(first, adapter_name="style", hotswap=True)
        assert torch.equal(generate(pipe, NAME), one)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_fusing_recompiles_nothing_and_moves_nothing(method, tiny):
    pipe = compiled(tiny, method)
    pipe.load_lora_weights(pair(f"transformer.{Z}", *linear(pipe, Z)))
    pipe.fuse_lora()
    fused = generate(pipe, NAME)
    layer = pipe.transformer.get_submodule(Z).base_layer
    places = [part.data_ptr() for part in plain_parts(layer.weight)]
    gc.collect()
    held = torch.cuda.memory_allocated()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            pipe.unfuse_lora()
            pipe.fuse_lora()
        assert torch.equal(generate(pipe, NAME), fused)
    assert [part.data_ptr() for part in plain_parts(layer.weight)] == places
    gc.collect()
    assert torch.cuda.memory_allocated() == held
