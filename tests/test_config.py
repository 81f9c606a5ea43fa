"""config.toml: precedence, and errors that name the file, the key and the nearest valid one."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dit.config import RuntimeConfig
from llm_dit.families import family_names
from llm_dit.quantization import PipelineQuantConfig

SHIPPED = Path(__file__).parent.parent / "config.toml"


def write(tmp_path, text):
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_shipped_file_says_the_built_in_defaults():
    config = RuntimeConfig.from_toml(SHIPPED)
    for family in ("flux2", "ltx2", "z_image", "qwen_image"):
        assert family in family_names()
        assert config.get_pipeline_quant_config(family) == RuntimeConfig().get_pipeline_quant_config(family)
    built_in = RuntimeConfig().get_pipeline_quant_config("flux2")
    assert (built_in.encoder, built_in.transformer, built_in.vae, built_in.granularity) == (
        "none",
        "fp8-dynamic",
        "none",
        "per-row",
    )


def test_a_familys_value_wins_over_the_global_over_the_built_in(tmp_path):
    config = RuntimeConfig.from_toml(
        write(
            tmp_path,
            """
            [quantization]
            encoder = "int8"
            vae = "int8"
            skip = ["proj_out"]
            [flux2]
            quantization_encoder = "int4"
            quantization_granularity = "per-tensor"
            quantization_skip = []
            quantization_backend = "torchao"
            """,
        )
    )
    assert config.get_pipeline_quant_config("flux2") == PipelineQuantConfig(
        encoder="int4", transformer="fp8-dynamic", vae="int8", granularity="per-tensor", skip=()
    )
    assert config.get_pipeline_quant_config("ltx2") == PipelineQuantConfig(
        encoder="int8", transformer="fp8-dynamic", vae="int8", skip=("proj_out",)
    )


def test_an_alias_is_resolved(tmp_path):
    config = RuntimeConfig.from_toml(write(tmp_path, '[quantization]\ntransformer = "fp8"\n'))
    assert config.get_pipeline_quant_config("z_image").transformer == "fp8-dynamic"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantisation]\n", r"unknown section \[quantisation\]: did you mean 'quantization'"),
        ("[flux]\n", r"unknown section \[flux\]: did you mean 'flux2'"),
        ('[quantization]\nencodr = "int8"\n', r"\[quantization\]: unknown key 'encodr': did you mean 'encoder'"),
        ('[ltx2]\nquantization_transfomer = "int8"\n', r"\[ltx2\]: unknown key .* did you mean 'quantization_transformer'"),
        ('[z_image]\nvae = "int8"\n', r"\[z_image\]: unknown key 'vae': did you mean 'quantization_vae'"),
        ('[quantization]\nvae = "int9"\n', r"\[quantization\] vae: unknown vae method 'int9': did you mean 'int8'"),
        (
            '[quantization]\ntransformer = "int9"\n[flux2]\nquantization_transformer = "int8"\n',
            r"\[quantization\] transformer: unknown transformer method 'int9': did you mean 'int8'",
        ),
        (
            '[z_image]\nquantization_encoder = "4bit"\n',
            r"\[z_image\] quantization_encoder: encoder method '4bit' was removed: use 'int4'",
        ),
        ('[quantization]\ngranularity = "per-col"\n', r"\[quantization\] granularity: unknown granularity 'per-col'"),
        ('[flux2]\nquantization_backend = "torch"\n', r"\[flux2\] quantization_backend: unknown quantization_backend 'torch'"),
        ('[flux2]\ncompile_mode = "fast"\n', r"\[flux2\] compile_mode: unknown mode 'fast'"),
        ('[flux2]\ncompile = "yes"\n', r"\[flux2\]: compile = 'yes'"),
        ('[quantization]\nskip = "proj_out"\n', r"\[quantization\]: skip = 'proj_out'"),
        (
            "[flux2]\nquantization_backend = {transformr = 'layerwise'}\n",
            r"\[flux2\] quantization_backend: unknown component 'transformr': did you mean",
        ),
        (
            "[ltx2]\nquantization_backend = {vocoders = 'layerwise'}\n",
            r"\[ltx2\] quantization_backend: .* did you mean 'vocoder'",
        ),
        ('[quantization]\nvae = "int4"\n', r"\[quantization\] vae: int4 is not offered for a vae"),
        ('[qwen_image]\nquantization_vae = "fp8"\n', r"\[qwen_image\] quantization_vae: fp8-dynamic is not offered for a vae"),
        ("quantization = 3\n", r"must be a section \[quantization\]"),
        ("[quantization\n", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*{message}") as error:
        RuntimeConfig.from_toml(file)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*give the path of a config\.toml"):
        RuntimeConfig.from_toml(tmp_path / "config.toml")


def test_an_unknown_pipeline():
    with pytest.raises(ValueError, match="did you mean 'flux2'"):
        RuntimeConfig().get_pipeline_quant_config("flux")


values = st.recursive(
    st.one_of(st.booleans(), st.integers(-5, 5), st.sampled_from(["int8", "none", "", "per-row", "x"])),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
keys = st.sampled_from(["encoder", "transformer", "skip", "quantization_vae", "compile", "compile_mode", "what"])


def toml_value(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@given(
    st.dictionaries(
        st.sampled_from(["quantization", "flux2", "ltx2", "other"]), st.dictionaries(keys, values, max_size=3), max_size=3
    )
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, tables):
    text = "".join(
        f"[{name}]\n" + "".join(f"{k} = {toml_value(v)}\n" for k, v in table.items()) for name, table in tables.items()
    )
    file = write(tmp_path_factory.mktemp("config"), text)
    refused = ""
    try:
        config = RuntimeConfig.from_toml(file)
    except ValueError as error:
        refused = str(error)
    assert not refused or (str(file) in refused and "\n" not in refused)
    assert refused or all(config.get_pipeline_quant_config(family) for family in family_names())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vae": "int4"}, "int4 is not offered for a vae"),
        ({"encoder": "int9"}, "unknown encoder method 'int9'"),
        ({"transformer": "8bit"}, "removed: use 'int8'"),
        ({"granularity": "row"}, "did you mean 'per-row'"),
        ({"backend": "torch"}, "unknown quantization_backend"),
        ({"skip": "proj_out"}, r"write \['proj_out'\]"),
    ],
)
def test_the_configuration_object_checks_itself(keywords, message):
    with pytest.raises(ValueError, match=message):
        PipelineQuantConfig(**keywords)
