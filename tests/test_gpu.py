"""On a CUDA device: the same pipelines on its kernels, loaded straight there, parked on the host, and offloaded."""

import pytest
import torch
from conftest import generate, relative_error
from torchao.utils import TorchAOBaseTensor

from llm_dit import load_pipeline
from llm_dit.checkpoints.convert import convert
from llm_dit.mixin import QuantizablePipelineMixin
from llm_dit.quantization.sizes import plain_parts

pytestmark = pytest.mark.gpu

MAIN = ("z-image", "flux2-klein", "flux2-dev", "qwen-image", "ltx2", "ltx2.3")
METHODS = ("int8", "fp8-dynamic", "fp8-weight-only", "int4")
LARGEST_ERROR = {"int8": 0.06, "fp8-dynamic": 0.13, "fp8-weight-only": 0.12, "int4": 0.3}


@pytest.fixture(scope="module")
def on_gpu(tiny):
    """`on_gpu(name)`: what the bf16 pipeline generates on the device; kernels there round differently than on the CPU."""
    outputs = {}

    def output(name):
        if name not in outputs:
            outputs[name] = generate(load_pipeline(tiny(name), dtype=torch.bfloat16, device_map="cuda"), name).cpu()
        return outputs[name]

    return output


def weights(pipe: QuantizablePipelineMixin):
    for component in ("text_encoder", "transformer", "vae"):
        for name, parameter in getattr(pipe, component).named_parameters():
            if isinstance(parameter, TorchAOBaseTensor):
                yield from ((f"{component}.{name}", part) for part in plain_parts(parameter.data))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MAIN)
def test_loads_straight_to_the_device(name, method, tiny, on_gpu):
    quantization = {"transformer": method, "encoder": method, "vae": "int8"}
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16, device_map="cuda", quantization=quantization)
    assert all(part.device.type == "cuda" for _, part in weights(pipe))
    output = generate(pipe, name).cpu()
    assert torch.isfinite(output).all()
    assert relative_error(output, on_gpu(name)) < LARGEST_ERROR[method]


@pytest.mark.parametrize("method", METHODS)
def test_parked_on_the_host_and_moved_gives_the_same_bits(method, tiny):
    quantization = {"transformer": method, "encoder": method, "vae": "int8"}
    direct = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, device_map="cuda", quantization=quantization)
    parked = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, quantization=quantization)
    assert all(part.device.type == "cpu" for _, part in weights(parked))
    parked.to("cuda")
    for (name, ours), (_, theirs) in zip(weights(direct), weights(parked), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    assert torch.equal(generate(direct, "z-image"), generate(parked, "z-image"))


@pytest.mark.parametrize("method", METHODS)
def test_model_offloading(method, tiny, on_gpu):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, quantization={"transformer": method, "encoder": method})
    pipe.enable_model_cpu_offload()
    assert relative_error(generate(pipe, "z-image").cpu(), on_gpu("z-image")) < LARGEST_ERROR[method]


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_on_the_device(method, tiny, tmp_path):
    quantization = {"transformer": method, "encoder": method, "vae": "int8"}
    pipe = load_pipeline(tiny("flux2-klein"), dtype=torch.bfloat16, device_map="cuda", quantization=quantization)
    output = generate(pipe, "flux2-klein")
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, dtype=torch.bfloat16, device_map="cuda")
    assert torch.equal(generate(again, "flux2-klein"), output)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_blocks_give_the_same_picture(method, tiny, on_gpu):
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, device_map="cuda", quantization=method, compile=True)
    assert relative_error(generate(pipe, "z-image").cpu(), on_gpu("z-image")) < LARGEST_ERROR[method]


def test_layerwise(tiny, on_gpu):
    quantization = {"transformer": "fp8-weight-only", "encoder": "fp8-weight-only"}
    pipe = load_pipeline(
        tiny("z-image"), dtype=torch.bfloat16, device_map="cuda", quantization=quantization, quantization_backend="layerwise"
    )
    assert relative_error(generate(pipe, "z-image").cpu(), on_gpu("z-image")) < LARGEST_ERROR["fp8-weight-only"]


def test_zero_padded_text_on_the_tensor_cores(tiny):
    pipe = load_pipeline(
        tiny("ltx2"), dtype=torch.bfloat16, device_map="cuda", quantization={"transformer": "fp8", "encoder": "fp8"}
    )
    assert torch.isfinite(generate(pipe, "ltx2")).all()


def test_the_recommendation_fits_the_card(tiny):
    from llm_dit.quantization import check_fp8_support, get_recommended_method

    assert get_recommended_method() == ("fp8-dynamic" if check_fp8_support() else "int8")
    pipe = load_pipeline(tiny("z-image"), dtype=torch.bfloat16, device_map="cuda", quantization="auto")
    assert pipe.quantization_report["transformer"].method == "none"  # of which the card has plenty


@pytest.mark.parametrize("method", ["fp8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("name", MAIN)
def test_an_fp8_file_on_the_tensor_cores(name, method, tiny, on_gpu, tmp_path):
    convert(tiny(name), tmp_path / "fp8.safetensors", "comfy")
    keywords = {"dtype": torch.bfloat16, "transformer_file": tmp_path / "fp8.safetensors", "quantization_transformer": method}
    pipe = load_pipeline(tiny(name), device_map="cuda", **keywords)
    assert pipe.quantization_report["transformer"].backend == "checkpoint"
    assert all(p.device.type == "cuda" for p in pipe.transformer.parameters())
    output = generate(pipe, name).cpu()
    assert relative_error(output, on_gpu(name)) < LARGEST_ERROR[method]
    moved = load_pipeline(tiny(name), **keywords).to("cuda")
    assert torch.equal(generate(moved, name).cpu(), output)


@pytest.mark.parametrize("method", ["none", "fp8-dynamic", "int4"])
@pytest.mark.parametrize("name", ["flux2-klein", "ltx2.3"])
def test_cuda_graphs_give_the_picture_of_the_compiled_model(name, method, tiny):
    keywords = {"dtype": torch.bfloat16, "device_map": "cuda", "quantization_transformer": method, "compile": True}
    expected = generate(load_pipeline(tiny(name), **keywords), name)
    pipe = load_pipeline(tiny(name), **keywords, compile_mode="cuda-graph")
    outputs = [generate(pipe, name) for _ in range(3)]
    assert pipe.transformer.forward.captured > 0
    for output in outputs:
        assert relative_error(output.cpu(), expected.cpu()) < 1e-3
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("method", ["none", "fp8-dynamic", "fp8-weight-only", "int8", "int4"])
@pytest.mark.parametrize("name", ["flux2-klein", "z-image", "qwen-image", "ltx2.3"])
def test_graphs_of_the_eager_model_give_its_picture(name, method, tiny):
    keywords = {"dtype": torch.bfloat16, "device_map": "cuda", "quantization_transformer": method}
    expected = generate(load_pipeline(tiny(name), **keywords), name)
    pipe = load_pipeline(tiny(name), **keywords, compile=True, compile_mode="cuda-graph-eager")
    outputs = [generate(pipe, name) for _ in range(3)]
    assert pipe.transformer.forward.captured > 0
    for output in outputs:
        assert torch.equal(output, expected)


def test_cuda_graphs_follow_what_changes(tiny):
    pipe = load_pipeline(tiny("flux2-klein"), dtype=torch.bfloat16, device_map="cuda", compile=True, compile_mode="cuda-graph")
    generate(pipe, "flux2-klein")
    before = generate(pipe, "flux2-klein")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.data = pipe.transformer.proj_out.weight.data * 2  # other memory, other values
    changed = generate(pipe, "flux2-klein")
    assert not torch.equal(changed, before)
    eager = load_pipeline(tiny("flux2-klein"), dtype=torch.bfloat16, device_map="cuda", compile=True)
    with torch.no_grad():
        eager.transformer.proj_out.weight.mul_(2)
    assert relative_error(changed.cpu(), generate(eager, "flux2-klein").cpu()) < 1e-3
