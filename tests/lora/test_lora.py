"""LoRAs in quantized pipelines: beside the weights, fused into them, and taken out again."""

import copy
import io
import warnings

import diffusers
import pytest
import torch
from conftest import generate, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from llm_dit import load_pipeline
from llm_dit.forwards import Size
from llm_dit.quantization.sizes import plain_parts

pytest.importorskip("peft")

TARGETS = {
    "z-image": ("layers.0.attention.to_q", "layers.1.feed_forward.w2"),
    "flux2-klein": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_out"),
    "flux2-dev": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_out"),
    "qwen-image": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_v_proj"),
    "ltx2": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"),
    "ltx2.3": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"),
}
CONNECTOR_TARGET = "video_connector.transformer_blocks.1.attn1.to_out.0"
WAYS = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8-dynamic": {"quantization": "fp8-dynamic"},
    "fp8-weight-only": {"quantization": "fp8-weight-only"},
    "per-tensor": {"quantization": "fp8-weight-only", "quantization_granularity": "per-tensor"},
    "layerwise": {"quantization": "fp8-weight-only", "quantization_backend": "layerwise"},
}
# What the method costs without a LoRA on these random models, and a little.
LARGEST_ERROR = {"int8": 0.05, "int4": 0.3}


def lora(model, targets, seed=5, prefix="transformer", rank=4):
    """A LoRA that moves a picture well beyond the noise of 8-bit weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for target in targets:
        linear = model.get_submodule(target)
        state[f"{prefix}.{target}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator) / 4
        state[f"{prefix}.{target}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator) / 4
    return state


def layers(model, targets):
    """The Linears themselves, whether a LoRA stands around them or not."""
    found = (model.get_submodule(target) for target in targets)
    return [getattr(layer, "base_layer", layer) for layer in found]


def bits(model, targets):
    return [part.detach().clone() for layer in layers(model, targets) for part in plain_parts(layer.weight)]


def same(left, right):
    return all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def expected(tiny):
    """`expected(name)`: what the bf16 pipeline generates with the LoRA, through plain diffusers."""
    outputs = {}

    def make(name):
        if name not in outputs:
            pipe = diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
            pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
            outputs[name] = generate(pipe, name)
        return outputs[name]

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TARGETS)
def test_loaded_fused_unfused_unloaded(name, way, tiny, expected, reference):
    bound = LARGEST_ERROR.get(way, 0.13)
    assert relative_error(expected(name), reference(name)) > 0.03  # else nothing below says anything
    pipe = load_pipeline(tiny(name), **WAYS[way])
    without, weights = generate(pipe, name), bits(pipe.transformer, TARGETS[name])
    addresses = [part.data_ptr() for layer in layers(pipe.transformer, TARGETS[name]) for part in plain_parts(layer.weight)]

    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    beside = generate(pipe, name)
    assert relative_error(beside, expected(name)) < bound
    pipe.set_adapters(pipe.get_active_adapters(), 0.0)
    assert torch.equal(generate(pipe, name), without)
    pipe.set_adapters(pipe.get_active_adapters(), 1.0)

    pipe.fuse_lora()
    fused = generate(pipe, name)
    assert relative_error(fused, expected(name)) < bound
    assert "from their weights in the checkpoint" in str(pipe.quantization_report)
    parts = [part for layer in layers(pipe.transformer, TARGETS[name]) for part in plain_parts(layer.weight)]
    # Layerwise casting itself gives a weight new memory in every forward.
    assert way == "layerwise" or [part.data_ptr() for part in parts] == addresses

    pipe.unfuse_lora()
    assert same(bits(pipe.transformer, TARGETS[name]), weights)
    assert "fused" not in str(pipe.quantization_report)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe, name), without)


@pytest.mark.parametrize("way", WAYS)
def test_ten_cycles_give_the_first_result(way, tiny):
    name = "z-image"
    pipe = load_pipeline(tiny(name), **WAYS[way], text_encoder=None, vae=None)
    weights = bits(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]), adapter_name="one")
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name], seed=6), adapter_name="other")
    pipe.set_adapters(["one", "other"], [0.7, 0.4])
    pipe.fuse_lora(lora_scale=0.5)
    first = bits(pipe.transformer, TARGETS[name])
    assert not same(first, weights)
    for _ in range(10):
        pipe.unfuse_lora()
        assert same(bits(pipe.transformer, TARGETS[name]), weights)
        pipe.fuse_lora(lora_scale=0.5)
        assert same(bits(pipe.transformer, TARGETS[name]), first)


@pytest.mark.parametrize("way", WAYS)
def test_fusing_is_quantizing_the_sum(way, tiny, tmp_path):
    """Fused weights are, bit for bit, what quantizing the fused bf16 weights gives: they were rounded once."""
    name = "z-image"
    pipe = load_pipeline(tiny(name), **WAYS[way], text_encoder=None, vae=None)
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]), adapter_name="one")
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name], seed=6), adapter_name="other")
    pipe.fuse_lora(adapter_names=["one"])
    pipe.fuse_lora(adapter_names=["other"])

    plain = diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
    for target in TARGETS[name]:
        linear = plain.transformer.get_submodule(target)
        total = linear.weight.float()
        for seed in (5, 6):
            state = lora(plain.transformer, TARGETS[name], seed)
            names = [f"transformer.{target}.lora_{part}.weight" for part in "BA"]
            up, down = (state[key].bfloat16().float() for key in names)
            total = total + up @ down
        linear.weight = nn.Parameter(total.bfloat16())
    plain.save_pretrained(tmp_path)
    wanted = load_pipeline(tmp_path, **WAYS[way], text_encoder=None, vae=None)
    assert same(bits(pipe.transformer, TARGETS[name]), bits(wanted.transformer, TARGETS[name]))


def test_fusing_starts_from_a_single_file(tiny, tmp_path):
    name = "z-image"
    plain = diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
    state = {key: value.contiguous() for key, value in plain.transformer.state_dict().items()}
    save_file(state, tmp_path / "finetune.safetensors")
    pipe = load_pipeline(tiny(name), transformer_file=tmp_path / "finetune.safetensors", quantization="int8")
    weights = bits(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.fuse_lora()
    assert "from their weights in the checkpoint" in str(pipe.quantization_report)
    pipe.unfuse_lora()
    assert same(bits(pipe.transformer, TARGETS[name]), weights)


@pytest.mark.parametrize("way", ["saved", "changed", "gone"])
@pytest.mark.parametrize("method", ["int8", "int4", "fp8-dynamic"])
def test_without_the_checkpoint_the_quantized_weights_are_kept(method, way, tiny, expected, tmp_path):
    name = "z-image"
    pipe = load_pipeline(tiny(name), quantization=method) if way == "saved" else None
    if pipe is None:
        diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16).save_pretrained(tmp_path)
        pipe = load_pipeline(tmp_path, quantization=method)
        file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
        state = {key: value + 1 for key, value in load_file(file).items()}
        file.unlink()
        if way == "changed":
            save_file(state, file)
    else:
        pipe.save_pretrained(tmp_path)
        pipe = load_pipeline(tmp_path)
    weights = bits(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.fuse_lora()
    fused = bits(pipe.transformer, TARGETS[name])
    assert relative_error(generate(pipe, name), expected(name)) < LARGEST_ERROR.get(method, 0.13)
    assert "rounding twice" in str(pipe.quantization_report)
    assert " dB" in str(pipe.quantization_report)
    for _ in range(3):
        pipe.unfuse_lora()
        assert same(bits(pipe.transformer, TARGETS[name]), weights)
        pipe.fuse_lora()
        assert same(bits(pipe.transformer, TARGETS[name]), fused)


@pytest.mark.parametrize("way", WAYS)
def test_connectors_of_ltx2(way, tiny):
    pipe = load_pipeline(tiny("ltx2.3"), **WAYS[way])
    weights, without = bits(pipe.connectors, [CONNECTOR_TARGET]), generate(pipe, "ltx2.3")
    pipe.load_lora_weights(lora(pipe.connectors, [CONNECTOR_TARGET], prefix="connectors"))
    beside = generate(pipe, "ltx2.3")
    assert not torch.equal(beside, without)
    pipe.fuse_lora(components=["transformer", "connectors"])
    assert not same(bits(pipe.connectors, [CONNECTOR_TARGET]), weights)
    assert relative_error(generate(pipe, "ltx2.3"), beside) < LARGEST_ERROR.get(way, 0.13)
    pipe.unfuse_lora(components=["transformer", "connectors"])
    assert same(bits(pipe.connectors, [CONNECTOR_TARGET]), weights)


def test_layerwise_casting_in_either_order(tiny, expected):
    name = "z-image"
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16)
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    first = generate(pipe, name)
    assert relative_error(first, expected(name)) < 0.13
    kinds = {p.dtype for n, p in pipe.transformer.named_parameters() if "lora_" in n}
    after = load_pipeline(tiny(name), **WAYS["layerwise"])
    after.load_lora_weights(lora(after.transformer, TARGETS[name]))
    kinds |= {p.dtype for n, p in after.transformer.named_parameters() if "lora_" in n}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("source", ["folder", "file"])
def test_copies_unfuse_on_their_own(source, tiny, tmp_path):
    name = "z-image"
    keywords = {"quantization": "int8", "text_encoder": None, "vae": None}
    if source == "file":
        plain = diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
        save_file({key: value.contiguous() for key, value in plain.transformer.state_dict().items()}, tmp_path / "f.safetensors")
        keywords["transformer_file"] = tmp_path / "f.safetensors"
    pipe = load_pipeline(tiny(name), **keywords)
    weights = bits(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.fuse_lora()
    fused = bits(pipe.transformer, TARGETS[name])
    buffer = io.BytesIO()
    torch.save(pipe.transformer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(pipe.transformer), torch.load(buffer, weights_only=False)):
        twin.unfuse_lora()
        assert same(bits(twin, TARGETS[name]), weights)
        assert same(bits(pipe.transformer, TARGETS[name]), fused)


@pytest.mark.parametrize("how", ["unload", "delete"])
def test_what_was_fused_stays_without_its_adapter(how, tiny):
    """As in diffusers: adapters are fused and thrown away to save memory, and others come on top."""
    name = "z-image"
    pipe = load_pipeline(tiny(name), quantization="int8", text_encoder=None, vae=None)
    weights = bits(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]), adapter_name="one")
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name], seed=6), adapter_name="other")
    pipe.fuse_lora(adapter_names=["one"])
    fused = bits(pipe.transformer, TARGETS[name])
    if how == "unload":
        pipe.unload_lora_weights()
        pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name], seed=6), adapter_name="other")
    else:
        pipe.delete_adapters("one")
    assert same(bits(pipe.transformer, TARGETS[name]), fused)
    pipe.fuse_lora(adapter_names=["other"])
    assert not same(bits(pipe.transformer, TARGETS[name]), fused)
    pipe.unfuse_lora()
    assert same(bits(pipe.transformer, TARGETS[name]), fused)
    assert not same(fused, weights)


def test_one_of_two_fused_adapters_is_not_deleted(tiny):
    name = "z-image"
    pipe = load_pipeline(tiny(name), quantization="int8", text_encoder=None, vae=None)
    for seed, adapter in ((5, "one"), (6, "other")):
        pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name], seed=seed), adapter_name=adapter)
    pipe.set_adapters(["one", "other"])
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="'one' is fused together with other: call unfuse_lora"):
        pipe.delete_adapters("one")


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_checkpoint_that_went_while_fused(change, tiny, tmp_path):
    """Unfusing cannot give back what is not there any more, and says so before it touches a weight."""
    name = "z-image"
    diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16).save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, quantization="int8")
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.fuse_lora()
    fused = bits(pipe.transformer, TARGETS[name])
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    if change == "changed":
        save_file({key: value + 1 for key, value in state.items()}, file)
    with pytest.raises(ValueError, match="has changed since the model was loaded, or is gone"):
        pipe.unfuse_lora()
    assert same(bits(pipe.transformer, TARGETS[name]), fused)


def test_another_working_folder(tiny, tmp_path, monkeypatch):
    name = "z-image"
    monkeypatch.chdir(tiny(name).parent)
    pipe = load_pipeline(tiny(name).name, quantization="int8")
    weights = bits(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.fuse_lora()
    monkeypatch.chdir(tmp_path)
    pipe.unfuse_lora()
    assert same(bits(pipe.transformer, TARGETS[name]), weights)


def test_files_that_are_no_weights_are_passed_over(tiny, tmp_path):
    """A variant that git did not fetch is a text file of that name."""
    name = "z-image"
    diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16).save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, quantization="int8")
    (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1"
    )
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]))
    pipe.fuse_lora()
    assert "from their weights in the checkpoint" in str(pipe.quantization_report)


# --- what is wrong with a LoRA -------------------------------------------------------------------------------------------------

BROKEN = {
    "another family": (
        lambda state: {key.replace("layers", "double_blocks"): value for key, value in state.items()},
        "2 of the 2 layers of the LoRA are not in this pipeline, the first of them 'transformer.double_blocks.0.attention.to_q'",
    ),
    "another family, a layer apart": (
        lambda state: {
            **{key.replace("layers", "double_blocks"): value for key, value in state.items()},
            **{key.replace("layers", "triple_blocks"): value for key, value in state.items()},
            **{key: value for key, value in state.items() if "to_q" in key},
        },
        "4 of the 5 layers",
    ),
    "a text encoder's": (
        lambda state: {key.replace("transformer.", "unet."): value for key, value in state.items()},
        "no weight for",
    ),
    "other inputs": (
        lambda state: {key: value[..., :3] if "lora_A" in key else value for key, value in state.items()},
        "it has 3 inputs for 'transformer.layers.0.attention.to_q', and the model",
    ),
    "other outputs": (
        lambda state: {key: value[:3] if "lora_B" in key else value for key, value in state.items()},
        "it has 3 outputs for",
    ),
    "no LoRA": (lambda state: {"layers.0.weight": torch.zeros(2, 2)}, "is no LoRA: no name in it says lora or lokr"),
    "NaN": (lambda state: {key: value * float("nan") for key, value in state.items()}, "NaN or infinity"),
    "infinity": (lambda state: {key: value / 0 for key, value in state.items()}, "NaN or infinity"),
}


@pytest.mark.parametrize("way", ["bf16", "int8", "layerwise"])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_loras_are_refused_and_leave_nothing(what, way, tiny):
    pipe = load_pipeline(tiny("z-image"), **WAYS.get(way, {"dtype": torch.bfloat16}))
    without = generate(pipe, "z-image")
    change, message = BROKEN[what]
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(change(lora(pipe.transformer, TARGETS["z-image"])), adapter_name="broken")
    assert not any(pipe.get_list_adapters().values())
    assert torch.equal(generate(pipe, "z-image"), without)
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS["z-image"]), adapter_name="broken")  # the name is free
    assert not torch.equal(generate(pipe, "z-image"), without)


@pytest.mark.parametrize("text", ["", "not a checkpoint"])
def test_a_file_that_is_no_lora_is_named(text, tiny, tmp_path):
    pipe = load_pipeline(tiny("z-image"), quantization="int8")
    file = tmp_path / "style.safetensors"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"style\.safetensors' cannot be read as a LoRA") as error:
        pipe.load_lora_weights(file)
    assert "\n" not in str(error.value)
    save_file({"layers.0.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"style\.safetensors' is no LoRA: no name in it says lora or lokr"):
        pipe.load_lora_weights(file)


def test_layers_without_a_place_are_told(tiny):
    pipe = load_pipeline(tiny("z-image"), quantization="int8")
    state = lora(pipe.transformer, TARGETS["z-image"])
    more = {key.replace("layers.0", "layers.77"): value for key, value in state.items() if "layers.0" in key}
    with pytest.warns(UserWarning, match=r"1 of the 3 layers .* no place here .*: 'transformer\.layers\.77\.attention\.to_q'"):
        pipe.load_lora_weights({**state, **more})
    assert "1 of the 3 layers of the LoRA have no place here" in str(pipe.quantization_report)
    pipe.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_lora_weights(state)
    assert "no place here" not in str(pipe.quantization_report)


def test_a_sum_that_overflows_is_refused_and_nothing_is_fused(tiny):
    """Neither the layer of the overflow, which is the last here, nor those before it."""
    name = "z-image"
    pipe = load_pipeline(tiny(name), quantization="int8")
    weights = bits(pipe.transformer, TARGETS[name])
    state = lora(pipe.transformer, TARGETS[name])
    pipe.load_lora_weights({key: value * 1e30 if TARGETS[name][1] in key else value for key, value in state.items()})
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipe.fuse_lora()
    assert same(bits(pipe.transformer, TARGETS[name]), weights)
    assert "fused" not in str(pipe.quantization_report)


def test_a_broken_swap_leaves_the_adapter_that_was_there(tiny):
    name = "z-image"
    pipe = load_pipeline(tiny(name), quantization="int8")
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS[name]), adapter_name="style")
    before = generate(pipe, name)
    broken = {key: value * float("nan") for key, value in lora(pipe.transformer, TARGETS[name], seed=6).items()}
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipe.load_lora_weights(broken, adapter_name="style", hotswap=True)
    assert torch.equal(generate(pipe, name), before)


def test_one_broken_model_of_two(tiny):
    pipe = load_pipeline(tiny("ltx2.3"), quantization="int8")
    state = lora(pipe.transformer, TARGETS["ltx2.3"])
    broken = lora(pipe.connectors, [CONNECTOR_TARGET], prefix="connectors")
    with pytest.raises(ValueError, match="of the connectors"):
        pipe.load_lora_weights({**state, **{key: value * float("nan") for key, value in broken.items()}})
    assert not any(pipe.get_list_adapters().values())


def test_what_was_refused_does_not_spoil_saving(tiny, tmp_path):
    pipe = load_pipeline(tiny("z-image"), quantization="int8")
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipe.load_lora_weights({k: v * float("nan") for k, v in lora(pipe.transformer, TARGETS["z-image"]).items()})
    pipe.save_pretrained(tmp_path / "one")
    assert torch.equal(generate(load_pipeline(tmp_path / "one"), "z-image"), generate(pipe, "z-image"))
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS["z-image"]), adapter_name="style")
    pipe.transformer.delete_adapters("style")  # peft's layers stay
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("way", ["bf16", "int8", "int4", "fp8-dynamic", "fp8-weight-only"])
def test_dora(way, tiny):
    """Beside weights of any kind; fused into those that are not quantized, as peft does it."""
    from peft import LoraConfig

    pipe = load_pipeline(tiny("z-image"), **WAYS.get(way, {"dtype": torch.bfloat16}))
    pipe.transformer.add_adapter(LoraConfig(use_dora=True, target_modules=["to_q"], init_lora_weights=False), "dora")
    beside = generate(pipe, "z-image")
    assert torch.isfinite(beside).all()
    if way != "bf16":
        with pytest.raises(ValueError, match="more than a LoRA"):
            pipe.fuse_lora()
        return
    pipe.fuse_lora()
    assert relative_error(generate(pipe, "z-image"), beside) < 0.05
    pipe.unfuse_lora()


def test_pipelines_without_loras_say_so(tiny):
    pipe = load_pipeline(tiny("ltx2-latent-upsample"), dtype=torch.bfloat16)
    with pytest.raises(AttributeError, match="takes no LoRAs"):
        pipe.load_lora_weights({})


def test_a_path_where_nothing_is(tiny, tmp_path):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16)
    for path in (tmp_path / "none.safetensors", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=r"there is no LoRA '.*none.*': give a file"):
            pipe.load_lora_weights(path)


@pytest.mark.parametrize("way", ["int8", "fp8-dynamic", "fp8-weight-only"])
def test_a_lora_is_trained_beside_quantized_weights(way, tiny):
    """All its gradients are those beside bf16, as near as the weights are."""
    from peft import LoraConfig

    def gradients(**keywords):
        pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, **keywords)
        model = pipe.transformer.requires_grad_(False)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "w2"], init_lora_weights=False))
        output = model(**pipe.family.forwards.step(model, torch.device("cpu"), Size(64, 64, text=16)))
        sum(leaf.float().square().sum() for leaf in tree_leaves(output) if torch.is_tensor(leaf)).backward()
        return {name: one.grad.flatten() for name, one in model.named_parameters() if one.requires_grad}

    expected, found = gradients(), gradients(**WAYS[way])
    assert expected.keys() == found.keys()
    assert relative_error(torch.cat(list(found.values())), torch.cat(list(expected.values()))) < 0.2
