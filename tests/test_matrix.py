"""Every tiny pipeline, with every method in every component: it loads, generates close to bf16, and comes back bit for bit.

Errors are relative L2 of everything the pipeline returns. The noise floor of the tiny models, bf16 against slightly moved
bf16, is about 0.008, so the 8-bit bounds say "not broken" and no more.
"""

import diffusers
import pytest
import torch
from conftest import generate, relative_error
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.utils import TorchAOBaseTensor

from llm_dit import load_pipeline
from llm_dit.families import quantizable_class
from llm_dit.quantization import VALID_METHODS
from llm_dit.tiny import get, tiny_pipelines

LARGEST_ERROR = {"int8": 0.05, "fp8-dynamic": 0.13, "fp8-weight-only": 0.12, "int4": 0.3}
# HDR output is exponential in the latents, so that its error is too.
LARGEST_ERROR_HDR = {method: 4 * bound for method, bound in LARGEST_ERROR.items()}
# The pipelines that the others of a family share their code and components with.
MAIN = ("z-image", "flux2-klein", "flux2-dev", "qwen-image", "ltx2", "ltx2.3")
SIBLINGS = tuple(name for name in tiny_pipelines() if name not in MAIN)


def roles_of(name):
    cls = quantizable_class(get(name).pipeline_class)
    expected, _ = cls._get_signature_keys(cls)
    return {cls.component_role(component) for component in expected} - {None}


def cases(names, methods):
    for name in names:
        for role in sorted(roles_of(name)):
            for method in methods:
                if role != "vae" or method == "int8":
                    yield pytest.param(name, role, method, id=f"{name}-{role}-{method}")


def check(name, tiny, reference, tmp_path, **keywords):
    """Loads, generates, saves, loads again without being asked, generates the same, and saves once more."""
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, **keywords)
    output = generate(pipe, name)
    assert torch.isfinite(output).all()
    pipe.save_pretrained(tmp_path / "once")
    again = load_pipeline(tmp_path / "once")
    assert torch.equal(generate(again, name), output)
    assert again.quantization_report.bytes_after == pipe.quantization_report.bytes_after
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(generate(load_pipeline(tmp_path / "twice"), name), output)
    return pipe, relative_error(output, reference(name))


@pytest.mark.parametrize(("name", "role", "method"), cases(MAIN, [m for m in VALID_METHODS if m != "none"]))
def test_methods_in_components(name, role, method, tiny, reference, tmp_path):
    pipe, error = check(name, tiny, reference, tmp_path, quantization={role: method})
    assert error < LARGEST_ERROR[method]
    for report in pipe.quantization_report:
        if report.role == role:
            assert report.method == method
            assert report.backend == "torchao"
            assert report.quantized_layers > 0
            assert report.quantized_layers + len(report.skip_reasons) == report.total_layers
            assert report.bytes_after < report.bytes_before
        else:
            assert report.method == "none"


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings(name, tiny, reference, tmp_path):
    quantization = dict.fromkeys(roles_of(name), "int8")
    pipe, error = check(name, tiny, reference, tmp_path, quantization=quantization)
    bounds = LARGEST_ERROR_HDR if "HDR" in get(name).pipeline_class else LARGEST_ERROR
    assert error < bounds["int8"]
    assert all(report.method == "int8" for report in pipe.quantization_report if report.role)


@pytest.mark.parametrize("name", [*MAIN, "z-image-controlnet", "z-image-omni"])
def test_layerwise(name, tiny, reference, tmp_path):
    keywords = {"quantization": {"transformer": "fp8-weight-only", "encoder": "fp8-weight-only"}}
    pipe, error = check(name, tiny, reference, tmp_path, quantization_backend="layerwise", **keywords)
    assert error < LARGEST_ERROR["fp8-weight-only"]
    for report in pipe.quantization_report:
        if report.role in ("transformer", "encoder"):
            assert report.backend == "layerwise"
            assert report.bytes_after < 0.85 * report.bytes_before


@pytest.mark.parametrize("granularity", ["per-row", "per-tensor"])
@pytest.mark.parametrize("method", ["fp8-dynamic", "fp8-weight-only"])
def test_granularities(method, granularity, tiny, reference, tmp_path):
    keywords = {"quantization": method, "quantization_granularity": granularity}
    pipe, error = check("z-image", tiny, reference, tmp_path, **keywords)
    assert error < LARGEST_ERROR[method]
    assert pipe.quantization_report["transformer"].granularity == granularity
    weight = pipe.transformer.layers[0].feed_forward.w1.weight
    assert type(weight.data) is torch.Tensor or weight.scale.shape == (
        (weight.shape[0], 1) if granularity == "per-row" else (1, 1)
    )


@pytest.mark.parametrize("method", ["int8", "fp8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("name", MAIN)
def test_plain_diffusers_loads_stock_tensors(name, method, tiny, tmp_path):
    pipe = load_pipeline(tiny(name), quantization={"transformer": method, "encoder": method})
    output = generate(pipe, name)
    pipe.save_pretrained(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(plain) is getattr(diffusers, get(name).pipeline_class)
    kinds = {type(p) for p in plain.transformer.parameters() if isinstance(p, TorchAOBaseTensor)}
    assert kinds == ({Int8Tensor} if method == "int8" else {Float8Tensor})
    assert relative_error(generate(plain, name), output) < 1e-6


@pytest.mark.parametrize("name", ["ltx2", "ltx2.3", "qwen-image", "z-image", "flux2-klein"])
def test_vaes_really_shrink(name, tiny):
    pipe = load_pipeline(tiny(name), quantization_vae="int8")
    for report in pipe.quantization_report:
        if report.role == "vae":
            # The tables of the tiny 2.3 vocoder, which are no weights, outweigh it; at the published size nothing does.
            tables = sum(buffer.nbytes for buffer in getattr(pipe, report.name).buffers())
            assert report.bytes_after - tables <= 0.55 * (report.bytes_before - tables), report.name
