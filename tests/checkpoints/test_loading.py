"""Official fp8 files of every model in every layout: the weights are the file's, to the bit, and the output is the model's.

Errors are relative L2 of one forward of the transformer against the bf16 model that the file was made from; `cases.py` says how
the tiny models are made to add no error of their own.
"""

from dataclasses import replace

import pytest
import torch
from cases import (
    BF16,
    FAMILIES,
    FP8_FILES,
    checkpoint,
    converted,
    folder,
    forward,
    fp8_bytes,
    fp8_mask,
    load,
    official,
    reference,
    same_bits,
    same_weights,
    stored,
    transformer,
)
from conftest import relative_error
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor
from writer import LAYOUTS, Layout, with_tensor, write

from llm_dit import load_pipeline
from llm_dit.families.z_image import QuantizableZImagePipeline
from llm_dit.quantization import PipelineQuantConfig, quantize_component

FP8_METHODS = ("fp8-weight-only", "fp8-dynamic")
OUTER = [layout.name for layout in LAYOUTS.values() if layout.fp8 in ("all-linears", "everything")]
"""Layouts that hold the first and the last layer in fp8 as well.

e4m3 moves a Gaussian weight by .026, and what these two add is not made smaller by anything after them: together .037, and with
activations in fp8 .053. No loader could be better; a scale per tensor does not help, for e4m3 is a floating-point format.
"""
LARGEST_ERROR = {"fp8-weight-only": 0.01, "fp8-dynamic": 0.01}
LARGEST_ERROR_OUTER = {"fp8-weight-only": 0.05, "fp8-dynamic": 0.06}
LARGEST_ERROR_OF_LOADER = 0.01


@pytest.fixture(params=FP8_FILES, ids="-".join, scope="module")
def case(request, tiny):
    """(name of the model, layout, folder, file, values of the file)."""
    name, layout = request.param
    source = folder(tiny, name)
    return name, layout, source, *checkpoint(source, name, layout)


def expected_kept(model, path, values):
    """Names of the Linears whose weights the file holds in e4m3, in shapes that tensor cores take."""
    mask = converted(model, fp8_mask(stored(path, values)))
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and mask[f"{name}.weight"].all()
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    }


@pytest.mark.parametrize("method", FP8_METHODS)
def test_a_file_loads_as_it_is(case, method):
    name, layout, source, path, values = case
    pipe = load(source, path, quantization_transformer=method)
    model, report = pipe.transformer, pipe.quantization_report["transformer"]

    # Which weights stay in fp8.
    kept = expected_kept(transformer(source), path, values)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linears if isinstance(model.get_submodule(name).weight, TorchAOBaseTensor)} == kept
    assert report.backend == "checkpoint"
    assert report.method == method
    assert report.quantized_layers == len(kept) > 0
    assert report.total_layers == len(linears)
    assert report.skip_reasons.keys() == linears - kept
    assert all(report.skip_reasons.values())

    # What the weights are.
    expected = converted(model, values)
    raw = converted(model, fp8_bytes(stored(path, values)))
    mask = converted(model, fp8_mask(stored(path, values)))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        if key.removesuffix(".weight") in kept:
            assert isinstance(tensor, Float8Tensor)
            assert torch.equal(tensor.qdata.view(torch.uint8), raw[key]), key
            assert tensor.scale.dtype == torch.float32
            assert tensor.dtype == BF16
            assert torch.equal(tensor.dequantize(torch.float32), expected[key]), key
        else:
            assert same_bits(tensor, expected[key].to(BF16)), key
        assert not tensor.is_meta
    assert set(report.dequantized) == {key for key in state if mask[key].any() and key.removesuffix(".weight") not in kept}

    # What it computes.
    bounds = LARGEST_ERROR_OUTER if layout in OUTER or not LAYOUTS[layout].scale else LARGEST_ERROR
    output = forward(model, source, name)
    assert relative_error(output, reference(source, name)) < bounds[method]


@pytest.mark.parametrize(("name", "layout"), FP8_FILES)
def test_nothing_is_lost_beyond_what_the_file_lost(name, layout, tiny):
    """Against a bf16 model of the file's own values, nothing is left but the rounding of weights to bf16."""
    source = folder(tiny, name)
    path, values = checkpoint(source, name, layout)
    model = load(source, path, quantization_transformer="fp8-weight-only").transformer
    plain = load(source).transformer
    plain.load_state_dict({key: value.to(BF16) for key, value in converted(plain, values).items()})
    assert relative_error(forward(model, source, name), forward(plain, source, name)) < LARGEST_ERROR_OF_LOADER


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_of_these_tests_hear_every_block(name, tiny):
    """Otherwise a small error would say nothing. (Scales cannot be heard in Z-Image, which normalizes what its blocks add.)"""
    source = folder(tiny, name)
    model = load(source).transformer
    lists = [child for child, module in model.named_children() if isinstance(module, nn.ModuleList)]
    blocks = [block for child in lists for block in model.get_submodule(child)]
    assert len(blocks) >= 2
    for block in blocks:
        weights = [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
        before = [weight.clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight.copy_(weight.flip(0))
            assert relative_error(forward(model, source, name), reference(source, name)) > LARGEST_ERROR["fp8-dynamic"]
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


@pytest.mark.parametrize("method", FP8_METHODS)
def test_activations_are_in_fp8_only_with_fp8_dynamic(method, tiny):
    source = folder(tiny, "flux2-dev")
    pipe = load(source, checkpoint(source, "flux2-dev", "scaled")[0], quantization_transformer=method)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert (weight.act_quant_kwargs is not None) == (method == "fp8-dynamic")


def test_a_file_that_asks_for_16_bit_products_gets_them(tiny):
    """Kijai's marker of two elements (full_precision_matrix_mult): fp8-dynamic multiplies these weights in bf16."""
    source = folder(tiny, "z-image")
    path, _ = checkpoint(source, "z-image", "legacy")
    dynamic = load(source, path, quantization_transformer="fp8-dynamic")
    weight_only = load(source, path, quantization_transformer="fp8-weight-only")
    assert torch.equal(forward(dynamic.transformer, source, "z-image"), forward(weight_only.transformer, source, "z-image"))
    assert "full_precision_matrix_mult" in dynamic.quantization_report["transformer"].note


def test_one_layer_can_ask_for_16_bit_products(tiny, tmp_path):
    source = folder(tiny, "flux2-dev")
    path, _ = checkpoint(source, "flux2-dev", "comfy_quant")
    told = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
    path = with_tensor(path, "double_blocks.1.img_attn.qkv.comfy_quant", torch.tensor(list(told), dtype=torch.uint8))
    model = load(source, path, quantization_transformer="fp8-dynamic").transformer
    without = {name for name, parameter in model.named_parameters() if getattr(parameter, "act_quant_kwargs", False) is None}
    assert without == {f"transformer_blocks.1.attn.{name}.weight" for name in ("to_q", "to_k", "to_v")}


def test_fp8_is_kept_and_multiplied_in_fp8_where_nothing_is_said(tiny):
    source = folder(tiny, "flux2-dev")
    report = load(source, checkpoint(source, "flux2-dev", "scaled")[0]).quantization_report["transformer"]
    assert (report.method, report.backend) == ("fp8-dynamic", "checkpoint")


def test_none_dequantizes(tiny):
    """A user who asks for bf16 gets it, from an fp8 file as well."""
    source = folder(tiny, "flux2-dev")
    path, values = checkpoint(source, "flux2-dev", "scaled")
    pipe = load(source, path, quantization_transformer="none")
    expected = converted(pipe.transformer, values)
    assert all(same_bits(tensor, expected[key].to(BF16)) for key, tensor in pipe.transformer.state_dict().items())
    report = pipe.quantization_report["transformer"]
    assert (report.method, report.quantized_layers) == ("none", 0)
    assert len(report.dequantized) == 28


@pytest.mark.parametrize(("layout", "rows"), [("scaled", 1), ("row", None), ("raw", 1)])
def test_per_tensor_granularity_keeps_a_files_own_scales(layout, rows, tiny):
    source = folder(tiny, "flux2-dev")
    path, values = checkpoint(source, "flux2-dev", layout)
    pipe = load(source, path, quantization_transformer="fp8-dynamic", quantization_granularity="per-tensor")
    expected = converted(pipe.transformer, values)
    weight = pipe.transformer.transformer_blocks[0].ff.linear_in.weight
    assert weight.scale.shape == (rows or weight.shape[0], 1)
    for key, tensor in pipe.transformer.state_dict().items():
        if isinstance(tensor, Float8Tensor):
            assert torch.equal(tensor.dequantize(torch.float32), expected[key])
    # 128 x 128 with one scale is what torchao takes for blockwise scales; that size is multiplied too.
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.shape == (128, 128)
    bound = (LARGEST_ERROR_OUTER if layout == "raw" else LARGEST_ERROR)["fp8-dynamic"]
    assert relative_error(forward(pipe.transformer, source, "flux2-dev"), reference(source, "flux2-dev")) < bound


def test_float16(tiny):
    source = folder(tiny, "qwen-image")
    path, values = checkpoint(source, "qwen-image", "raw")
    pipe = load(source, path, torch_dtype=torch.float16, quantization_transformer="fp8-weight-only")
    expected = converted(pipe.transformer, values)
    for key, tensor in pipe.transformer.state_dict().items():
        assert tensor.dtype == torch.float16
        if not isinstance(tensor, TorchAOBaseTensor):
            assert same_bits(tensor, expected[key].half())


def test_skipped_layers_are_dequantized_and_listed(tiny):
    source = folder(tiny, "flux2-dev")
    path, values = checkpoint(source, "flux2-dev", "scaled")
    pipe = load(source, path, quantization_transformer="fp8-dynamic", quantization_skip=["transformer_blocks.0"])
    report = pipe.quantization_report["transformer"]
    expected = converted(pipe.transformer, values)
    skipped = [key for key in report.dequantized if key.startswith("transformer_blocks.0.")]
    assert len(skipped) == len(report.dequantized) == 12
    for key in skipped:
        assert same_bits(pipe.transformer.get_parameter(key).data, expected[key].to(BF16))
        assert "skip pattern 'transformer_blocks.0'" in report.skip_reasons[key.removesuffix(".weight")]


def test_e5m2_is_dequantized_and_said(tiny, tmp_path):
    source = folder(tiny, "flux2-dev")
    path, _ = checkpoint(source, "flux2-dev", "raw-linears")
    weight = official(source, "flux2-dev")["single_blocks.0.linear2.weight"].to(torch.float8_e5m2)
    pipe = load(source, with_tensor(path, "single_blocks.0.linear2.weight", weight), quantization_transformer="fp8-dynamic")
    name = "single_transformer_blocks.0.attn.to_out"
    assert torch.equal(pipe.transformer.get_parameter(f"{name}.weight").data, weight.to(BF16))
    assert "F8_E5M2" in pipe.quantization_report["transformer"].skip_reasons[name]
    assert f"{name}.weight" in pipe.quantization_report["transformer"].dequantized


def test_a_zero_row_stays_finite(tiny, tmp_path):
    source = folder(tiny, "flux2-dev")
    tensors = {key: tensor.clone() for key, tensor in official(source, "flux2-dev").items()}
    for key in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear2.weight"):
        tensors[key][:40] = 0
    tensors["double_blocks.1.txt_mlp.0.weight"].zero_()
    for layout in ("scaled", "row", "raw"):
        path = tmp_path / f"{layout}.safetensors"
        write(path, tensors, LAYOUTS[layout])
        for method in FP8_METHODS:
            model = load(source, path, quantization_transformer=method).transformer
            assert torch.isfinite(forward(model, source, "flux2-dev")).all()


def test_the_file_stays_as_it_is(tiny):
    """The weights may be mapped from the file: writing to them must not write to it."""
    source = folder(tiny, "flux2-klein")
    path, _ = checkpoint(source, "flux2-klein", "scaled")
    before = path.read_bytes()
    model = load(source, path, quantization_transformer="fp8-weight-only").transformer
    with torch.no_grad():
        for parameter in model.parameters():
            for part in (parameter.qdata.view(torch.uint8),) if isinstance(parameter, Float8Tensor) else (parameter.data,):
                part.zero_()
    assert path.read_bytes() == before


# --- files that are not fp8, and methods that are not ---------------------------------------------------------------------


@pytest.mark.parametrize("rest", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_in_16_or_32_bits_loads_exactly(name, rest, tiny):
    """A finetune, say; without a method it is what diffusers' folder is."""
    source = folder(tiny, name)
    path, values = checkpoint(source, name, Layout(f"plain-{rest}", fp8="nothing", scale=None, rest=rest))
    pipe = load(source, path)
    expected = converted(pipe.transformer, values)
    state = pipe.transformer.state_dict()
    assert state.keys() == expected.keys()
    assert all(same_bits(tensor, expected[key].to(BF16)) for key, tensor in state.items())
    assert pipe.quantization_report["transformer"].method == "none"
    if rest == torch.bfloat16:
        assert torch.equal(forward(pipe.transformer, source, name), reference(source, name))


@pytest.mark.parametrize("method", ["int8", "int4", "fp8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_bf16_file_is_quantized_while_it_is_read(name, method, tiny):
    """As the folder's weights are: the same layers, to the same bits."""
    source = folder(tiny, name)
    pipe = load(source, checkpoint(source, name, "bf16")[0], quantization_transformer=method)
    usual = load(source, quantization_transformer=method)
    same_weights(pipe.transformer, usual.transformer)
    report, expected = pipe.quantization_report["transformer"], usual.quantization_report["transformer"]
    assert report.skip_reasons == expected.skip_reasons
    assert (report.backend, report.method, report.quantized_layers) == ("torchao", method, expected.quantized_layers)
    assert (report.bytes_before, report.bytes_after) == (expected.bytes_before, expected.bytes_after)
    assert torch.equal(forward(pipe.transformer, source, name), forward(usual.transformer, source, name))


@pytest.mark.parametrize("layout", ["scaled", "legacy", "raw", "column"])
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_another_method_quantizes_an_fp8_file_again_and_says_so(method, layout, tiny):
    source = folder(tiny, "qwen-image")
    path, values = checkpoint(source, "qwen-image", layout)
    pipe = load(source, path, quantization_transformer=method)
    report = pipe.quantization_report["transformer"]
    assert (report.backend, report.method) == ("torchao", method)
    assert f"dequantized and quantized again to {method}" in report.note
    plain = load(source).transformer
    plain.load_state_dict({key: value.to(BF16) for key, value in converted(plain, values).items()})
    quantize_component(plain, method, "transformer")
    same_weights(pipe.transformer, plain)
    if method == "int8":
        assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q.weight, Int8Tensor)


def test_the_report_says_which_file_in_which_layout(tiny):
    source = folder(tiny, "ltx2")
    path, _ = checkpoint(source, "ltx2", "scaled")
    report = load(source, path).quantization_report
    assert path.name in str(report)
    assert "static input scales" in report["transformer"].note


def test_the_name_of_a_file_says_nothing(tiny, tmp_path):
    source = folder(tiny, "flux2-dev")
    path, _ = checkpoint(source, "flux2-dev", "bf16")
    other = tmp_path / "flux2_dev_fp8_scaled_nvfp4.sft"
    other.write_bytes(path.read_bytes())
    assert load(source, other).quantization_report["transformer"].method == "none"


def test_config_toml_names_the_file(tiny, tmp_path):
    source = folder(tiny, "flux2-dev")
    path, _ = checkpoint(source, "flux2-dev", "scaled")
    config = tmp_path / "config.toml"
    config.write_text(f'[flux2]\ntransformer_file = "{path}"\nquantization_transformer = "fp8-weight-only"\n')
    report = load(source, config=config).quantization_report["transformer"]
    assert (report.method, report.backend, report.quantized_layers) == ("fp8-weight-only", "checkpoint", 28)
    other, _ = checkpoint(source, "flux2-dev", "mixed")
    assert load(source, other, config=config).quantization_report["transformer"].quantized_layers == 12


def test_a_keyword_or_a_passed_transformer_wins_over_the_file_in_config_toml(tiny, tmp_path):
    source = folder(tiny, "z-image")
    config = tmp_path / "config.toml"
    config.write_text(f'[z_image]\ntransformer_file = "{checkpoint(source, "z-image", "scaled")[0]}"\n')
    without = load(source, config=config, transformer_file="", quantization="none")
    assert without.quantization_report["transformer"].method == "none"
    own = transformer(source)
    assert load(source, config=config, transformer=own, quantization="none").transformer is own


def test_a_file_in_config_toml_is_not_for_a_pipeline_without_a_transformer(tiny, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[ltx2]\ntransformer_file = "nowhere.safetensors"\n')
    assert load_pipeline(tiny("ltx2-latent-upsample"), config=config).vae is not None


def test_a_quant_config_that_does_not_name_the_transformer_keeps_its_fp8(tiny):
    source = folder(tiny, "z-image")
    path, _ = checkpoint(source, "z-image", "scaled")
    pipe = load_pipeline(source, transformer_file=path, quantization=PipelineQuantConfig(encoder="int8"))
    assert pipe.quantization_report["transformer"].method == "fp8-dynamic"
    assert pipe.quantization_report["text_encoder"].method == "int8"


def test_hooks_are_asked_about_a_file_too(tiny):
    source = folder(tiny, "z-image")
    path, _ = checkpoint(source, "z-image", "scaled")

    class Pipeline(QuantizableZImagePipeline):
        wanted = staticmethod(lambda request: request)

        @classmethod
        def component_request(cls, name, role, request):
            asked = super().component_request(name, role, request)
            return cls.wanted(asked) if name == "transformer" and asked else asked

    Pipeline.wanted = staticmethod(lambda asked: replace(asked, skip=("layers.0",)))
    pipe = Pipeline.from_pretrained(source, transformer_file=path, quantization="fp8-weight-only")
    assert not isinstance(pipe.transformer.layers[0].attention.to_q.weight, Float8Tensor)
    assert isinstance(pipe.transformer.layers[1].attention.to_q.weight, Float8Tensor)
    Pipeline.wanted = staticmethod(lambda asked: None)
    pipe = Pipeline.from_pretrained(source, transformer_file=path, quantization="fp8-weight-only")
    assert pipe.quantization_report["transformer"].method == "none"


def test_formats_in_the_header_may_lack_the_prefix_of_the_tensors(tiny, tmp_path):
    source = folder(tiny, "ltx2.3")
    path, _ = checkpoint(source, "ltx2.3", "prefixed")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    prefix = "model.diffusion_model."
    bare = {**metadata, "_quantization_metadata": metadata["_quantization_metadata"].replace(prefix, "")}
    save_file(tensors, tmp_path / "bare.safetensors", bare)
    short = {key.replace(prefix, "diffusion_model."): tensor for key, tensor in tensors.items()}
    save_file(short, tmp_path / "short.safetensors", metadata)
    for name in ("bare", "short"):
        same_weights(load(source, tmp_path / f"{name}.safetensors").transformer, load(source, path).transformer)


def test_the_other_components_come_from_the_folder_as_asked(tiny):
    source = folder(tiny, "z-image")
    path, _ = checkpoint(source, "z-image", "scaled")
    pipe = load_pipeline(source, torch_dtype=BF16, transformer_file=path, quantization={"encoder": "int8", "vae": "int8"})
    methods = {report.name: report.method for report in pipe.quantization_report}
    assert methods == {"text_encoder": "int8", "transformer": "fp8-dynamic", "vae": "int8"}
