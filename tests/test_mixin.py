"""`from_pretrained` and what comes after it: everything that must end in the right thing or in a clear error."""

import inspect
import json
import re
import shutil
import warnings

import diffusers
import pytest
import torch
from conftest import generate, relative_error
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from torch import nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor

from llm_dit import PipelineQuantConfig, QuantizationReport, load_pipeline
from llm_dit.arguments import DIFFUSERS_KEYWORDS
from llm_dit.backends import BACKENDS, ComponentRequest
from llm_dit.config import RuntimeConfig
from llm_dit.families.flux2 import QuantizableFlux2KleinPipeline
from llm_dit.families.z_image import QuantizableZImageImg2ImgPipeline, QuantizableZImagePipeline
from llm_dit.mixin import QuantizablePipelineMixin
from llm_dit.quantization import get_method, hardware, quantize_component

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("z-image")


def is_quantized(model):
    return any(isinstance(parameter, TorchAOBaseTensor) for parameter in model.parameters())


def methods(pipe):
    return {report.name: report.method for report in pipe.quantization_report}


# --- what is quantized ---------------------------------------------------------------------------------------------------


def test_without_a_request_nothing_is_quantized_and_dtypes_are_diffusers(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder)
    plain = diffusers.ZImagePipeline.from_pretrained(folder)
    assert set(methods(pipe).values()) == {"none"}
    for name in ("text_encoder", "transformer", "vae"):
        assert getattr(pipe, name).dtype == getattr(plain, name).dtype


def test_no_config_file_is_searched_for(folder, tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text('[quantization]\ntransformer = "int8"\n')
    monkeypatch.chdir(tmp_path)
    assert methods(QuantizableZImagePipeline.from_pretrained(folder))["transformer"] == "none"


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"quantization": "int8"}, ("none", "int8", "none")),
        ({"quantization": "auto"}, ("none", "int8", "none")),
        ({"quantization": {"encoder": "int8", "vae": "int8"}}, ("int8", "none", "int8")),
        ({"quantization": {"text_encoder": "int4", "transformer": "fp8"}}, ("int4", "fp8-dynamic", "none")),
        ({"quantization": {"transformer": "int8"}, "quantization_transformer": "int4"}, ("none", "int4", "none")),
        ({"quantization": "int8", "quantization_transformer": "none", "quantization_vae": "int8"}, ("none", "none", "int8")),
        ({"quantization": PipelineQuantConfig(encoder="int8")}, ("int8", "none", "none")),
        ({"config": RuntimeConfig()}, ("none", "fp8-dynamic", "none")),
        ({"config": RuntimeConfig(), "quantization_transformer": "int8"}, ("none", "int8", "none")),
        ({"config": RuntimeConfig(), "quantization": {"encoder": "int8"}}, ("int8", "fp8-dynamic", "none")),
        ({"config": RuntimeConfig(), "quantization": PipelineQuantConfig(encoder="int8")}, ("int8", "none", "none")),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto depends on the card")
def test_precedence(folder, keywords, expected):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, **keywords)
    assert tuple(methods(pipe)[name] for name in ("text_encoder", "transformer", "vae")) == expected
    for name, method in zip(("text_encoder", "transformer", "vae"), expected, strict=True):
        assert is_quantized(getattr(pipe, name)) is (method != "none")


def test_a_config_file_with_its_skip_list(folder, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('[quantization]\nskip = ["cap_embedder"]\n[z_image]\nquantization_transformer = "int8"\n')
    pipe = QuantizableZImagePipeline.from_pretrained(folder, config=file)
    assert type(pipe.transformer.cap_embedder[1].weight) is nn.Parameter
    assert pipe.quantization_report["transformer"].skip_reasons["cap_embedder.1"] == "skip pattern 'cap_embedder'"


def test_skip_patterns_that_match_nothing_are_reported(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8", quantization_skip=["nothing_like_it"])
    assert "skip patterns that matched no layer: nothing_like_it" in str(pipe.quantization_report)


def test_a_skip_does_not_reach_a_longer_name(tiny):
    pipe = load_pipeline(tiny("ltx2"), quantization="int8", quantization_skip=["proj_out"])
    assert type(pipe.transformer.proj_out.weight) is nn.Parameter
    assert isinstance(pipe.transformer.audio_proj_out.weight, Int8Tensor)


def test_the_report_lists_every_model_of_ltx2(tiny):
    pipe = load_pipeline(tiny("ltx2-dfr"), quantization={"encoder": "int8", "transformer": "int8", "vae": "int8"})
    reports = {report.name: report for report in pipe.quantization_report}
    quantized = {"text_encoder", "prompt_enhancer", "connectors", "transformer", "vae", "audio_vae", "vocoder"}
    assert {name for name, report in reports.items() if report.method == "int8"} == quantized & set(reports)
    assert reports["connectors"].role == "encoder"
    assert reports["vocoder"].role == "vae"
    assert reports["duration_head"].role is None
    assert reports["duration_head"].method == "none"
    assert isinstance(pipe.quantization_report, QuantizationReport)
    json.dumps(pipe.quantization_report.to_dict())


def test_a_subclass_chooses_by_a_hook(folder):
    class EncoderStaysPlain(QuantizableZImagePipeline):
        @classmethod
        def component_request(cls, name, role, request):
            return None if name == "text_encoder" else super().component_request(name, role, request)

    pipe = EncoderStaysPlain.from_pretrained(folder, quantization={"encoder": "int8", "transformer": "int8"})
    assert methods(pipe)["text_encoder"] == "none"
    assert methods(pipe)["transformer"] == "int8"


class QuantizesItself(QuantizableFlux2KleinPipeline):
    """Asks for a method of its own accord."""

    chosen = "int8"

    @classmethod
    def component_request(cls, name, role, request):
        chosen = ComponentRequest(name, role, get_method(cls.chosen), dtype=request.dtype_of(name))
        return chosen if role == "transformer" else super().component_request(name, role, request)


def test_what_a_hook_asks_for_is_checked_and_loaded_like_what_a_keyword_asks_for(tiny, monkeypatch):
    asked = load_pipeline(tiny("flux2-klein"), quantization="int8")
    pipe = QuantizesItself.from_pretrained(tiny("flux2-klein"))
    assert methods(pipe) == methods(asked)
    assert {part.name: part.dtype for part in pipe.quantization_report} == {
        part.name: part.dtype for part in asked.quantization_report
    }
    assert torch.equal(generate(pipe, "flux2-klein"), generate(asked, "flux2-klein"))
    monkeypatch.setattr(hardware, "detect_hardware", lambda: hardware.Hardware("RTX 3090", (8, 6), 24 * 1024**3))
    monkeypatch.setattr(QuantizesItself, "chosen", "fp8-weight-only")
    with pytest.raises(ValueError, match=r"fp8-weight-only needs a CUDA device of compute capability 8\.9"):
        QuantizesItself.from_pretrained(tiny("flux2-klein"))


def test_the_mixin_plugs_into_a_diffusers_class(folder):
    class Mine(QuantizablePipelineMixin, diffusers.ZImagePipeline):
        pass

    assert Mine.family is QuantizableZImagePipeline.family
    assert methods(Mine.from_pretrained(folder, quantization="int8"))["transformer"] == "int8"
    with pytest.raises(ValueError, match="no quantizable pipeline for 'FluxPipeline'"):
        type("Other", (QuantizablePipelineMixin, diffusers.FluxPipeline), {})


def test_a_subclass_chooses_a_backend_by_a_hook(folder):
    class CastsItsEncoder(QuantizableZImagePipeline):
        @classmethod
        def component_backend(cls, name, role, request):
            return BACKENDS["layerwise" if role == "encoder" else "torchao"]

    quantization = {"encoder": "fp8-weight-only", "transformer": "fp8-weight-only"}
    report = CastsItsEncoder.from_pretrained(folder, quantization=quantization).quantization_report
    assert (report["text_encoder"].backend, report["transformer"].backend) == ("layerwise", "torchao")


# --- refused before anything is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"quantizaton": "int8"}, "no argument 'quantizaton': did you mean 'quantization'"),
        ({"torch_dtpye": BF16}, "did you mean 'torch_dtype'"),
        ({"text_encodr": None}, "did you mean 'text_encoder'"),
        ({"quantization": "8bit"}, "'8bit' was removed: use 'int8'"),
        ({"quantization": {"transfomer": "int8"}}, "did you mean 'transformer'"),
        ({"quantization": {"transformer": "int9"}}, "did you mean 'int8'"),
        ({"quantization_vae": "fp8-dynamic"}, "vae: fp8-dynamic is not offered for a vae, because"),
        ({"quantization_vae": "int4"}, "not offered for a vae, because .* use 'int8'"),
        ({"quantization": "fp8", "quantization_granularity": "row"}, "did you mean 'per-row'"),
        ({"quantization": "int8", "quantization_backend": "torcha"}, "did you mean 'torchao'"),
        ({"quantization": "int8", "quantization_backend": {"transformr": "torchao"}}, "did you mean 'transformer'"),
        ({"quantization": "int8", "quantization_backend": "layerwise"}, "'fp8-weight-only', not 'int8'"),
        ({"quantization_vae": "int8", "quantization_backend": "layerwise"}, "not offered for a vae, because"),
        ({"quantization": "int8", "quantization_skip": "proj_out"}, r"write \['proj_out'\]"),
        ({"quantization": "int8", "low_cpu_mem_usage": False}, "cannot be combined with quantization"),
        ({"quantization": "int8", "torch_dtype": "auto"}, r"must be a torch\.dtype"),
        ({"quantization": "int8", "torch_dtype": torch.float8_e4m3fn}, "say with quantization= what its weights are stored in"),
        ({"quantization": "int8", "dtype": {"vae": torch.int8}}, "is nothing that a model computes in"),
        ({"quantization": "int8", "dtype": {"default": BF16, "vea": BF16}}, "names 'vea', .* did you mean 'vae'"),
        ({"quantization": {"scheduler": "int8"}}, "unknown key in quantization 'scheduler'"),
        ({"quantization_config": "int8"}, "give a method or a PipelineQuantConfig as quantization="),
        ({"quantization_backend": {"transformer": "checkpoint"}}, "give transformer_file"),
        ({"config": {"transformer": "int8"}}, "must be the path of a config.toml or a RuntimeConfig"),
        ({"notes": ("a",)}, "has no argument 'notes'"),
        ({"device_map": "auto"}, "device_map='auto', and on this machine diffusers takes 'balanced'"),
        ({"device_map": {"vae": "cpu"}}, "give one of them"),
        ({"quantization": "int8", "compile_mode": "reduce"}, "did you mean 'reduce-overhead'"),
        ({"quantization": "int8", "activation_scale": "static"}, "give transformer_file"),
        ({"activation_scale": "fixed"}, "unknown activation_scale"),
        ({"config": "no-such.toml"}, "no configuration file 'no-such.toml'"),
    ],
)
def test_wrong_arguments(folder, keywords, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        QuantizableZImagePipeline.from_pretrained(folder, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"transformer_file": "x-fp8.safetensors"},
            "there is no file 'x-fp8.safetensors': give a path, or owner/repository/file",
        ),
        (
            {"quantization": "fp8", "quantization_backend": "checkpoint"},
            "reads a file, and there is none for it: give transformer_file",
        ),
    ],
)
def test_backend_checkpoint_wants_a_file(folder, keywords, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        QuantizableZImagePipeline.from_pretrained(folder, **keywords)


def test_a_role_the_pipeline_has_not_is_refused_when_asked_for(tiny):
    with pytest.raises(ValueError, match=r"no component for quantization_encoder: it has .*latent_upsampler \(vae\)"):
        load_pipeline(tiny("ltx2-latent-upsample"), quantization_encoder="int8")
    pipe = load_pipeline(tiny("ltx2-latent-upsample"), config=RuntimeConfig())
    assert set(methods(pipe).values()) == {"none"}


def test_another_familys_folder_is_refused(tiny):
    with pytest.raises(ValueError, match=r"cannot load a FLUX\.2 pipeline: use QuantizableFlux2KleinPipeline"):
        QuantizableZImagePipeline.from_pretrained(tiny("flux2-klein"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without CUDA")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(ValueError, match="no CUDA device: leave device_map out"):
        QuantizableZImagePipeline.from_pretrained(folder, device_map="cuda", quantization="int8")
    for device in ("cuda", 0):
        with pytest.raises(ValueError, match="no CUDA device: leave it on the CPU"):
            QuantizableZImagePipeline.from_pretrained(folder, quantization="int8").to(device)


def test_a_backend_without_a_method_is_refused(folder):
    for backend, error in (("layerwise", "has nothing to quantize: give a method"), ("checkpoint", "give transformer_file")):
        with pytest.raises(ValueError, match=error):
            QuantizableZImagePipeline.from_pretrained(folder, quantization_backend=backend)


def test_diffusers_own_configuration_is_honoured_alone_and_refused_with_ours(folder):
    mapping = PipelineQuantizationConfig(
        quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))}
    )
    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype=BF16, quantization_config=mapping)
    assert isinstance(pipe.transformer.layers[0].feed_forward.w1.weight, Int8Tensor)
    assert "quantized" in pipe.quantization_report["transformer"].method
    with pytest.raises(ValueError, match="give one of the two"):
        QuantizableZImagePipeline.from_pretrained(folder, quantization="int8", quantization_config=mapping)


def test_the_keywords_are_those_of_the_installed_diffusers():
    source = inspect.getsource(DiffusionPipeline.from_pretrained)
    popped = set(re.findall(r'kwargs\.pop\("(\w+)"', source)) - {"kwargs"}
    assert popped <= set(DIFFUSERS_KEYWORDS)


# --- dtypes, devices, files ----------------------------------------------------------------------------------------------


def test_dtype_omitted_is_bfloat16_and_said(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8")
    for name in ("text_encoder", "transformer", "vae"):
        assert getattr(pipe, name).dtype == BF16
    assert "torch_dtype was not given" in str(pipe.quantization_report)


@pytest.mark.parametrize("method", ["int8", "fp8-weight-only", "fp8-dynamic", "int4"])
def test_float16(folder, reference, method):
    if torch.cuda.is_available() and method == "fp8-dynamic":
        pytest.skip("refused on CUDA, see test_hardware.py")
    pipe = QuantizableZImagePipeline.from_pretrained(folder, torch_dtype=torch.float16, quantization=method)
    output = generate(pipe, "z-image")
    assert torch.isfinite(output).all()
    assert relative_error(output, reference("z-image")) < 0.3


def test_a_float32_vae_beside_bfloat16(folder, tiny, reference):
    dtypes = {"default": BF16, "vae": torch.float32}
    quantization = {"transformer": "int8", "vae": "int8"}
    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype=dtypes, quantization=quantization)
    assert pipe.vae.dtype == torch.float32
    assert relative_error(generate(pipe, "z-image"), reference("z-image")) < 0.05
    with pytest.raises(ValueError, match=r"VAE is torch\.float32 .* load both in one dtype"):
        QuantizableFlux2KleinPipeline.from_pretrained(tiny("flux2-klein"), dtype=dtypes, quantization="int8")


def test_device_map(folder, reference):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype=BF16, device_map="cpu", quantization="int8")
    assert pipe.hf_device_map == "cpu"
    assert relative_error(generate(pipe.to("cpu"), "z-image"), reference("z-image")) < 0.05
    with pytest.raises(ValueError, match="give one of them"):
        QuantizableZImagePipeline.from_pretrained(folder, dtype=BF16, device_map={"": "cpu"}, quantization="int8")


def test_variant_in_and_out(folder, tmp_path):
    DiffusionPipeline.from_pretrained(folder, dtype=BF16).save_pretrained(tmp_path / "in", variant="fp16")
    pipe = QuantizableZImagePipeline.from_pretrained(tmp_path / "in", variant="fp16", quantization="int8")
    pipe.save_pretrained(tmp_path / "out", variant="int8")
    again = QuantizableZImagePipeline.from_pretrained(tmp_path / "out", variant="int8")
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))
    with pytest.raises(ValueError, match="no such modeling files"):
        QuantizableZImagePipeline.from_pretrained(folder, variant="fp16", quantization="int8")


def test_sharded_checkpoints(folder, tmp_path, reference):
    DiffusionPipeline.from_pretrained(folder, dtype=BF16).save_pretrained(tmp_path / "in", max_shard_size="500KB")
    pipe = QuantizableZImagePipeline.from_pretrained(tmp_path / "in", quantization={"transformer": "int8", "encoder": "int4"})
    pipe.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 2
    again = QuantizableZImagePipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))


def test_a_saved_pipeline_keeps_its_method_against_another_request(folder, tmp_path):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8")
    pipe.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"int8, not quantized again, although fp8-dynamic was asked for"):
        again = QuantizableZImagePipeline.from_pretrained(tmp_path, quantization="fp8-dynamic")
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))
    with pytest.warns(UserWarning, match=r"int8, not quantized again, although none was asked for"):
        QuantizableZImagePipeline.from_pretrained(tmp_path, quantization="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = QuantizableZImagePipeline.from_pretrained(tmp_path, quantization={"transformer": "int8", "encoder": "int8"})
    assert methods(again) == {"text_encoder": "int8", "transformer": "already_quantized", "vae": "none"}


@pytest.mark.parametrize("made", [BF16, torch.float16])
def test_a_saved_pipeline_keeps_its_dtype(made, folder, tmp_path):
    """int8 weights of bfloat16 overflow float16, and the convolutions of a VAE take no input of another dtype than their bias."""
    quantization = {"transformer": "int8", "vae": "int8"}
    pipe = QuantizableZImagePipeline.from_pretrained(folder, torch_dtype=made, quantization=quantization)
    pipe.save_pretrained(tmp_path)
    other = torch.float16 if made == BF16 else BF16
    with pytest.raises(ValueError, match=f"was quantized in {made} when it was saved, .* give torch_dtype={made}"):
        QuantizableZImagePipeline.from_pretrained(tmp_path, torch_dtype=other)
    with pytest.raises(ValueError, match="low_cpu_mem_usage=False"):
        QuantizableZImagePipeline.from_pretrained(tmp_path, torch_dtype=made, low_cpu_mem_usage=False)
    again = QuantizableZImagePipeline.from_pretrained(tmp_path, torch_dtype=made, quantization_skip=["layers.0"])
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))
    assert "skip patterns without effect: layers.0; vae, transformer stay as saved" in str(again.quantization_report)
    again = QuantizableZImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))


def test_a_saved_pipeline_of_two_dtypes(folder, tmp_path):
    dtypes = {"default": BF16, "vae": torch.float32}
    quantization = {"transformer": "int8", "vae": "int8"}
    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype=dtypes, quantization=quantization)
    pipe.save_pretrained(tmp_path)
    advice = r"give torch_dtype=\{'default': torch\.bfloat16, 'vae': torch\.float32\}"
    encoder = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=advice):
        QuantizableZImagePipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, text_encoder=encoder)
    for given in ({}, {"torch_dtype": {"vae": torch.float32}}):
        again = QuantizableZImagePipeline.from_pretrained(tmp_path, **given)
        assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))


def test_a_mapping_of_dtypes_has_bfloat16_for_the_rest(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype={"vae": torch.float32}, quantization="int8")
    assert [getattr(pipe, name).dtype for name in ("text_encoder", "transformer", "vae")] == [BF16, BF16, torch.float32]
    assert "what it does not name is loaded in bfloat16" in str(pipe.quantization_report)


def test_auto_leaves_a_saved_method(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    QuantizableZImagePipeline.from_pretrained(folder, quantization="int4").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = QuantizableZImagePipeline.from_pretrained(tmp_path, quantization="auto", quantization_backend="torchao")
    assert "left the transformer in int4, as it was saved" in str(pipe.quantization_report)
    dense = load_pipeline(folder, torch_dtype=BF16).transformer
    assert methods(load_pipeline(tmp_path, quantization="auto", transformer=dense))["transformer"] == "int8"


def test_casting_to_what_it_is_in_changes_nothing(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8")
    before = generate(pipe, "z-image")
    assert torch.equal(generate(pipe.to("cpu", BF16), "z-image"), before)


def test_mixed_dtypes_are_cast_where_nothing_is_quantized(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, torch_dtype=BF16)
    pipe.transformer.layers[0].float()
    assert {parameter.dtype for parameter in pipe.to(BF16).transformer.parameters()} == {BF16}


def test_what_is_quantized_after_loading_is_reported_and_not_cast(folder):
    pipe = load_pipeline(folder, torch_dtype=BF16)
    quantize_component(pipe.transformer, "int8", "transformer")
    assert pipe.quantization_report["transformer"].method == "already_quantized"
    with pytest.raises(ValueError, match="because transformer is quantized"):
        pipe.to(torch.float16)


def test_a_siblings_own_component_has_a_report_of_its_own(folder):
    pipe = load_pipeline(folder, quantization="int8")
    other = load_pipeline(folder, torch_dtype=BF16).transformer
    sibling = QuantizableZImageImg2ImgPipeline.from_pipe(pipe, transformer=other)
    assert sibling.quantization_report["transformer"].method == "none"
    encoder = pipe.text_encoder
    pipe.text_encoder = None  # as encode_then_free leaves it
    sibling = QuantizableZImageImg2ImgPipeline.from_pipe(pipe, text_encoder=encoder)
    assert sibling.quantization_report["text_encoder"].method == "none"


def test_a_part_of_the_encoder_does_not_go_with_diffusers_quantization(folder):
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": TorchAoConfig(Int8WeightOnlyConfig())})
    with pytest.raises(ValueError, match="quantization_config does not reach: leave one out"):
        load_pipeline(folder, encoder_layers="read", quantization_config=config)


def test_a_folder_cast_layerwise_keeps_its_method(folder, tmp_path):
    pipe = load_pipeline(folder, quantization="fp8-weight-only", quantization_backend="layerwise")
    pipe.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="transformer: cast layerwise as it was saved, although int8 was asked for"):
        again = load_pipeline(tmp_path, quantization="int8")
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))


def test_reading_a_part_of_an_encoder_wants_one_device(folder):
    with pytest.raises(ValueError, match="device_map is 'balanced': leave one out"):
        load_pipeline(folder, quantization="int8", encoder_layers="read", device_map="balanced")


def test_the_saved_index_names_the_diffusers_class(folder, tmp_path):
    QuantizableZImagePipeline.from_pretrained(folder, quantization="int8").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    assert "Quantizable" not in "".join(file.read_text() for file in tmp_path.rglob("*.json") if "tokenizer" not in file.name)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_a_folder_without_the_weights_of_a_component(name, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    for file in (tmp_path / "model" / name).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=f"{name}' holds a config.json and no weights: download the model"):
        load_pipeline(tmp_path / "model", quantization="int8")


def test_a_broken_index_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json cannot be read: "):
        load_pipeline(tmp_path / "model")


def test_load_pipeline_refuses_what_is_no_pipeline(tmp_path, folder):
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*none"):
        load_pipeline(tmp_path / "none")
    (tmp_path / "fp8.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a file, .* as transformer_file"):
        load_pipeline(tmp_path / "fp8.safetensors")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="no quantizable pipeline for 'FluxPipeline'"):
        load_pipeline(tmp_path / "copy")


def test_inference_mode_around_everything(folder, reference):
    with torch.inference_mode():
        pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization={"transformer": "int8", "vae": "int8"})
        output = generate(pipe, "z-image")
    assert relative_error(output, reference("z-image")) < 0.05
    assert not pipe.transformer.layers[0].feed_forward.w1.weight.is_inference()
    pipe.to("cpu")
    pipe.transformer.state_dict()


def test_a_zero_row_and_an_empty_prompt_stay_finite(folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=BF16)
    with torch.no_grad():
        pipe.transformer.layers[0].feed_forward.w1.weight[:7] = 0
        pipe.transformer.cap_pad_token.zero_()
        pipe.text_encoder.layers[0].self_attn.q_proj.weight.zero_()
    pipe.save_pretrained(tmp_path)
    for method in ("fp8-dynamic", "fp8-weight-only", "int8", "int4"):
        quantized = load_pipeline(tmp_path, quantization={"transformer": method, "encoder": method})
        quantized.set_progress_bar_config(disable=True)
        image = quantized("", height=64, width=64, num_inference_steps=2, output_type="pt").images
        assert torch.isfinite(image).all(), method


def test_nan_in_a_checkpoint_is_an_error_that_names_the_parameter(folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=BF16)
    with torch.no_grad():
        pipe.transformer.layers[1].attention.to_q.weight[3, 3] = float("nan")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'layers\.1\.attention\.to_q\.weight' cannot be quantized: the weight holds NaN"):
        load_pipeline(tmp_path, quantization="int8")


# --- components passed in, shared, moved ---------------------------------------------------------------------------------


def test_a_passed_component_is_quantized_in_place(folder, tmp_path, reference):
    transformer = diffusers.ZImageTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=BF16)
    pipe = QuantizableZImagePipeline.from_pretrained(folder, transformer=transformer, quantization="int8")
    assert pipe.transformer is transformer
    assert is_quantized(transformer)
    assert methods(pipe)["transformer"] == "int8"
    output = generate(pipe, "z-image")
    assert relative_error(output, reference("z-image")) < 0.05
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), "z-image"), output)


def test_a_passed_component_that_came_quantized_is_left_and_said(folder):
    donor = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8")
    with pytest.warns(UserWarning, match=r"transformer: it came quantized \(int8\)"):
        pipe = QuantizableZImagePipeline.from_pretrained(folder, transformer=donor.transformer, quantization="fp8-dynamic")
    assert methods(pipe)["transformer"] == "already_quantized"
    assert isinstance(pipe.transformer.layers[0].feed_forward.w1.weight, Int8Tensor)


def test_without_a_text_encoder_embeddings_do(folder):
    donor = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8")
    embeddings, _ = donor.encode_prompt("a red circle", do_classifier_free_guidance=False)
    pipe = QuantizableZImagePipeline.from_pretrained(
        folder, text_encoder=None, tokenizer=None, quantization={"transformer": "int8", "encoder": "int8"}
    )
    assert "text_encoder" not in methods(pipe)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "pt"}
    image = pipe(prompt_embeds=embeddings, generator=torch.Generator().manual_seed(0), **call).images
    assert torch.isfinite(image).all()


def test_from_pipe_shares_quantized_components(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization={"transformer": "int8", "vae": "int8"})
    sibling = QuantizableZImageImg2ImgPipeline.from_pipe(pipe)
    assert sibling.transformer is pipe.transformer
    assert methods(sibling) == methods(pipe)
    assert torch.isfinite(generate(sibling, "z-image-img2img")).all()
    with pytest.raises(ValueError, match="cannot be cast"):
        QuantizableZImageImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float16)


@pytest.mark.parametrize("backend", ["torchao", "layerwise"])
def test_casting_is_refused_before_anything_changes(folder, backend):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization="fp8-weight-only", quantization_backend=backend)
    before = pipe.vae.dtype
    for call in (lambda: pipe.to(torch.float32), lambda: pipe.to(dtype=torch.float32), lambda: pipe.to("cpu", torch.float32)):
        with pytest.raises(ValueError, match=r"transformer is quantized: give torch_dtype to from_pretrained"):
            call()
    assert pipe.vae.dtype == before
    assert pipe.to("cpu") is pipe


def test_unquantized_pipelines_cast_as_in_diffusers(folder):
    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype=BF16)
    assert pipe.to(torch.float32).vae.dtype == torch.float32


def test_a_component_quantized_by_hand_saves_too(folder, tmp_path):
    from llm_dit.quantization import quantize_component

    pipe = QuantizableZImagePipeline.from_pretrained(folder, dtype=BF16)
    quantize_component(pipe.transformer, "int4", "transformer")
    quantize_component(pipe.text_encoder, "int8", "encoder")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(load_pipeline(tmp_path), "z-image"), generate(pipe, "z-image"))


def test_saving_with_a_lora_is_refused(folder, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = QuantizableZImagePipeline.from_pretrained(folder, quantization="int8")
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="transformer has LoRA adapters loaded"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_compiling_in_the_same_call(folder, reference):
    with pytest.warns(UserWarning, match="incompatible with reduce-overhead"):
        QuantizableZImagePipeline.from_pretrained(
            folder, quantization="fp8-dynamic", compile=True, compile_mode="reduce-overhead"
        )


def test_nothing_global_is_changed(folder):
    from torch._inductor import config

    before = config.save_config_portable()
    QuantizableZImagePipeline.from_pretrained(
        folder, quantization={"transformer": "fp8-dynamic", "encoder": "int8", "vae": "int8"}
    )
    assert config.save_config_portable() == before


def test_a_compile_mode_without_compiling_is_told(tiny):
    pipe = load_pipeline(tiny("z-image"), quantization="int8", compile_mode="max-autotune")
    assert "compile_mode was given, and not compile=True" in str(pipe.quantization_report)
