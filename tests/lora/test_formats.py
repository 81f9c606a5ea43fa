"""Key formats of other tools load as in plain diffusers, and adapters of one rank are swapped without a recompile."""

import diffusers
import pytest
import torch
from conftest import generate

from llm_dit import load_pipeline

pytest.importorskip("peft")


def pair(name, down, up, rank=4, seed=3, alpha=None, parts=("lora_A.weight", "lora_B.weight")):
    """One layer's LoRA under `name`: [rank, down] and [up, rank]."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{name}.{parts[0]}": torch.randn(rank, down, generator=generator) / 4,
        f"{name}.{parts[1]}": torch.randn(up, rank, generator=generator) / 4,
    }
    return state if alpha is None else {**state, f"{name}.alpha": torch.tensor(float(alpha))}


KOHYA = {"alpha": 2, "parts": ("lora_down.weight", "lora_up.weight")}


def linear(pipe, name):
    layer = pipe.transformer.get_submodule(name)
    return layer.in_features, layer.out_features


def three(size):
    return size[0], 3 * size[1]


Z, Q, L = "layers.0.attention.to_q", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn1.to_q"
FORMATS = {
    "z-image ComfyUI": ("z-image", lambda p: pair(f"diffusion_model.{Z}", *linear(p, Z))),
    "z-image kohya": ("z-image", lambda p: pair("lora_unet_layers_0_attention_to_q", *linear(p, Z), **KOHYA)),
    "klein ComfyUI": (
        "flux2-klein",
        lambda p: pair("diffusion_model.double_blocks.0.img_attn.qkv", *three(linear(p, Q))),
    ),
    "klein kohya": (
        "flux2-klein",
        lambda p: pair("lora_unet_double_blocks_0_img_attn_qkv", *three(linear(p, Q)), **KOHYA),
    ),
    "Qwen-Image ComfyUI": ("qwen-image", lambda p: pair(f"diffusion_model.{Q}", *linear(p, Q))),
    "Qwen-Image Lightning": ("qwen-image", lambda p: pair(Q, *linear(p, Q), **KOHYA)),
    "Qwen-Image kohya": ("qwen-image", lambda p: pair("lora_unet_transformer_blocks_0_attn_to_q", *linear(p, Q), **KOHYA)),
    "LTX-2 ComfyUI": ("ltx2.3", lambda p: pair(f"diffusion_model.{L}", *linear(p, L))),
}


def adapter(pipe):
    return {
        name: tensor.detach().clone()
        for name, tensor in pipe.transformer.named_parameters()
        if "lora_" in name or "lokr_" in name
    }


@pytest.mark.parametrize("way", ["int8", "int4", "layerwise"])
@pytest.mark.parametrize("what", FORMATS)
def test_formats(what, way, tiny):
    name, make = FORMATS[what]
    plain = diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
    state = make(plain)
    plain.load_lora_weights({key: value.clone() for key, value in state.items()})
    backend = {"quantization": "fp8-weight-only", "quantization_backend": "layerwise"}
    pipe = load_pipeline(tiny(name), **(backend if way == "layerwise" else {"quantization": way}))
    without = generate(pipe, name)
    pipe.load_lora_weights({key: value.clone() for key, value in state.items()})
    ours, theirs = adapter(pipe), adapter(plain)
    assert ours.keys() == theirs.keys()
    assert ours
    assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in ours)
    assert not torch.equal(generate(pipe, name), without)


@pytest.mark.parametrize("method", ["int8", "fp8-weight-only"])
def test_swapping_adapters_of_one_rank_recompiles_nothing(method, tiny):
    torch.compiler.reset()
    name = "z-image"
    pipe = load_pipeline(tiny(name), quantization=method, compile=True)
    first, second = (pair(f"transformer.{Z}", *linear(pipe, Z), seed=seed) for seed in (1, 2))
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="style")
    one = generate(pipe, name)
    with torch.compiler.set_stance("fail_on_recompile"):
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        other = generate(pipe, name)
        assert not torch.equal(one, other)
        pipe.load_lora_weights(first, adapter_name="style", hotswap=True)
        assert torch.equal(generate(pipe, name), one)
