"""What is done to a pipeline whose transformer was read from an fp8 file: the weights and their scales stay what they were."""

import copy
import io
from contextlib import suppress

import diffusers
import pytest
import torch
from cases import (
    BF16,
    FAMILIES,
    checkpoint,
    folder,
    forward,
    load,
    official,
    parts,
    reference,
    same_bits,
    same_weights,
    transformer,
)
from conftest import generate, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Float8Tensor
from torchao.utils import TorchAOBaseTensor
from writer import LAYOUTS, write

from llm_dit import load_pipeline

METHODS = ("fp8-weight-only", "fp8-dynamic")
DEV = "flux2-dev"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def dev(tiny, method):
    """(folder, file, a pipeline of FLUX.2 dev from it)."""
    source = folder(tiny, DEV)
    path, _ = checkpoint(source, DEV, "scaled")
    return source, path, load(source, path, quantization_transformer=method)


@pytest.fixture
def whole(tiny):
    """`whole(name, method, layout)`: a pipeline with all its components."""

    def make(name, method="fp8-dynamic", layout="scaled", **keywords):
        source = folder(tiny, name)
        path, _ = checkpoint(source, name, layout)
        return load_pipeline(source, torch_dtype=BF16, transformer_file=path, quantization_transformer=method, **keywords)

    return make


def snapshot(model):
    return {name: [part.clone() for part in parts(tensor)] for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert all(same_bits(part, was) for part, was in zip(parts(tensor), before[name], strict=True)), name


# --- moving and copying ----------------------------------------------------------------------------------------------------


def test_moving(dev):
    source, _, pipe = dev
    before = snapshot(pipe.transformer)
    output = forward(pipe.transformer, source, DEV)
    assert pipe.to("cpu") is pipe
    assert_unchanged(pipe.transformer.to("cpu"), before)
    assert torch.equal(forward(pipe.transformer, source, DEV), output)


def test_casting_is_refused_and_changes_nothing(dev):
    source, _, pipe = dev
    before = snapshot(pipe.transformer)
    output = forward(pipe.transformer, source, DEV)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match="transformer is quantized: give torch_dtype to from_pretrained"):
            pipe.to(dtype)
    assert_unchanged(pipe.transformer, before)
    assert torch.equal(forward(pipe.transformer, source, DEV), output)


def test_casting_the_transformer_itself_keeps_bytes_and_scales(dev):
    """diffusers refuses it or torchao ignores it for the weights: either way no scale is rounded."""
    _, _, pipe = dev
    before = snapshot(pipe.transformer)
    quantized = {name for name, p in pipe.transformer.named_parameters() if isinstance(p, Float8Tensor)}
    try:
        pipe.transformer.to(torch.float16)
    except ValueError:
        assert_unchanged(pipe.transformer, before)
    for name in quantized:
        weight = pipe.transformer.get_parameter(name)
        assert weight.qdata.dtype == torch.float8_e4m3fn
        assert weight.scale.dtype == torch.float32
        assert all(same_bits(part, was) for part, was in zip(parts(weight), before[name], strict=True))


def test_deep_copies(dev):
    source, _, pipe = dev
    twin = copy.deepcopy(pipe.transformer)
    same_weights(twin, pipe.transformer)
    assert torch.equal(forward(twin, source, DEV), forward(pipe.transformer, source, DEV))
    before = snapshot(pipe.transformer)
    with torch.no_grad():
        for parameter in twin.parameters():
            for part in parts(parameter):
                part.view(torch.uint8).zero_() if part.dtype == torch.float8_e4m3fn else part.zero_()
    assert_unchanged(pipe.transformer, before)


def test_state_dicts(dev):
    source, path, pipe = dev
    output = forward(pipe.transformer, source, DEV)
    state = copy.deepcopy(pipe.transformer.state_dict())
    twin = load(source, path, quantization_transformer=pipe.quantization_report["transformer"].method).transformer
    for assign in (False, True):
        with torch.no_grad():
            twin.transformer_blocks[0].ff.linear_in.weight.scale.fill_(1.0)
        assert not torch.equal(forward(twin, source, DEV), output)
        assert not any(twin.load_state_dict(state, assign=assign))
        same_weights(twin, pipe.transformer)
        assert torch.equal(forward(twin, source, DEV), output)


def test_torch_save(dev):
    """Without unpickling anything else."""
    _, _, pipe = dev
    buffer = io.BytesIO()
    torch.save(pipe.transformer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for name, tensor in pipe.transformer.state_dict().items():
        assert all(same_bits(a, b) for a, b in zip(parts(state[name]), parts(tensor), strict=True))


def test_weights_from_one_fused_tensor_are_apart(dev):
    """Writing to the queries changes no key, although both came from one tensor of the file."""
    _, _, pipe = dev
    attention = pipe.transformer.transformer_blocks[0].attn
    before = attention.to_k.weight.qdata.view(torch.uint8).clone()
    attention.to_q.weight.qdata.view(torch.uint8).zero_()
    attention.to_q.weight.scale.zero_()
    assert torch.equal(attention.to_k.weight.qdata.view(torch.uint8), before)
    assert attention.to_k.weight.scale.all()


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("name", FAMILIES)
def test_offloading(name, offload, whole):
    pipe = whole(name)
    before = snapshot(pipe.transformer)
    expected = generate(whole(name).to("cuda"), name)
    getattr(pipe, offload)()
    assert relative_error(generate(pipe, name), expected) < 0.01
    pipe.remove_all_hooks()
    assert_unchanged(pipe.transformer.to("cpu"), before)


def test_group_offloading_to_the_disk_or_host(dev):
    """What runs without a GPU: groups that go from the host to the host."""
    source, _, pipe = dev
    output = forward(pipe.transformer, source, DEV)
    before = snapshot(pipe.transformer)
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(forward(pipe.transformer, source, DEV), output)
    assert_unchanged(pipe.transformer, before)


def test_gradients_pass_through(dev):
    """Training a LoRA, or guiding by gradients: the weights take none, their inputs do."""
    _, _, pipe = dev
    linear = pipe.transformer.transformer_blocks[0].ff.linear_in
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(BF16).requires_grad_()
    if pipe.quantization_report["transformer"].method == "fp8-weight-only":
        linear(x).float().sum().backward()
        assert relative_error(x.grad, linear.weight.dequantize().sum(0).expand(3, -1)) < 0.02
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())


# --- layerwise casting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_layerwise_casting_afterwards_leaves_the_scales(name, tiny, method):
    """diffusers' own call casts what is left in bf16 to fp8, and does not touch what is quantized."""
    source = folder(tiny, name)
    model = load(source, checkpoint(source, name, "scaled")[0], quantization_transformer=method).transformer
    before = snapshot(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    for _ in range(2):
        output = forward(model, source, name)
    assert relative_error(output, reference(source, name)) < 0.07
    found = 0
    for key, parameter in model.named_parameters():
        if isinstance(parameter, TorchAOBaseTensor):
            found += 1
            assert all(same_bits(part, was) for part, was in zip(parts(parameter), before[key], strict=True)), key
            assert parameter.scale.dtype == torch.float32
    assert found > 0


# --- LoRA ------------------------------------------------------------------------------------------------------------------

TARGETS = {
    "z-image": ("layers.0.attention.to_q", "layers.1.attention.to_v", "layers.1.feed_forward.w2"),
    "flux2-klein": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"),
    DEV: ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "single_transformer_blocks.0.attn.to_out"),
    "qwen-image": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_v_proj"),
    "ltx2": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"),
    "ltx2.3": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"),
}


def lora_file(model, name, path):
    """A LoRA of rank 4 that moves the output well beyond the error of fp8."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for target in TARGETS[name]:
        linear = model.get_submodule(target)
        state[f"transformer.{target}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=generator) / 4
        state[f"transformer.{target}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=generator) / 4
    save_file(state, path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_is_a_side_branch(name, tiny, method, tmp_path):
    pytest.importorskip("peft")
    source = folder(tiny, name)
    lora = lora_file(transformer(source), name, tmp_path / "lora.safetensors")
    plain = load(source)
    plain.load_lora_weights(tmp_path, weight_name=lora.name)
    expected = forward(plain.transformer, source, name)
    assert relative_error(expected, reference(source, name)) > 0.03
    pipe = load(source, checkpoint(source, name, "scaled")[0], quantization_transformer=method)
    before = snapshot(pipe.transformer)
    without_lora = forward(pipe.transformer, source, name)
    pipe.load_lora_weights(tmp_path, weight_name=lora.name)
    assert relative_error(forward(pipe.transformer, source, name), expected) < 0.012
    pipe.set_adapters(pipe.get_active_adapters(), 0.0)
    assert torch.equal(forward(pipe.transformer, source, name), without_lora)
    pipe.unload_lora_weights()
    assert_unchanged(pipe.transformer, before)
    assert torch.equal(forward(pipe.transformer, source, name), without_lora)


def test_a_lora_is_not_fused_into_fp8_silently(tiny, method, tmp_path):
    """Fusing would need the weight in bf16 and a new scale; it is refused, or done with one: it is never lost."""
    pytest.importorskip("peft")
    source = folder(tiny, DEV)
    lora = lora_file(transformer(source), DEV, tmp_path / "lora.safetensors")
    pipe = load(source, checkpoint(source, DEV, "scaled")[0], quantization_transformer=method)
    pipe.load_lora_weights(tmp_path, weight_name=lora.name)
    expected = forward(pipe.transformer, source, DEV)
    # torchao asserts that there is a GPU before it quantizes a weight for fp8-dynamic again.
    with suppress(ValueError, NotImplementedError, RuntimeError, TypeError, AssertionError):
        pipe.fuse_lora()
    assert relative_error(forward(pipe.transformer, source, DEV), expected) < 0.02


# --- saving ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["scaled", "row", "raw", "legacy", "raw-biases"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_again_it_generates_the_same(name, layout, whole, tmp_path):
    methods = METHODS if layout == "scaled" else METHODS[1:]
    for method in methods:
        pipe = whole(name, method, layout)
        output = generate(pipe, name)
        pipe.save_pretrained(tmp_path / method)
        again = load_pipeline(tmp_path / method)
        same_weights(again.transformer, pipe.transformer)
        assert torch.equal(generate(again, name), output)
        assert again.quantization_report["transformer"].bytes_after == pipe.quantization_report["transformer"].bytes_after
        again.save_pretrained(tmp_path / f"{method}-twice")
        same_weights(load_pipeline(tmp_path / f"{method}-twice").transformer, pipe.transformer)


@pytest.mark.parametrize("layout", ["scaled", "row", "legacy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_loads_what_was_saved(name, layout, whole, tmp_path, method):
    pipe = whole(name, method, layout)
    output = generate(pipe, name)
    pipe.save_pretrained(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, dtype=BF16)
    assert {type(p) for p in plain.transformer.parameters()} == {nn.Parameter, Float8Tensor}
    assert relative_error(generate(plain, name), output) < 1e-6


@pytest.mark.parametrize("granularity", ["per-row", "per-tensor"])
def test_per_tensor_scales_are_saved_too(granularity, whole, tmp_path):
    pipe = whole(DEV, quantization_granularity=granularity)
    output = generate(pipe, DEV)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    same_weights(again.transformer, pipe.transformer)
    assert torch.equal(generate(again, DEV), output)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, dtype=BF16)
    assert relative_error(generate(plain, DEV), output) < 1e-6


def test_a_saved_folder_is_as_large_as_its_weights(whole, tmp_path):
    """A third of a fused tensor must not be saved, or held in memory after loading, as all of it."""
    pipe = whole(DEV)
    pipe.save_pretrained(tmp_path)
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    expected = sum(part.nbytes for tensor in pipe.transformer.state_dict().values() for part in parts(tensor))
    with safe_open(file, framework="pt") as opened:
        assert sum(opened.get_tensor(key).nbytes for key in opened.keys()) == expected  # noqa: SIM118
    assert expected <= file.stat().st_size < 1.1 * expected
    assert len({tensor.data_ptr() for tensor in load_file(file).values()}) == len(load_file(file))


def test_saving_over_the_file_it_came_from_is_no_crash(tiny, tmp_path):
    """The model may be mapped from the file: its folder can be saved anywhere but there, and generates as before."""
    source = folder(tiny, DEV)
    write(tmp_path / "x.safetensors", official(source, DEV), LAYOUTS["scaled"])
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=tmp_path / "x.safetensors")
    output = generate(pipe, DEV)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "x.safetensors").unlink()
    assert torch.equal(generate(pipe, DEV), output)
    assert torch.equal(generate(load_pipeline(tmp_path), DEV), output)


def test_saved_again_from_another_components_file(whole, tmp_path):
    """With an int8 encoder and VAE beside it."""
    pipe = whole("qwen-image", quantization={"encoder": "int8", "vae": "int8", "transformer": "fp8-dynamic"})
    output = generate(pipe, "qwen-image")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), "qwen-image"), output)


def test_sharded(whole, tmp_path):
    pipe = whole(DEV)
    output = generate(pipe, DEV)
    pipe.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert torch.equal(generate(load_pipeline(tmp_path), DEV), output)
