"""Whole files of LTX-2 and LTX-2.3: transformer, connectors, VAE, audio VAE and vocoder come from them, and from nowhere else."""

import logging
import re
from functools import cache

import pytest
import torch
from cases import BF16, folder, forward, load, reference, same_bits, same_weights, transformer
from conftest import generate, relative_error
from diffusers import DiffusionPipeline
from official_names import ltx_monolith
from torchao.quantization import Float8Tensor
from writer import LAYOUTS, with_tensor, without, write

from llm_dit import load_pipeline
from llm_dit.quantization import quantize_component

NAMES = ("ltx2", "ltx2.3")
PARTS = ("transformer", "connectors", "vae", "audio_vae", "vocoder")
LAYOUT_NAMES = ("bf16", "scaled", "raw-biases", "column")


@cache
def finetune(source):
    """The components of a model of the same sizes with other weights: what of the folder's is left over would be seen."""
    pipe = DiffusionPipeline.from_pretrained(source, dtype=BF16)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in PARTS:
            for tensor in getattr(pipe, part).state_dict().values():
                assert tensor.is_floating_point()
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(tensor.float() * (1 + 0.2 * noise) + 0.001 * noise)
    return pipe


@cache
def monolith(source, layout):
    """A whole file of that model, and the float32 values that it stands for."""
    pipe = finetune(source)
    tensors = ltx_monolith({part: getattr(pipe, part).state_dict() for part in PARTS})
    path = source.with_name(f"{source.name}-whole-{layout}.safetensors")
    return path, write(path, tensors, LAYOUTS[layout], metadata={"config": '{"transformer": {}}'}, prefix="")


def expected(source, layout):
    """By component, what the file stands for, under the names of diffusers: its names made from tensors that number them."""
    path, values = monolith(source, layout)
    pipe = finetune(source)
    result = {}
    for part in PARTS:
        state = getattr(pipe, part).state_dict()
        keys = ltx_monolith({part: {name: torch.full(t.shape, i) for i, (name, t) in enumerate(state.items())}})
        names = list(state)
        result[part] = {names[int(number.flatten()[0])]: values[key] for key, number in keys.items()}
    return path, result


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_every_component_is_filled_from_the_file(name, layout, tiny):
    source = folder(tiny, name)
    path, parts = expected(source, layout)
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=path)
    for part in PARTS:
        state = getattr(pipe, part).state_dict()
        assert state.keys() == parts[part].keys()
        for key, tensor in state.items():
            if isinstance(tensor, Float8Tensor):
                assert part == "transformer"
                assert torch.equal(tensor.dequantize(torch.float32), parts[part][key]), key
            else:
                assert same_bits(tensor, parts[part][key].to(BF16)), f"{part}.{key}"
        if part != "transformer":
            assert path.name in pipe.quantization_report[part].note
            assert pipe.quantization_report[part].method == "none"
    assert (pipe.quantization_report["transformer"].backend == "checkpoint") == (layout != "bf16")
    assert torch.isfinite(generate(pipe, name)).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_generates_what_the_bf16_model_generates(name, tiny):
    source = folder(tiny, name)
    plain = DiffusionPipeline.from_pretrained(source, **{part: getattr(finetune(source), part) for part in PARTS}, dtype=BF16)
    output = generate(plain, name)
    whole = load_pipeline(source, torch_dtype=BF16, transformer_file=monolith(source, "bf16")[0])
    assert torch.equal(generate(whole, name), output)
    scaled = load_pipeline(source, torch_dtype=BF16, transformer_file=monolith(source, "scaled")[0])
    assert relative_error(generate(scaled, name), output) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_components_are_quantized_while_they_are_read(name, tiny):
    source = folder(tiny, name)
    quantization = {"vae": "int8", "connectors": "int8", "transformer": "fp8-weight-only"}
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=monolith(source, "scaled")[0], quantization=quantization)
    methods = {report.name: (report.method, report.backend) for report in pipe.quantization_report}
    assert methods["transformer"] == ("fp8-weight-only", "checkpoint")
    assert {methods[part] for part in ("connectors", "vae", "audio_vae", "vocoder")} == {("int8", "torchao")}
    assert methods["text_encoder"] == ("none", None)
    usual = DiffusionPipeline.from_pretrained(source, dtype=BF16)
    for part in PARTS[1:]:
        model = getattr(usual, part)
        model.load_state_dict(getattr(finetune(source), part).state_dict())
        quantize_component(model, "int8", "encoder" if part == "connectors" else "vae")
        same_weights(getattr(pipe, part), model)


@pytest.mark.parametrize("part", ["vae", "connectors", "vocoder"])
def test_a_component_that_was_passed_wins(part, tiny):
    source = folder(tiny, "ltx2.3")
    path, parts = expected(source, "scaled")
    own = getattr(DiffusionPipeline.from_pretrained(source, dtype=BF16), part)
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=path, **{part: own})
    assert getattr(pipe, part) is own
    assert all(same_bits(tensor, before[key]) for key, tensor in own.state_dict().items())
    other = "audio_vae"
    assert all(same_bits(tensor, parts[other][key].to(BF16)) for key, tensor in pipe.audio_vae.state_dict().items())


def test_a_component_that_is_not_wanted_is_not_read(tiny):
    source = folder(tiny, "ltx2.3")
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=monolith(source, "scaled")[0], vae=None, vocoder=None)
    assert pipe.vae is None
    assert pipe.vocoder is None


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(name, tiny, tmp_path):
    source = folder(tiny, name)
    path, _ = monolith(source, "scaled")
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=path, quantization_vae="int8")
    output = generate(pipe, name)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), name), output)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_transformer_alone_fills_it_alone(name, prefix, tiny, tmp_path):
    """Kijai's and others' splits, with and without the prefix."""
    source = folder(tiny, name)
    tensors = ltx_monolith({"transformer": transformer(source).state_dict()})
    tensors = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in tensors.items()}
    write(tmp_path / "x.safetensors", tensors, LAYOUTS["scaled"], prefix=prefix)
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=tmp_path / "x.safetensors")
    assert pipe.quantization_report["transformer"].quantized_layers == 56
    same_weights(pipe.vae, DiffusionPipeline.from_pretrained(source, dtype=BF16).vae)
    assert pipe.quantization_report["vae"].note == ""
    assert relative_error(forward(pipe.transformer, source, name), reference(source, name)) < 0.01


@pytest.mark.parametrize("part", PARTS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_a_component_of_which_a_tensor_is_missing_or_too_many(name, part, tiny):
    source = folder(tiny, name)
    path, _ = monolith(source, "bf16")
    state = getattr(finetune(source), part).state_dict()
    key = list(ltx_monolith({part: state}))[-1]
    with pytest.raises(ValueError, match="does not fill"):
        load_pipeline(source, torch_dtype=BF16, transformer_file=without(path, key))
    extra = f"{key.rpartition('.')[0]}.extra"
    with pytest.raises(ValueError, match="extra"):
        load_pipeline(source, torch_dtype=BF16, transformer_file=with_tensor(path, extra, torch.ones(3)))


@pytest.mark.parametrize(
    ("part", "without_part"), [("connectors", "video_text_proj_in"), ("connectors", "audio_connector"), ("vae", "encoder")]
)
def test_a_component_that_the_file_holds_in_part_comes_from_the_folder(part, without_part, tiny, tmp_path):
    """Files of the transformer that kept the connectors between its blocks, and VAEs with a decoder alone."""
    source = folder(tiny, "ltx2.3")
    state = {name: getattr(finetune(source), name).state_dict() for name in ("transformer", part)}
    state[part] = {name: tensor for name, tensor in state[part].items() if not name.startswith(f"{without_part}.")}
    write(tmp_path / "x.safetensors", ltx_monolith(state), LAYOUTS["scaled"], prefix="")
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=tmp_path / "x.safetensors")
    same_weights(getattr(pipe, part), getattr(DiffusionPipeline.from_pretrained(source, dtype=BF16), part))
    note = pipe.quantization_report["transformer"].note
    assert f"its {part} are not read, and come from the folder" in note
    assert without_part in note


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_connectors_are_found_behind_any_prefix(prefix, tiny, tmp_path):
    source = folder(tiny, "ltx2.3")
    state = {name: getattr(finetune(source), name).state_dict() for name in ("transformer", "connectors")}
    tensors = {key.replace("model.diffusion_model.", prefix): tensor for key, tensor in ltx_monolith(state).items()}
    write(tmp_path / "x.safetensors", tensors, LAYOUTS["bf16"], prefix="")
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=tmp_path / "x.safetensors")
    same_weights(pipe.connectors, finetune(source).connectors)


@pytest.mark.parametrize("key", ["new_module", "model.new_module", "vae2.conv"])
def test_a_scaled_weight_outside_of_all_components_is_an_error(key, tiny):
    """A module that a later version of the model needs, say: every scale lands on a weight, or the load fails."""
    source = folder(tiny, "ltx2.3")
    path = with_tensor(monolith(source, "scaled")[0], f"{key}.weight", torch.ones(16, 16).to(torch.float8_e4m3fn))
    path = with_tensor(path, f"{key}.weight_scale", torch.tensor(0.1))
    with pytest.raises(ValueError, match=re.escape(f"{key}.weight")):
        load_pipeline(source, torch_dtype=BF16, transformer_file=path)


def test_nothing_is_warned_of(tiny, caplog):
    """diffusers would print each component that its index calls a module of a pipeline, and ask to check it."""
    source = folder(tiny, "ltx2.3")
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        load_pipeline(source, torch_dtype=BF16, transformer_file=monolith(source, "scaled")[0])
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage()[:100] for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_monolith_of_the_other_version_is_refused(tiny):
    for name, other in (NAMES, NAMES[::-1]):
        path, _ = monolith(folder(tiny, other), "scaled")
        with pytest.raises(ValueError, match=path.name):
            load(folder(tiny, name), path)
